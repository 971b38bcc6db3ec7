"""RandAugment and TrivialAugment on a stack of images, each image with its own operations.

Cubuk et al. 2020 (arXiv 1909.13719) and Müller and Hutter 2021 (arXiv 2103.10158), with the fourteen operations and the
ranges of torchvision, whose functions do the work: images that drew the same operation at the same strength go through
it together.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

Policy = Literal["none", "rand", "trivial"]
LEVELS = 31  # strengths of an operation, 0 to 30
MOST = 4  # operations on one image


class Operation(NamedTuple):
    """What it does, given a strength; the greatest strength in either policy; whether its sign is drawn, too."""

    run: Callable[[Tensor, float], Tensor]
    rand: float
    trivial: float
    signed: bool


def _affine(images: Tensor, *, angle: float = 0.0, move: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Tensor:
    shift, degrees = [int(v) for v in move], [float(np.degrees(np.arctan(v))) for v in shear]
    # Shears keep the first row and column in place, as in the papers' code.
    centre = [0, 0] if any(shear) else None
    return functional.affine(images, angle, shift, 1.0, degrees, center=centre)


def _part(images: Tensor, share: float, axis: int) -> float:
    return share * images.shape[axis]


OPERATIONS: tuple[Operation, ...] = (
    Operation(lambda x, v: x, 0, 0, False),
    Operation(lambda x, v: _affine(x, shear=(v, 0)), 0.3, 0.99, True),
    Operation(lambda x, v: _affine(x, shear=(0, v)), 0.3, 0.99, True),
    Operation(lambda x, v: _affine(x, move=(_part(x, v, -1), 0)), 150 / 331, 32 / 224, True),
    Operation(lambda x, v: _affine(x, move=(0, _part(x, v, -2))), 150 / 331, 32 / 224, True),
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
    """Images uint8 (N, C, H, W) after their policy; numbers (N, 3 * MOST) uniform in [0, 1).

    "rand" does `operations` of them at strength `magnitude`, "trivial" one at any strength. TrivialAugment's shift of 32
    pixels is taken as of images of 224, so that it means the same for small ones.
    """
    if policy == "none":
        return images
    for turn in range(operations if policy == "rand" else 1):
        choice, strength, sign = numbers[:, 3 * turn : 3 * turn + 3].T
        chosen = (choice * len(OPERATIONS)).astype(np.int64)
        levels = np.full_like(chosen, magnitude) if policy == "rand" else (strength * LEVELS).astype(np.int64)
        images = _grouped(images, np.stack((chosen, levels, sign < 0.5), axis=1), policy)
    return images


def _grouped(images: Tensor, keys: np.ndarray, policy: Policy) -> Tensor:
    """Each image through the operation, level and sign of its key (N, 3); equal keys go together."""
    keys = keys * [[1, 0 if op.rand == op.trivial == 0 else 1, int(op.signed)] for op in (OPERATIONS[i] for i in keys[:, 0])]
    result = images.clone()
    kinds, group = np.unique(keys, axis=0, return_inverse=True)
    for number, (chosen, level, negative) in enumerate(kinds.tolist()):
        operation = OPERATIONS[chosen]
        strength = (operation.rand if policy == "rand" else operation.trivial) * level / (LEVELS - 1)
        rows = torch.from_numpy(np.flatnonzero(group.reshape(-1) == number)).to(images.device)
        result[rows] = operation.run(images[rows], -strength if negative else strength)
    return result
