"""The members that classification requires of its data beyond `common.task.Data`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.task import Batch, Data


class ImageData(Data, Protocol):
    """A data set of images with one label each.

    Optional members, looked up by name: `exif`, how users' images are turned by their EXIF tags
    (`common.data.images.read_image`); `class_notes()`, the classes' names and a note on their order; and
    `set_learnt_classes(names)`, which is called with the classes of a checkpoint before it is evaluated. Further ones
    are listed in `common.task.OptionalData`.
    """

    channels: int
    image_size: tuple[int, int]  # height and width that the model takes, in pixels

    def classes(self) -> Sequence[str]:
        """The classes' names in order of index."""

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """The model's input, computed on `device`: fp32 (B, C, H, W), normalised, and in training erased and mixed."""

    def thumbnails(self, batch: Batch, count: int) -> Tensor:
        """The first `count` images of a batch, not normalised, for display: uint8 (n, 3, H, W) on the CPU."""

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample from a user's image, uint8 (3, h, w) of any size, as in evaluation; it has no label."""
