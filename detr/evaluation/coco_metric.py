"""COCO's metrics of a detector: the detections of a split are gathered from all ranks and evaluated on rank 0."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.machine.distributed import broadcast, gather_samples, is_main
from common.task import Answer, Batch
from detr.data import annotations
from detr.evaluation.coco_evaluators import Evaluator, select_evaluator
from detr.evaluation.coco_numbers import ClassRow, Evaluation, evaluate_images, write_results
from detr.evaluation.coco_tables import SHAPE_KEY, Detections
from detr.evaluation.coco_truth import IouType
from detr.evaluation.masks import encode


class CocoMetric:
    """COCO's metrics for the detections of one split. Each image must be evaluated exactly once, on any rank.

    After a call of `restrict`, fewer images are evaluated.

    Args:
        ground_truth: the split's COCO JSON, including crowds and boxes without area. Stuff in it (categories with
            "isthing" 0) and detections of stuff do not count.
        categories: {"id", "name"} by class index.
        evaluator: the package that computes the metrics; all packages give identical values.

    Raises UserError when the evaluator is not installed.
    """

    def __init__(
        self, ground_truth: dict[str, Any], categories: list[dict[str, Any]], evaluator: Evaluator = "pycocotools"
    ) -> None:
        select_evaluator(evaluator)  # a missing package raises its error now, not after the last image
        self.ground_truth = annotations.things(ground_truth)
        self.categories = categories
        self.evaluator = evaluator
        self.detections: list[tuple[int, Detections]] = []  # image ids and their detections
        self.count: int | None = None  # number of images to evaluate; None = the whole split
        self.gathered = False
        self.rows: list[ClassRow] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the detections of a batch.

        Each answer has boxes (n, 4) xyxy in pixels of the original image, scores (n,) and labels (n,). It may have
        masks of the size of the original image: bool (n, H, W), or a list of n compressed run-length codes. Raises
        UserError if a box or a score is not finite.
        """
        for image, answer in zip(batch["ids"], answers, strict=True):
            boxes, scores = answer["boxes"].double().numpy(), answer["scores"].double().numpy()
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
                raise UserError(
                    f"image {image}: the model's boxes or scores are not finite; its weights are not finite, or the "
                    "precision is too low (try trainer.precision=fp32)."
                )
            detections = Detections(
                boxes=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
                scores=scores,
                labels=answer["labels"].long().numpy(),
                masks=encode(answer["masks"]) if "masks" in answer else None,
            )
            self.detections.append((image, detections))

    def restrict(self, count: int) -> None:
        """Expect only `count` images of the split; the metrics are then computed on the evaluated images alone."""
        self.count = count

    def gather(self) -> None:
        """Gather the ranks' detections on rank 0.

        Each image of the split, or after `restrict` each of `count` images, must have been evaluated exactly once.
        """
        gathered = gather_samples(self.detections, self.count)
        if self.count is not None:
            self.ground_truth = annotations.select(self.ground_truth, [image for image, _ in gathered])
        evaluated, expected = {image for image, _ in gathered}, {image["id"] for image in self.ground_truth["images"]}
        assert evaluated == expected, (
            f"every image of the split must be evaluated; missing: {sorted(expected - evaluated)[:5]}, not of this "
            f"split: {sorted(evaluated - expected)[:5]}"
        )
        self.detections = gathered if is_main() else []
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """Return the box metrics by name (`coco_numbers.NAMES`) and, with masks, the mask metrics as mask_AP and so on.

        The result is {} if the ground truth has no key "annotations". Rank 0 computes the metrics and broadcasts them
        to the other ranks.
        """
        assert self.gathered, "gather() comes before compute()"
        if "annotations" not in self.ground_truth:
            return {}
        numbers: dict[str, float] = {}
        rows: list[ClassRow] = []
        if is_main():
            numbers, rows = self._evaluate("bbox")
            if self._has_masks():
                masks, _ = self._evaluate("segm")
                numbers |= {f"mask_{name}": number for name, number in masks.items()}
        numbers, self.rows = broadcast((numbers, rows))
        return numbers

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table of the box metrics of each class: a header, then one `ClassRow` per class, by category id.

        The table has only the header before `compute` is called, and if the ground truth has no key "annotations".
        """
        return [ClassRow._fields, *self.rows]

    def results(self, iou_type: IouType) -> Iterator[dict[str, Any]]:
        """Yield the entries of a COCO results file for boxes or masks.

        The entries are not rounded, so evaluating the file gives the same metrics as `compute`.
        """
        ids = self._category_ids()
        for image, detections in self.detections:
            shapes = detections.boxes.tolist() if iou_type == "bbox" else detections.masks
            assert shapes is not None, f"the answer for image {image} has no masks"
            labels, scores = detections.labels.tolist(), detections.scores.tolist()
            for label, shape, score in zip(labels, shapes, scores, strict=True):
                yield {"image_id": image, "category_id": ids[label], SHAPE_KEY[iou_type]: shape, "score": score}

    def write(self, folder: Path) -> None:
        """Write the COCO results files `boxes.json` and, if the answers have masks, `masks.json`, on rank 0.

        To submit a file to COCO's server, zip it and give it the name that the server prescribes for the split.
        """
        assert self.gathered, "gather() comes before write()"
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / "boxes.json", self.results("bbox"))
        if self._has_masks():
            write_results(folder / "masks.json", self.results("segm"))

    def _evaluate(self, iou_type: IouType) -> Evaluation:
        ids = self._category_ids()
        return evaluate_images(self.ground_truth, self.detections, ids, iou_type, self.evaluator)

    def _category_ids(self) -> list[Any]:
        return [category["id"] for category in self.categories]

    def _has_masks(self) -> bool:
        return any(detections.masks is not None for _, detections in self.detections)
