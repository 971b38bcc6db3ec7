"""Detection with denoising queries in training (Li et al. 2022, DN-DETR; Zhang et al. 2022, DINO)."""

from torch import Tensor

from common.errors import UserError
from common.task import Batch
from common.types import Positive
from detr.criterion.answers import Matches, Targets
from detr.criterion.denoising import DenoisingOptions, denoising_queries
from detr.criterion.distillation import DetectionDistillationOptions
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import LossOptions
from detr.data.protocol import DetectionData
from detr.evaluation.coco_evaluators import Evaluator
from detr.tasks.detection import Detection
from detr.tasks.prediction import PredictOptions


class DenoisingDetection(Detection):
    """The task of detection for a model that builds queries from noisy copies of the objects, such as DINO.

    The loss of these queries is the part "hints" in the log. In the step, each of its terms is divided by the number of
    positive copies.
    """

    def __init__(
        self,
        *,
        data: DetectionData,
        queries: Positive,
        loss: LossOptions,
        matcher: MatcherOptions,
        predict: PredictOptions,
        evaluator: Evaluator,
        denoising: DenoisingOptions,
        masks: bool = False,
        distillation: DetectionDistillationOptions | None = None,
    ):
        super().__init__(
            data=data,
            queries=queries,
            loss=loss,
            matcher=matcher,
            predict=predict,
            evaluator=evaluator,
            masks=masks,
            distillation=distillation,
        )
        self.denoising = denoising

    def answer_sets(self, batch: Batch) -> dict[str, tuple[list[int], list[int]]]:
        """See Detection; the set "hints" has as many objects as positive copies."""
        counts = batch["counts"]
        positives = [self.denoising.groups(count) * count for count in counts]
        return {**super().answer_sets(batch), "hints": (positives, [self.denoising.rows(count) for count in counts])}

    def hints(self, batch: Batch, targets: Targets) -> tuple[dict[str, Tensor], Matches] | None:
        """Return the inputs of the denoising queries and the matches of their outputs; None if there are none."""
        if "seeds" not in batch:
            raise UserError("Denoising needs a seed for each sample: batch['seeds'], which the loader adds.")
        return denoising_queries(self.denoising, targets, batch["seeds"], len(self.categories))

    def from_scratch(self, minimum: int) -> str:
        """Return what happens with few images and no pretrained weights, and what to do instead."""
        return (
            f"with fewer than {minimum:,} images, pretrained weights give a better detector; start from "
            "checkpoint=FILE (an official COCO detector), or from model.backbone.weights=imagenet_v1 or a file."
        )
