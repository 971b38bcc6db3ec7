"""The augmentation of DETR's training (Carion et al. 2020, arXiv:2005.12872, appendix A.4), on uint8 tensors.

Every random choice is drawn from the generator that is handed in, so a sample is a function of (seed, epoch, index).
Boxes travel as `tv_tensors.BoundingBoxes` (xyxy, pixels of the image beside them) and move with the image.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from common.errors import UserError
from common.types import Positive


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to an image on its way to the network; all lengths in pixels.

    kind: "detr" flips, picks a size and, every other time, crops first; "flip" flips and picks a size; "none" treats
    training images as evaluated ones.
    """

    kind: Literal["detr", "flip", "none"]
    sizes: list[Positive]  # lengths of the shorter side to choose from in training
    eval_size: Positive  # the shorter side in evaluation
    max_size: Positive  # the longer side's limit, always
    middle_sizes: list[Positive]  # the shorter side before a crop
    crop: tuple[Positive, Positive]  # a crop's least and greatest side

    def __post_init__(self) -> None:
        """Refuse what a type cannot: nothing to choose from, and limits in the wrong order."""
        for name, values in (("sizes", self.sizes), ("middle_sizes", self.middle_sizes)):
            if not values:
                raise UserError(f"data.augmentation.{name}=[]: expected at least one size in pixels.")
        if self.crop[0] > self.crop[1]:
            raise UserError(f"data.augmentation.crop={list(self.crop)}: expected the least side first.")


def as_bounding_boxes(image: Tensor, boxes: Tensor) -> BoundingBoxes:
    """Boxes (n, 4) xyxy in pixels, tied to the size of `image` (3, H, W)."""
    size = (image.shape[-2], image.shape[-1])
    return BoundingBoxes(boxes.reshape(-1, 4), format=BoundingBoxFormat.XYXY, canvas_size=size)


def augment(
    image: Tensor, boxes: BoundingBoxes, labels: Tensor, options: Augmentation, generator: torch.Generator | None
) -> tuple[Tensor, BoundingBoxes, Tensor]:
    """Image uint8 (3, H, W), boxes (n, 4) and labels (n,) as the network sees them.

    With a generator as in training, without one as in evaluation. A crop may leave fewer boxes, or none.
    """
    if generator is None or options.kind == "none":
        return *resize(image, boxes, options.eval_size, options.max_size), labels
    if torch.rand((), generator=generator) < 0.5:
        image, boxes = functional.horizontal_flip(image), functional.horizontal_flip(boxes)
    if options.kind == "detr" and torch.rand((), generator=generator) < 0.5:
        # No limit on the longer side here, as in the reference.
        image, boxes = resize(image, boxes, _choice(options.middle_sizes, generator), None)
        image, boxes, labels = random_size_crop(image, boxes, labels, options.crop, generator)
    return *resize(image, boxes, _choice(options.sizes, generator), options.max_size), labels


def resize(image: Tensor, boxes: BoundingBoxes, size: int, max_size: int | None) -> tuple[Tensor, BoundingBoxes]:
    """Bring the shorter side of `image` (3, H, W) to `size` pixels, the longer one to at most `max_size`."""
    height, width = image.shape[-2:]
    new = list(resized_shape(height, width, size, max_size))
    if new == [height, width]:
        return image, boxes
    return functional.resize(image, new, antialias=True), functional.resize(boxes, new)


def resized_shape(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """Height and width after `resize`, with the reference's rounding (640 x 427 becomes 1199 x 800 for 800, 1333).

    Differs: a strip whose short side rounds to nothing keeps one pixel, where the reference raises.
    """
    short, long = min(height, width), max(height, width)
    if max_size is not None and long / short * size > max_size:
        size = round(max_size * short / long)
    shape = (size, int(size * long / short)) if size else (1, max_size or 1)
    return shape if height <= width else shape[::-1]


def random_size_crop(
    image: Tensor, boxes: BoundingBoxes, labels: Tensor, limits: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, BoundingBoxes, Tensor]:
    """Cut out a window whose sides lie within `limits` pixels, anywhere; boxes are clipped and empty ones dropped.

    Differs: a side shorter than the lower limit is kept whole, where the reference raises.
    """
    full_height, full_width = image.shape[-2:]
    height, width = (_between(min(limits[0], n), min(limits[1], n), generator) for n in (full_height, full_width))
    top, left = _between(0, full_height - height, generator), _between(0, full_width - width, generator)
    image = functional.crop(image, top, left, height, width)
    image = image[None].contiguous(memory_format=torch.channels_last)[0]  # a view of rows resizes twice as slowly
    boxes = functional.clamp_bounding_boxes(functional.crop(boxes, top, left, height, width))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return image, as_bounding_boxes(image, boxes[kept]), labels[kept]


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _choice(values: list[int], generator: torch.Generator) -> int:
    return values[_between(0, len(values) - 1, generator)]
