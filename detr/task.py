"""Moved to detr.tasks.detection and detr.evaluation; importable here for one version."""

from detr.evaluation.coco_evaluators import Evaluator  # noqa: F401
from detr.tasks.detection import Detection, PredictOptions  # noqa: F401
