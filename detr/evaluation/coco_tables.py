"""The detections of a whole data set as columns, from a detector's answers or from the entries of a results file."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from detr.evaluation.coco_truth import GroundTruth, IouType

SHAPE_KEY = {"bbox": "bbox", "segm": "segmentation"}  # the key of a result's box or mask
NO_BOXES = np.zeros((0, 4))


class Detections(NamedTuple):
    """The detections of one image."""

    boxes: np.ndarray  # (n, 4) float64, x y width height in pixels of the original image
    scores: np.ndarray  # (n,) float64
    labels: np.ndarray  # (n,) int64, class indices
    masks: list[dict[str, Any]] | None  # n run-length codes; None for a detector without masks


class DetectionTable(NamedTuple):
    """N detections of all images, with the ids of a `GroundTruth`; of equal scores in an image, the first ranks first.

    `shapes` are boxes (N, 4), x y width height in pixels, or N run-length codes.
    """

    images: NDArray[np.int64]  # (N,)
    categories: NDArray[np.int64]  # (N,)
    scores: NDArray[np.float64]  # (N,)
    shapes: NDArray[np.float64] | list[dict[str, Any]]

    def of_known_categories(self) -> "DetectionTable":
        """Return the table without the rows whose category is 0, which stands for one outside the ground truth."""
        if self.categories.all():
            return self
        known = np.flatnonzero(self.categories)
        shapes = self.shapes[known] if isinstance(self.shapes, np.ndarray) else [self.shapes[row] for row in known]
        return DetectionTable(self.images[known], self.categories[known], self.scores[known], shapes)


def tabulate_images(
    detections: Sequence[tuple[Any, Detections]], categories: Sequence[Any], truth: GroundTruth, iou_type: IouType
) -> DetectionTable:
    """Join the detections of all images, given as pairs (image id, detections).

    `categories` are the category ids by class index. Detections of categories that are not in the ground truth are
    dropped, because they do not affect the metrics. All images must be in the ground truth.
    """
    parts = [part for _, part in detections]
    images = np.array([truth.images[image] for image, _ in detections], dtype=np.int64)
    numbers = np.array([truth.categories.get(id, 0) for id in categories], dtype=np.int64)
    shapes: NDArray[np.float64] | list[dict[str, Any]]
    if iou_type == "bbox":
        shapes = np.concatenate([NO_BOXES, *(part.boxes for part in parts)])
    else:
        shapes = list(chain.from_iterable(part.masks for part in parts if part.masks is not None))
        assert all(part.masks is not None for part in parts), "the answers of some images have no masks"
    return DetectionTable(
        images=images.repeat([len(part.scores) for part in parts]),
        categories=numbers[np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)])],
        scores=np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
        shapes=shapes,
    ).of_known_categories()


def tabulate_results(results: Iterable[dict[str, Any]], truth: GroundTruth, iou_type: IouType) -> DetectionTable:
    """Convert the entries of a results file, in any order.

    pycocotools' loadRes is not used, because it fails on an empty list and modifies its argument. Results of categories
    that are not in the ground truth are dropped. Raises UserError for a result of an image that is not in it.
    """
    results = list(results)
    if unknown := {result["image_id"] for result in results} - truth.images.keys():
        raise UserError(f"the results name images that are not in the ground truth: {sorted(unknown)[:5]}.")
    shapes: Any = [result[SHAPE_KEY[iou_type]] for result in results]
    return DetectionTable(
        images=np.array([truth.images[result["image_id"]] for result in results], dtype=np.int64),
        categories=np.array([truth.categories.get(result["category_id"], 0) for result in results], dtype=np.int64),
        scores=np.array([result["score"] for result in results], dtype=np.float64),
        shapes=np.array(shapes, dtype=np.float64).reshape(-1, 4) if iou_type == "bbox" else shapes,
    ).of_known_categories()
