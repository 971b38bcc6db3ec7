"""The augmentation of LSTR's training: rotation, flip, crop, resizing and colours, of an image and the points of lanes.

Liu et al. 2021, arXiv 2011.04233, section 4.1, and the official code. Positions are continuous: the pixel (i, j) covers
the square from (i, j) to (i + 1, j + 1). Every random choice is sampled from the argument `generator`.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from common.types import Fraction, Range


@dataclass(frozen=True, kw_only=True)
class LaneAugmentation:
    """The options of the augmentation of training images; images for evaluation are only resized.

    share: share of the images that are augmented; 10/11 in the official code.
    rotation: largest angle of a rotation about the centre, in degrees.
    flip: probability of a horizontal flip.
    crop: sides of the random crop, as a fraction of the image's sides.
    colour: largest relative change of brightness, contrast and saturation.
    """

    share: Fraction
    rotation: Annotated[float, Range(low=0.0, high=90.0)]
    flip: Fraction
    crop: Annotated[float, Range(above=0.0, high=1.0)]
    colour: Annotated[float, Range(low=0.0, high=0.9)]


def augment(
    image: Tensor,
    points: Tensor,
    valid: Tensor,
    size: tuple[int, int],
    options: LaneAugmentation,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Augment image uint8 (3, H, W) and points (n, P, 2), in pixels; without a generator, only resize.

    `valid` (n, P) is False where a lane has no point. Returns the image with the height and width `size`, its points,
    and `valid`, which is also False for points outside. Lanes with fewer than two points are dropped.
    """
    if generator is not None and torch.rand((), generator=generator) < options.share:
        image, points = _rotate(image, points, _uniform(options.rotation, generator))
        if torch.rand((), generator=generator) < options.flip:
            image, points = flip(image, points)
        image, points = _crop(image, points, options.crop, generator)
        image = _recolour(image, options.colour, generator)
    height, width = image.shape[-2:]
    inside = ((points >= 0) & (points <= points.new_tensor([width, height]))).all(-1)  # (n, P)
    valid = valid & inside
    kept = valid.sum(-1) >= 2
    if (height, width) != size:
        image = functional.resize(image, list(size), antialias=True)
        points = points * points.new_tensor([size[1] / width, size[0] / height])
    return image, points[kept], valid[kept]


def flip(image: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Flip an image (3, H, W) and points (n, P, 2) horizontally."""
    return functional.horizontal_flip(image), torch.stack((image.shape[-1] - points[..., 0], points[..., 1]), -1)


def _rotate(image: Tensor, points: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Rotate counter-clockwise about the centre; the size is unchanged, and corners without a pixel are black."""
    if not degrees:
        return image, points
    image = functional.rotate(image, degrees, interpolation=InterpolationMode.BILINEAR)
    centre = points.new_tensor([image.shape[-1] / 2, image.shape[-2] / 2])
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = points.new_tensor([[cosine, -sine], [sine, cosine]])  # of row vectors, because y points down
    return image, (points - centre) @ turn + centre


def _crop(image: Tensor, points: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crop a random window whose sides are `fraction` of the image's."""
    height, width = (max(1, round(side * fraction)) for side in image.shape[-2:])
    top, left = (
        int(torch.randint(0, side - cropped + 1, (), generator=generator))
        for side, cropped in zip(image.shape[-2:], (height, width), strict=True)
    )
    return functional.crop(image, top, left, height, width), points - points.new_tensor([left, top])


def _recolour(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change brightness, contrast and saturation by random factors from 1 - `strength` to 1 + `strength`."""
    if not strength:
        return image
    for adjust in (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation):
        image = adjust(image, 1 + _uniform(strength, generator))
    return image


def _uniform(limit: float, generator: torch.Generator) -> float:
    """Sample a number from -`limit` to `limit`."""
    return limit * (2 * float(torch.rand((), generator=generator)) - 1)
