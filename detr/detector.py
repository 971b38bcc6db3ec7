"""Moved to detr.models.detector; importable here for one version."""

from detr.models.detector import Detector  # noqa: F401
