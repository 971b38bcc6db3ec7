"""Moved to detr.models.detector; importable here for one version."""

from detr.models.detector import BoxHead, Detector, PositionOptions  # noqa: F401
