"""Moved to vit.tasks.classification; importable here for one version."""

from vit.tasks.classification import Classification, PredictOptions  # noqa: F401
