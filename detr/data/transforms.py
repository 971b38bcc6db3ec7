"""The augmentation of DETR's training, on uint8 tensors (Carion et al. 2020, arXiv:2005.12872, section 4).

The horizontal flip is taken from the official code. Every random choice is sampled from the argument `generator`. The
data loader seeds the generator with (seed, epoch, index), so the augmentation of a sample depends on nothing else.
Boxes (`tv_tensors.BoundingBoxes`, xyxy in pixels of their image) and masks are transformed with their image.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from common.errors import UserError
from common.types import Side


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The options of resizing and augmentation; all lengths are in pixels.

    kind: "detr" flips horizontally and crops, each with probability 0.5, and resizes to a random size; "flip" flips
        with probability 0.5 and resizes to a random size; "none" resizes training images as in evaluation.
    """

    kind: Literal["detr", "flip", "none"]
    sizes: list[Side]  # lengths of the shorter side in training, of which one is chosen at random
    eval_size: Side  # length of the shorter side in evaluation
    max_size: Side  # limit of the longer side, in training and evaluation
    middle_sizes: list[Side]  # lengths of the shorter side before a crop, of which one is chosen at random
    crop: tuple[Side, Side]  # smallest and largest side of a crop

    def __post_init__(self) -> None:
        """Raise UserError for an empty list of sizes, or crop limits in the wrong order."""
        for name, values in (("sizes", self.sizes), ("middle_sizes", self.middle_sizes)):
            if not values:
                raise UserError(f"data.augmentation.{name}=[]: expected at least one size in pixels.")
        if self.crop[0] > self.crop[1]:
            raise UserError(f"data.augmentation.crop={list(self.crop)}: expected the smaller limit first.")


def as_bounding_boxes(image: Tensor, boxes: Tensor) -> BoundingBoxes:
    """Convert boxes (n, 4) xyxy in pixels to `BoundingBoxes` with the height and width of `image` (3, H, W)."""
    size = (image.shape[-2], image.shape[-1])
    return BoundingBoxes(boxes.reshape(-1, 4), format=BoundingBoxFormat.XYXY, canvas_size=size)


class Objects(NamedTuple):
    """The n objects of an image of H x W pixels; `masks` is None for a task that reads no masks."""

    boxes: BoundingBoxes  # (n, 4) xyxy in pixels
    labels: Tensor  # (n,) class indices
    masks: Tensor | None = None  # uint8 (n, H, W), 1 in the object

    def flip(self) -> "Objects":
        """Mirror the objects at the vertical axis of the image."""
        masks = None if self.masks is None else self.masks.flip(-1)
        return Objects(functional.horizontal_flip(self.boxes), self.labels, masks)

    def resize(self, shape: list[int]) -> "Objects":
        """Scale the objects to an image of the height and width `shape`; see `resize_masks`."""
        masks = None if self.masks is None else resize_masks(self.masks, shape)
        return Objects(functional.resize(self.boxes, shape), self.labels, masks)

    def crop(self, top: int, left: int, height: int, width: int) -> "Objects":
        """Clip the objects to a window, and drop those whose boxes become empty.

        An object whose box reaches into the window is kept even if its mask is empty there, as in the official code.
        """
        boxes = functional.clamp_bounding_boxes(functional.crop(self.boxes, top, left, height, width))
        nonempty = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        masks = None if self.masks is None else self.masks[nonempty, top : top + height, left : left + width]
        visible = BoundingBoxes(boxes[nonempty], format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
        return Objects(visible, self.labels[nonempty], masks)


def augment(
    image: Tensor, objects: Objects, options: Augmentation, generator: torch.Generator | None
) -> tuple[Tensor, Objects]:
    """Augment image uint8 (3, H, W) and its objects; without a generator, resize as in evaluation.

    A crop may leave fewer objects, or none.
    """
    if generator is None or options.kind == "none":
        return resize(image, objects, options.eval_size, options.max_size)
    if torch.rand((), generator=generator) < 0.5:
        image, objects = functional.horizontal_flip(image), objects.flip()
    if options.kind == "detr" and torch.rand((), generator=generator) < 0.5:
        # As in the official code, `max_size` does not apply before the crop.
        image, objects = resize(image, objects, _sample_choice(options.middle_sizes, generator), None)
        image, objects = random_size_crop(image, objects, options.crop, generator)
    return resize(image, objects, _sample_choice(options.sizes, generator), options.max_size)


def resize(image: Tensor, objects: Objects, size: int, max_size: int | None) -> tuple[Tensor, Objects]:
    """Resize `image` (3, H, W) and its objects, so that the shorter side has `size` pixels.

    If the longer side would then exceed `max_size` pixels, the image is resized to this limit instead; None = no limit.
    """
    height, width = image.shape[-2:]
    shape = list(resized_shape(height, width, size, max_size))
    if shape == [height, width]:
        return image, objects
    return functional.resize(image, shape, antialias=True), objects.resize(shape)


def resize_masks(masks: Tensor, shape: list[int]) -> Tensor:
    """Resize uint8 masks (n, H, W) to the height and width `shape`.

    Pixel i of the result is pixel floor(i * old / new) along each axis, as in PyTorch's mode "nearest", which rounds
    old / new to float32.
    """
    rows, columns = (np.arange(new) * old // new for new, old in zip(shape, masks.shape[1:], strict=True))
    pixels = masks.numpy()  # `np.take` needs less than half the time of `interpolate` on a CPU
    first, second = ((rows, 1), (columns, 2)) if shape[0] < masks.shape[1] else ((columns, 2), (rows, 1))
    return torch.from_numpy(pixels.take(first[0], axis=first[1]).take(second[0], axis=second[1]))


def resized_shape(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """Return the height and width after `resize`, with the rounding of the official code.

    For example, 427 x 640 becomes 800 x 1199 if `size` is 800 and `max_size` is 1333.

    Differs: a shorter side that would be rounded to 0 becomes one pixel; the official code raises an error.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
    shape = (size, int(size * long / short)) if size else (1, max_size or 1)
    return shape if height <= width else shape[::-1]


def random_size_crop(
    image: Tensor, objects: Objects, limits: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Objects]:
    """Crop a random window, clip the objects to it, and drop those whose boxes become empty.

    `limits` are the smallest and the largest side of the window, in pixels.

    Differs: a side that is shorter than the lower limit is not cropped; the official code raises an error.
    """
    full_height, full_width = image.shape[-2:]
    low, high = limits
    height, width = (_sample_integer(min(low, n), min(high, n), generator) for n in (full_height, full_width))
    top, left = _sample_integer(0, full_height - height, generator), _sample_integer(0, full_width - width, generator)
    image = functional.crop(image, top, left, height, width)
    image = image[None].contiguous(memory_format=torch.channels_last)[0]  # resizing a strided crop takes twice as long
    return image, objects.crop(top, left, height, width)


def _sample_integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _sample_choice(values: list[int], generator: torch.Generator) -> int:
    return values[_sample_integer(0, len(values) - 1, generator)]
