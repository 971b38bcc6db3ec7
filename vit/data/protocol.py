"""What classification asks of its data beyond `common.task.Data`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.task import Batch, Data


class ImageData(Data, Protocol):
    """Images with one label each."""

    channels: int
    image_size: tuple[int, int]  # height and width that the model takes, in pixels

    def classes(self) -> Sequence[str]:
        """The classes' names in order of index."""

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """The model's input, computed on `device`: float (B, C, H, W), normalised, and in training mixed."""

    def thumbnails(self, batch: Batch, count: int) -> Tensor:
        """The first `count` images of an evaluation batch for people: uint8 (n, 3, H, W) on the CPU."""

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """A user's image, uint8 (3, H, W) of any size, as a sample without a label, as evaluated."""
