"""From a detector's answers to COCO's numbers: every image of a split once, over all ranks, counted at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle
from torch import Tensor

from common.errors import UserError
from common.machine.distributed import broadcast, gather_samples, is_main
from common.task import Answer, Batch
from detr.evaluation.coco_evaluators import Evaluator, IouType, select_evaluator
from detr.evaluation.coco_numbers import SHAPE_KEY, ClassRow, evaluate_results, write_results


class Detections(NamedTuple):
    """What was detected in one image, in COCO's terms."""

    boxes: np.ndarray  # (n, 4) float64, x y width height in pixels of the original image
    scores: np.ndarray  # (n,)
    categories: list[int]  # (n,) category ids
    masks: list[dict[str, Any]] | None  # n run-length codes


class CocoMetric:
    """Detections of one split, every image exactly once over all ranks, to COCO's numbers.

    Args:
        ground_truth: the split's COCO JSON, uncleaned, with its crowds.
        categories: {"id", "name"} by class index.
        evaluator: the program that counts; the numbers are the same.

    Raises UserError when the evaluator is not installed.
    """

    def __init__(
        self, ground_truth: dict[str, Any], categories: list[dict[str, Any]], evaluator: Evaluator = "pycocotools"
    ) -> None:
        select_evaluator(evaluator)  # now, and not when all images have been seen
        self.ground_truth = ground_truth
        self.categories = categories
        self.evaluator = evaluator
        self.seen: list[tuple[int, Detections]] = []  # image id and what was detected there
        self.gathered = False
        self.rows: list[ClassRow] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Take in each image's boxes (n, 4) xyxy in original pixels, scores (n,), labels (n,), masks (n, H, W)."""
        for image, answer in zip(batch["ids"], answers, strict=True):
            boxes, scores = answer["boxes"].double().numpy(), answer["scores"].double().numpy()
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
                raise UserError(
                    f"image {image}: the model's boxes or scores are not finite; its weights are broken, or the "
                    "precision is too low (try trainer.precision=fp32)."
                )
            detections = Detections(
                boxes=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1),
                scores=scores,
                categories=[self.categories[label]["id"] for label in answer["labels"].tolist()],
                masks=_encode(answer["masks"]) if "masks" in answer else None,
            )
            self.seen.append((image, detections))

    def gather(self) -> None:
        """Join the ranks' images on rank 0; every image of the split must have been seen, and only once."""
        rows = gather_samples(self.seen, None)
        seen, expected = {image for image, _ in rows}, {image["id"] for image in self.ground_truth["images"]}
        assert seen == expected, (
            f"every image of the split must be evaluated; by id, never: {sorted(expected - seen)[:5]}, not of this "
            f"split: {sorted(seen - expected)[:5]}"
        )
        self.seen = rows if is_main() else []
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """Box numbers by COCO's names and, when the answers held masks, mask numbers with `mask_` before the name.

        Rank 0 counts, the others wait for its numbers.
        """
        assert self.gathered, "gather() comes before compute()"
        numbers: dict[str, float] = {}
        rows: list[ClassRow] = []
        if is_main():
            numbers, rows = evaluate_results(self.ground_truth, self.results("bbox"), "bbox", self.evaluator)
            if self._holds_masks():
                masks, _ = evaluate_results(self.ground_truth, self.results("segm"), "segm", self.evaluator)
                numbers |= {f"mask_{name}": number for name, number in masks.items()}
        numbers, self.rows = broadcast((numbers, rows))
        return numbers

    def details(self) -> list[tuple[Any, ...]]:
        """Name, box AP and AP50, and number of objects of each class by rising category id, after `compute`."""
        return [ClassRow._fields, *self.rows]

    def results(self, kind: IouType) -> Iterator[dict[str, Any]]:
        """The lines of a COCO results file: unrounded, so that the file gives the same numbers again."""
        for image, detections in self.seen:
            shapes = detections.boxes.tolist() if kind == "bbox" else detections.masks
            assert shapes is not None, f"the answer to image {image} holds no masks"
            for category, shape, score in zip(detections.categories, shapes, detections.scores.tolist(), strict=True):
                yield {"image_id": image, "category_id": category, SHAPE_KEY[kind]: shape, "score": score}

    def write(self, folder: Path) -> None:
        """Write `boxes.json` and, when the answers held masks, `masks.json`: each a COCO results file.

        COCO's server takes them zipped, under the name that it prescribes for the set.
        """
        assert self.gathered, "gather() comes before write()"
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder / "boxes.json", self.results("bbox"))
        if self._holds_masks():
            write_results(folder / "masks.json", self.results("segm"))

    def _holds_masks(self) -> bool:
        return any(detections.masks is not None for _, detections in self.seen)


def _encode(masks: Tensor) -> list[dict[str, Any]]:
    """Boolean masks (n, H, W) as COCO's compressed run-length codes, fit for JSON."""
    columns_first = np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8))  # (H, W, n)
    return [{"size": code["size"], "counts": code["counts"].decode()} for code in rle.encode(columns_first)]
