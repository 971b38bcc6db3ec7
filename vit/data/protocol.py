"""The protocol of a data set for image classification, which extends `common.task.Data`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from common.task import Batch, Data


class ImageData(Data, Protocol):
    """A data set of images with one label each.

    It may also have members of `common.task.OptionalData`, which the task looks up by name. `exif` tells whether users'
    images are turned upright by their EXIF tags (`common.data.images.read_image`). `class_notes()` returns the classes'
    names and a note on their order. `set_learnt_classes(names)` is called with the classes of a checkpoint when the
    task's state is restored.
    """

    channels: int  # 1 (grey) or 3 (RGB)
    image_size: tuple[int, int]  # height and width of the model's input in pixels

    def classes(self) -> Sequence[str]:
        """Return the names of the classes, by index."""

    def inputs(self, batch: Batch, device: torch.device) -> Tensor:
        """Compute the model's input on `device`: fp32 (B, C, H, W), normalised.

        In training, random erasing and mixing are also applied.
        """

    def thumbnails(self, batch: Batch, count: int) -> Tensor:
        """Return the first `count` images of a batch for display, not normalised: uint8 (n, 3, H, W) on the CPU."""

    def view(self, image: Tensor, file: Path) -> dict[str, Any]:
        """Make a sample from a user's image, uint8 (3, h, w) of any size, resized and cropped as in evaluation.

        The true class is unknown, so the label in a batch is -1. `file` is the image's path, which the batch holds in
        `files`.
        """


class NormalisedImages(ImageData, Protocol):
    """Images whose pixel values can be recovered from the model's input: value / 255 = input * std + mean."""

    mean: Sequence[float]  # of each channel, in [0, 1]
    std: Sequence[float]
