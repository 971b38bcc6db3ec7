"""The metric and the pictures of a masked autoencoder."""

import csv
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files.names import escape
from common.machine.distributed import gather_samples, is_main
from common.report.tiles import SPACING, fitted
from common.task import Answer, Batch

GREY = 128  # of masked patches in pictures


class ReconstructionMetric:
    """The mean over the images of a split of the error of their masked patches; see vit/criterion/masked_pixels.py."""

    def __init__(self, expected: int | None = None) -> None:
        self.expected = expected
        self.losses: list[tuple[Any, float]] = []  # (id, loss) of each image
        self.gathered = False

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the images of a batch; each answer has "loss"."""
        self.losses.extend(zip(batch["ids"], (answer["loss"] for answer in answers), strict=True))

    def restrict(self, count: int) -> None:
        """Expect only `count` samples of the split, for evaluation on a part of it."""
        self.expected = count

    def gather(self) -> None:
        """Gather the images of all ranks on every rank, sorted by id; each image must occur exactly once."""
        self.losses = gather_samples(self.losses, self.expected)
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """Return {"loss": the mean over the images}."""
        assert self.gathered and self.losses, "call gather() before compute(), for a split with images"
        return {"loss": math.fsum(loss for _, loss in self.losses) / len(self.losses)}

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table with a header and the ten images with the largest losses."""
        worst = sorted(self.losses, key=lambda row: -row[1])[:10]
        return [("image", "loss"), *worst]

    def write(self, folder: Path) -> None:
        """Write `losses.csv`, with a row for each image: id, loss. Only rank 0 writes."""
        assert self.gathered, "call gather() before write()"
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "losses.csv").open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                table.writerow(("id", "loss"))
                table.writerows((escape(str(id)), f"{loss:.6g}") for id, loss in self.losses)


def draw_reconstruction(image: Tensor, reconstruction: Tensor, masked: Tensor) -> Tensor:
    """Draw an image with its masked patches in grey, beside it the reconstruction, and then the image itself.

    image and reconstruction uint8 (3, H, W), masked bool (rows, columns) -> uint8 (3, H', W').
    """
    size = image.shape[-2] // masked.shape[0], image.shape[-1] // masked.shape[1]
    hidden = masked.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)  # (H, W)
    tiles = [fitted(tile) for tile in (image.masked_fill(hidden, GREY), reconstruction, image)]
    gap = torch.full((3, tiles[0].shape[-2], SPACING), 255, dtype=torch.uint8)
    return torch.cat([tiles[0], gap, tiles[1], gap, tiles[2]], dim=-1)
