"""The code length of images under a model of their pixels: bits per pixel and per dimension, over all ranks."""

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.files.names import escape
from common.machine.distributed import gather_samples, is_main
from common.task import Answer, Batch


class CodedImage(NamedTuple):
    """The values that the metric stores for each image."""

    id: Any
    nats: float  # minus the log probability of the predicted pixels' colours
    pixels: int  # the number of predicted pixels: all, or those that were masked
    truth: int  # index of the true class; -1 if unknown
    predicted: int | None  # index of the predicted class; None for a model without a classifier


class CodeLengthMetric:
    """Bits per pixel on one split and, for a model with a classifier, the accuracy.

    A pixel is one symbol of a palette of V colours, so bits per pixel are the length of a code for the indices of these
    colours: log2 V for a model that knows nothing. `bits_per_dimension` are bits per pixel divided by the number of
    channels. If the palette holds all colours of the images (`Palette.lossless`), this is the code length of the images
    themselves, and of grey images the same number as bits per pixel. Otherwise, many RGB values share an index, and
    both numbers are lower than the code length of the RGB values: they cannot be compared with the bits per dimension
    of models of RGB values (such as PixelCNN).

    Args:
        channels: number of channels of the images.
        classes: names of the classes, by index.
        masked: whether only masked pixels are predicted. The number is then named `bits_per_masked_pixel`; it is not a
            code length of the image, since each pixel is predicted from others on both sides.
        expected: number of images in the split; `gather` checks that none is missing. None = no check.
    """

    def __init__(self, channels: int, classes: Sequence[str], masked: bool, expected: int | None = None) -> None:
        self.channels, self.classes, self.masked, self.expected = channels, classes, masked, expected
        self.images: list[CodedImage] = []

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the images of a batch; answers have "nats", "pixels" and, with a classifier, "label"."""
        rows = zip(batch["ids"], answers, batch["labels"].tolist(), strict=True)
        self.images += [CodedImage(i, a["nats"], a["pixels"], truth, a.get("label")) for i, a, truth in rows]

    def restrict(self, count: int) -> None:
        """Expect only `count` images of the split, for evaluation on a part of it."""
        self.expected = count

    def gather(self) -> None:
        """Gather the values of all ranks on every rank, sorted by id."""
        self.images = gather_samples(self.images, self.expected)

    def compute(self) -> dict[str, float]:
        """Compute `bits_per_pixel` and `bits_per_dimension`, or `bits_per_masked_pixel`, and `top1` with a classifier.

        Example: two images of 4 grey pixels, of which a model that gives every colour of 8 the same probability needs
        ln 8 nats for each pixel, have 3 bits per pixel and per dimension.
        """
        bits = _bits(self.images)
        numbers = (
            {"bits_per_masked_pixel": bits}
            if self.masked
            else {"bits_per_pixel": bits, "bits_per_dimension": bits / self.channels}
        )
        if self._classifies():
            numbers["top1"] = _top1(self.images)
        return numbers

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table with a header and a row for each class: its number of images, bits and, if known, accuracy."""
        by_class: dict[int, list[CodedImage]] = defaultdict(list)
        for image in self.images:
            by_class[image.truth].append(image)
        classifies = self._classifies()
        rows: list[tuple[Any, ...]] = [("class", "images", "bits", *["top1"] * classifies)]
        for label in sorted(by_class):
            images = by_class[label]
            name = self.classes[label] if 0 <= label < len(self.classes) else f"class {label}"
            rows.append((name, len(images), _bits(images), *([_top1(images)] if classifies else [])))
        return rows

    def write(self, folder: Path) -> None:
        """Write `bits.csv` with a row for each image: id, predicted pixels, bits per pixel, true and predicted class.

        Only rank 0 writes.
        """
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "bits.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(("id", "pixels", "bits_per_pixel", "truth", "predicted"))
            for image in self.images:
                predicted = "" if image.predicted is None else image.predicted
                table.writerow((escape(str(image.id)), image.pixels, f"{_bits([image]):.6g}", image.truth, predicted))

    def _classifies(self) -> bool:
        return bool(self.images) and self.images[0].predicted is not None


def _bits(images: Sequence[CodedImage]) -> float:
    """Return the bits per predicted pixel; NaN if no pixel is predicted."""
    pixels = sum(image.pixels for image in images)
    return math.fsum(image.nats for image in images) / math.log(2) / pixels if pixels else math.nan


def _top1(images: Sequence[CodedImage]) -> float:
    return sum(image.predicted == image.truth for image in images) / len(images)
