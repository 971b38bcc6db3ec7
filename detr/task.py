"""Former path of detr.tasks.detection and detr.evaluation.

Importing from here still works in this version, but not in the next.
"""

from detr.evaluation.coco_evaluators import Evaluator  # noqa: F401
from detr.tasks.detection import Detection, PredictOptions  # noqa: F401
