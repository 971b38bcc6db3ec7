"""Simulated prompts (Kirillov et al. 2023, arXiv 2304.02643, appendix A): random in training, central in evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.machine.device import constant
from common.machine.seeds import generator
from common.types import Fraction, NonNegativeFloat, Positive

# Labels of points, as the model reads them. PADDING is a point that does not exist.
BACKGROUND, OBJECT, TOP_LEFT, BOTTOM_RIGHT, PADDING = 0, 1, 2, 3, -2


@dataclass(frozen=True, kw_only=True)
class PromptingOptions:
    """How objects are prompted in training.

    objects: at most this number of objects of an image is prompted in a step, chosen at random.
    rounds: prompts of an object in a step; each after the first adds a click where the mask before it was wrong.
    boxes: probability that the first prompt is a box and not a point.
    jitter: standard deviation of the noise on each coordinate of a box, as a fraction of the box's side.
    max_jitter: limit of this noise in pixels of the resized image.
    """

    objects: Positive
    rounds: Positive
    boxes: Fraction
    jitter: NonNegativeFloat
    max_jitter: NonNegativeFloat


class Sampled(NamedTuple):
    """The N objects of a batch that are prompted, and the random numbers for their prompts."""

    images: Tensor  # (N,) int64, index of each object's image in the batch
    objects: Tensor  # (N,) int64, index of each object among all objects of the batch
    uniforms: Tensor  # (N, 1 + rounds) in [0, 1): for the choice of a box, and for the position of each click
    normals: Tensor  # (N, 4) for the noise of boxes


def sample_objects(options: PromptingOptions, counts: Sequence[int], seeds: Sequence[int], like: Tensor) -> Sampled:
    """Choose the objects of each image that are prompted, on the device of `like`.

    `counts` are the images' numbers of objects. What is sampled for an image is a function of its seed and count.
    """
    images, objects, uniforms, normals, start = [], [], [], [], 0
    for image, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        rng = generator(seed, "prompts")
        chosen = torch.randperm(count, generator=rng)[: options.objects]
        images += [image] * len(chosen)
        objects.append(start + chosen)
        uniforms.append(torch.rand(options.objects, 1 + options.rounds, generator=rng)[: len(chosen)])
        normals.append(torch.randn(options.objects, 4, generator=rng)[: len(chosen)])
        start += count
    parts = (torch.tensor(images, dtype=torch.int64), *map(torch.cat, (objects, uniforms, normals)))
    return Sampled(*(part.to(like.device, non_blocking=True) for part in parts))


def first_prompts(
    options: PromptingOptions, sampled: Sampled, targets: Tensor, sizes: Tensor, cell: float
) -> dict[str, Tensor]:
    """Sample the first prompt of each object: a point in it, or the box around it with noise.

    Args:
        options: probabilities and noise.
        sampled: the objects and their random numbers.
        targets: (N, M, M) boolean masks of the objects on the map.
        sizes: (B, 2) heights and widths of the images without padding.
        cell: side of a cell of the map in pixels.

    Returns a dict with `image`, `points` (N, 2, 2) and `labels` (N, 2), as the model reads them. The second row of a
    point is padding.
    """
    point = to_position(sample_cells(targets, sampled.uniforms[:, 1]), targets.shape[-1], cell)  # (N, 2)
    limits = sizes[sampled.images].flip(1).repeat(1, 2) - 1.0  # (N, 4) as x y x y
    boxes = _noisy(boxes_of(targets, cell), sampled.normals, options).clamp(min=0).minimum(limits)
    is_box = (sampled.uniforms[:, 0] < options.boxes)[:, None]  # (N, 1)
    points = torch.where(is_box, boxes, torch.cat((point, torch.zeros_like(point)), 1)).unflatten(1, (2, 2))
    corner = constant([TOP_LEFT, BOTTOM_RIGHT], like=targets)
    labels = torch.where(is_box, corner, constant([OBJECT, PADDING], like=targets))
    return {"image": sampled.images, "points": points, "labels": labels}


def add_clicks(
    prompts: dict[str, Tensor], masks: Tensor, targets: Tensor, real: Tensor, uniforms: Tensor, cell: float
) -> dict[str, Tensor]:
    """Add to each prompt a click at a random cell where its mask is wrong, or in the object if it is right everywhere.

    `masks`, `targets` and `real` are boolean (N, M, M); padding, where `real` is False, is never wrong. `uniforms` (N,)
    choose the cells. The click is of the object if the cell is the object's, and otherwise of the background.
    """
    wrong = (masks != targets) & real
    region = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, targets)
    cells = sample_cells(region, uniforms)  # (N,)
    label = targets.flatten(1).gather(1, cells[:, None]).long()  # (N, 1): OBJECT or BACKGROUND
    position = to_position(cells, targets.shape[-1], cell)[:, None]
    points = torch.cat((prompts["points"], position), 1)
    return {**prompts, "points": points, "labels": torch.cat((prompts["labels"], label), 1)}


def sample_cells(regions: Tensor, uniforms: Tensor) -> Tensor:
    """Choose a True cell of each region: boolean (N, M, M) and numbers (N,) in [0, 1) -> indices (N,) in M^2."""
    counts = regions.flatten(1).cumsum(1)  # (N, M^2)
    ranks = (uniforms * counts[:, -1]).long() + 1  # counted from 1, row by row
    return torch.searchsorted(counts, ranks[:, None])[:, 0].clamp(max=counts.shape[1] - 1)


def to_position(cells: Tensor, side: int, cell: float) -> Tensor:
    """Convert indices of cells (N,) to x and y (N, 2) of their centres; the centre of the first pixel is (0, 0)."""
    return (torch.stack((cells % side, cells // side), dim=1) + 0.5) * cell - 0.5


def boxes_of(masks: Tensor, cell: float) -> Tensor:
    """Return the boxes around masks that are not empty: boolean (N, M, M) -> (N, 4) xyxy in pixels."""
    sides = []
    for axis in (1, 2):  # columns, which give x, then rows
        present = masks.any(axis).float()  # (N, M)
        sides.append((present.argmax(1), present.shape[1] - present.flip(1).argmax(1)))
    (left, right), (top, bottom) = sides
    return torch.stack((left, top, right, bottom), dim=1) * float(cell)


def _noisy(boxes: Tensor, normals: Tensor, options: PromptingOptions) -> Tensor:
    lengths = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # (N, 4) width, height, width, height
    noise = (options.jitter * lengths * normals).clamp(-options.max_jitter, options.max_jitter)
    corners: Tensor = (boxes + noise).unflatten(1, (2, 2)).sort(dim=1).values  # noise may swap the sides of a thin box
    return corners.flatten(1)


def centre_of_error(mask: NDArray[np.bool_], target: NDArray[np.bool_]) -> tuple[int, int, int] | None:
    """Return the next click of an evaluation: x, y in pixels, and its label; None if there is no error.

    Both masks are (H, W). The click is the pixel that is farthest from the edge of the region of missing or surplus
    pixels in which it lies, that is, the centre of the largest circle in such a region. The border of the image counts
    as an edge.
    """
    from scipy import ndimage  # slow to import

    best: tuple[float, Any, int] = (0.0, 0, OBJECT)
    for region, label in ((target & ~mask, OBJECT), (mask & ~target, BACKGROUND)):
        distances = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        if distances.max() > best[0]:
            best = (float(distances.max()), distances.argmax(), label)
    distance, index, label = best
    return (int(index % mask.shape[1]), int(index // mask.shape[1]), label) if distance else None
