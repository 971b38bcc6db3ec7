"""The panoptic quality of a model: each image is compared where it was predicted, and rank 0 computes the metrics."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.machine.distributed import broadcast, gather_samples, is_main
from common.task import Answer, Batch
from detr.data.panoptic import PanopticTruth
from detr.data.panoptic_png import encode_ids
from detr.evaluation.panoptic_quality import (
    UNDEFINED,
    ClassCounts,
    Quality,
    class_quality,
    match_segments,
    mean_quality,
    merge,
)


class Segments(NamedTuple):
    """The predicted segments of one image; the key `segments` of an answer holds them."""

    ids: Tensor  # integers (H, W) at the size of the original image: each pixel's segment, 0 = no segment
    # {"id", "category_id"} of each segment; ids are from 1 to 256^3 - 1, and each has a pixel. Other keys are not read.
    infos: list[dict[str, Any]]


class PanopticRow(NamedTuple):
    """The panoptic metrics of one class, and the numbers of its segments."""

    name: str
    PQ: float
    SQ: float
    RQ: float
    true_positives: int
    false_positives: int
    false_negatives: int


class _ImageResult(NamedTuple):
    counts: dict[int, ClassCounts]  # by category id; empty without annotations
    infos: list[dict[str, int]]
    png: bytes  # the ids, compressed


class PanopticMetric:
    """The panoptic quality of one split. Each image must be evaluated exactly once, on any rank.

    The metrics are means over all classes, over things and over stuff. A class without a true segment and without a
    prediction that counts is left out. After a call of `restrict`, fewer images are evaluated.
    """

    def __init__(self, truth: PanopticTruth) -> None:
        self.truth = truth
        self.results: list[tuple[int, _ImageResult]] = []  # image ids and their results
        self.count: int | None = None  # number of images to evaluate; None = the whole split
        self.gathered = False
        self.rows: list[PanopticRow] = []
        self._categories = {category["id"] for category in truth.categories}

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the segments of a batch. Each answer has `segments`, as described in `Segments`.

        Raises UserError if a predicted category is not in the ground truth, or if the image's true segments cannot be
        read.
        """
        for image, answer in zip(batch["ids"], answers, strict=True):
            ids, infos = answer["segments"]
            self.results.append((image, self._compare(image, ids.cpu().numpy(), infos)))

    def _compare(self, image: int, ids: np.ndarray, infos: list[dict[str, Any]]) -> _ImageResult:
        categories = {int(info["id"]): int(info["category_id"]) for info in infos}
        if unknown := sorted(set(categories.values()) - self._categories):
            raise UserError(
                f"image {image}: a predicted segment has category {unknown[0]}, which the ground truth does not list; "
                "evaluate the model on data of its own classes."
            )
        present = set(np.unique(ids).tolist()) - {0}
        assert present == categories.keys() and len(categories) == len(infos), (
            f"image {image}: the ids of pixels {sorted(present)[:5]} and those listed {sorted(categories)[:5]} differ"
        )
        size = self.truth.sizes[image]
        assert ids.shape == size, f"image {image}: the segments have the size {ids.shape}, and the image has {size}"
        counts: dict[int, ClassCounts] = {}
        if self.truth.files:
            counts = match_segments(self.truth.read(image), self.truth.segments[image], ids, categories)
        listed = [{"id": id, "category_id": category} for id, category in categories.items()]
        return _ImageResult(counts, listed, encode_ids(ids))

    def restrict(self, count: int) -> None:
        """Expect only `count` images of the split; the metrics are then computed on the evaluated images alone."""
        self.count = count

    def gather(self) -> None:
        """Gather the ranks' results on rank 0.

        Each image of the split, or after `restrict` each of `count` images, must have been evaluated exactly once.
        """
        gathered = gather_samples(self.results, len(self.truth.sizes) if self.count is None else self.count)
        self.results = gathered if is_main() else []
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """Return PQ, SQ and RQ, and the same of things and of stuff as PQ_things and so on; -1 if there is no class.

        The result is {} if the split has no annotations. Rank 0 computes the metrics and broadcasts them.
        """
        assert self.gathered, "gather() comes before compute()"
        if not self.truth.files:
            return {}
        counts = merge(result.counts for _, result in self.results)
        qualities = {category: class_quality(of_class) for category, of_class in counts.items()}
        numbers: dict[str, float] = self._means(qualities)
        numbers, self.rows = broadcast((numbers, self._class_rows(counts)))
        return numbers

    def _means(self, qualities: dict[int, Quality | None]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for ending, kinds in (("", (0, 1)), ("_things", (1,)), ("_stuff", (0,))):
            ids = [category["id"] for category in self.truth.categories if category["isthing"] in kinds]
            chosen = [quality for id in ids if (quality := qualities.get(id)) is not None]
            numbers |= {f"{name}{ending}": value for name, value in mean_quality(chosen)._asdict().items()}
        return numbers

    def _class_rows(self, counts: dict[int, ClassCounts]) -> list[PanopticRow]:
        rows = []
        for category in self.truth.categories:
            of_class = counts.get(category["id"], ClassCounts([], 0, 0))
            quality = class_quality(of_class) or UNDEFINED
            rows.append(
                PanopticRow(
                    category["name"],
                    *quality,
                    len(of_class.ious),
                    of_class.false_positives,
                    of_class.false_negatives,
                )
            )
        return rows

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table of the metrics of each class: a header, then one `PanopticRow` per class, by category id.

        The table has only the header before `compute` is called, and if the split has no annotations.
        """
        return [PanopticRow._fields, *self.rows]

    def write(self, folder: Path) -> None:
        """Write COCO's panoptic results on rank 0: `panoptic.json` and the folder `panoptic` of PNGs.

        To submit them to COCO's server, zip both with the names that the server prescribes for the split.
        """
        assert self.gathered, "gather() comes before write()"
        if not is_main():
            return
        (folder / "panoptic").mkdir(parents=True, exist_ok=True)
        annotations = []
        for image, result in self.results:
            name = f"{image:012d}.png"  # as COCO's files are named
            (folder / "panoptic" / name).write_bytes(result.png)
            annotations.append({"image_id": image, "file_name": name, "segments_info": result.infos})
        (folder / "panoptic.json").write_text(json.dumps({"annotations": annotations}))
