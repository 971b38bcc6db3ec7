"""Moved to detr.tasks.detection; importable here for one version."""

from detr.tasks.detection import Detection, Evaluator, PredictOptions  # noqa: F401
