"""Moved to vit.models.classifier; importable here for one version."""

from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions  # noqa: F401
