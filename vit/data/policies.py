"""RandAugment and TrivialAugment on a stack of images; each image gets its own random operations.

RandAugment: Cubuk et al. 2020 (arXiv 1909.13719). TrivialAugment: Müller and Hutter 2021 (arXiv 2103.10158). The
fourteen operations and their ranges are torchvision's. Images with the same operation and strength share one call of
torchvision's function.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

Policy = Literal["none", "rand", "trivial"]
MAGNITUDE_LEVELS = 31  # levels 0 to 30, as in both papers' code
MAX_OPERATIONS = 4  # maximum number of RandAugment's operations on one image


class Operation(NamedTuple):
    """An operation on images, and its greatest strength in each policy."""

    run: Callable[[Tensor, float], Tensor]  # images uint8 (n, C, H, W) and a strength -> images of the same shape
    rand: float  # greatest strength in RandAugment
    trivial: float  # greatest strength in TrivialAugment
    signed: bool  # whether the strength gets a random sign


def _shear(images: Tensor, across: float, down: float) -> Tensor:
    # The centre of the shear is the top left corner, so the first row or column stays in place, as in the papers' code.
    degrees = [math.degrees(math.atan(v)) for v in (across, down)]
    sheared: Tensor = functional.affine(images, 0.0, [0, 0], 1.0, degrees, center=[0, 0])
    return sheared


def _shift(images: Tensor, across: float, down: float) -> Tensor:
    pixels = [int(across * images.shape[-1]), int(down * images.shape[-2])]
    shifted: Tensor = functional.affine(images, 0.0, pixels, 1.0, [0.0, 0.0])
    return shifted


OPERATIONS: tuple[Operation, ...] = (
    Operation(lambda x, v: x, 0, 0, False),
    Operation(lambda x, v: _shear(x, v, 0), 0.3, 0.99, True),
    Operation(lambda x, v: _shear(x, 0, v), 0.3, 0.99, True),
    Operation(lambda x, v: _shift(x, v, 0), 150 / 331, 32 / 224, True),
    Operation(lambda x, v: _shift(x, 0, v), 150 / 331, 32 / 224, True),
    Operation(lambda x, v: functional.rotate(x, v), 30.0, 135.0, True),
    Operation(lambda x, v: functional.adjust_brightness(x, 1 + v), 0.9, 0.99, True),
    Operation(lambda x, v: functional.adjust_saturation(x, 1 + v), 0.9, 0.99, True),
    Operation(lambda x, v: functional.adjust_contrast(x, 1 + v), 0.9, 0.99, True),
    Operation(lambda x, v: functional.adjust_sharpness(x, 1 + v), 0.9, 0.99, True),
    Operation(lambda x, v: functional.posterize(x, 8 - round(v)), 4, 6, False),
    Operation(lambda x, v: functional.solarize(x, 255 * (1 - v)), 1.0, 1.0, False),
    Operation(lambda x, v: functional.autocontrast(x), 0, 0, False),
    Operation(lambda x, v: functional.equalize(x), 0, 0, False),
)


def apply(images: Tensor, numbers: np.ndarray, policy: Policy, operations: int, magnitude: int) -> Tensor:
    """Apply a policy to images uint8 (N, C, H, W); `numbers` (N, 3 * MAX_OPERATIONS) are uniform in [0, 1).

    "rand" applies `operations` random operations at the level `magnitude`, an integer from 0 to 30. "trivial" applies
    one random operation at a random level. "none" returns the images unchanged. The strength of an operation is its
    greatest strength times level / 30. Three of the numbers belong to each operation: they choose the operation
    itself, its level (only with "trivial") and its sign.

    Differs: TrivialAugment shifts images by up to 32 pixels. Here the greatest shift is 32/224 of the image's side,
    which is 32 pixels in an image of 224 pixels.
    """
    if policy == "none":
        return images
    greatest = np.array([getattr(operation, policy) for operation in OPERATIONS])
    signed = np.array([operation.signed for operation in OPERATIONS])
    for turn in range(operations if policy == "rand" else 1):
        which, level, sign = numbers[:, 3 * turn : 3 * turn + 3].T
        chosen = (which * len(OPERATIONS)).astype(np.int64)
        levels = magnitude if policy == "rand" else np.floor(level * MAGNITUDE_LEVELS)
        strengths = greatest[chosen] * levels / (MAGNITUDE_LEVELS - 1) * np.where(signed[chosen] & (sign < 0.5), -1, 1)
        images = _apply_operations(images, chosen, strengths)
    return images


def _apply_operations(images: Tensor, chosen: np.ndarray, strengths: np.ndarray) -> Tensor:
    """Apply one operation to each of the images (N, C, H, W).

    `chosen` (N,) holds the index in OPERATIONS of each image's operation, and `strengths` (N,) its strength. Images
    with the same operation and strength share one call.
    """
    result = images.clone()
    pairs, group = np.unique(np.stack((chosen, strengths), axis=1), axis=0, return_inverse=True)
    for number, (operation, strength) in enumerate(pairs.tolist()):
        rows = torch.from_numpy(np.flatnonzero(group.reshape(-1) == number)).to(images.device)
        result[rows] = OPERATIONS[int(operation)].run(images[rows], strength)
    return result
