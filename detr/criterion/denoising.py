"""Denoising queries: noisy copies of an image's objects, which the decoder learns to restore.

Li et al. 2022, "DN-DETR", arXiv 2203.01305, section 4; contrastive: Zhang et al. 2022, "DINO", arXiv 2203.03605,
section 3.3.

Differs: The number of groups depends on an image's own objects, and the noise on its seed, so an image's queries do not
depend on its batch. In the official programs, the batch's largest number of objects decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.machine.seeds import generator
from common.types import Count, Fraction, NonNegativeFloat
from detr.criterion.answers import Matches, Targets
from detr.criterion.boxes import to_cxcywh, to_xyxy


@dataclass(frozen=True, kw_only=True)
class DenoisingOptions:
    """The noise, and the number of denoising queries.

    number: number of copies of objects in an image, in groups with one copy of each object; at least one group. 0 = no
        denoising queries.
    contrastive: whether each group also has a negative copy of each object, farther from it, that must be recognised
        as no object.
    label_noise: probability that the label of a copy is replaced by a random one.
    box_noise: how far a positive copy's box moves at most. With `contrastive`, its corners move by up to this multiple
        of half the box's sides, and those of negatives by up to twice as much; otherwise, its centre moves by up to
        this multiple of half the sides, and its sides change by up to this fraction.
    """

    number: Count
    contrastive: bool
    label_noise: Fraction
    box_noise: NonNegativeFloat

    def groups(self, count: int) -> int:
        """Return the number of groups for an image with `count` objects."""
        return max(1, self.number // count) if self.number and count else 0

    def rows(self, count: int) -> int:
        """Return the number of denoising queries for an image with `count` objects."""
        return self.groups(count) * count * (2 if self.contrastive else 1)


def denoising_queries(
    options: DenoisingOptions, targets: Targets, seeds: Sequence[int], classes: int
) -> tuple[dict[str, Tensor], Matches] | None:
    """Build denoising queries; returns the hints for the model, and the matches of positive copies with objects.

    Image i has `options.rows(n_i)` queries for its n_i objects, and D is the largest such number. The hints are labels
    (B, D), boxes (B, D, 4) cxcywh relative to the image, real (B, D), False in padding, and groups (B, D), the number
    of a query's group. `seeds` holds a seed for each image, and `classes` is the number of classes.
    """
    counts = targets.counts
    rows = max((options.rows(count) for count in counts), default=0)
    if not rows:
        return None
    like, shape = targets.boxes, (len(counts), rows)
    hints = {
        "labels": torch.zeros(shape, dtype=torch.int64),
        "boxes": torch.full((*shape, 4), 0.5, dtype=like.dtype),
        "real": torch.zeros(shape, dtype=torch.bool),
        "groups": torch.full(shape, -1),
    }
    pairs, start = [], 0
    labels, boxes = targets.labels.cpu(), like.detach().cpu()
    for image, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        if number := options.rows(count):
            objects = torch.arange(count).repeat(number // count)  # (D_i,) positives, negatives, positives, ...
            copies = torch.arange(number) // count  # (D_i,)
            negative = copies % 2 == 1 if options.contrastive else torch.zeros(number, dtype=torch.bool)
            own = labels[start : start + count][objects], boxes[start : start + count][objects]
            hints["labels"][image, :number], hints["boxes"][image, :number] = _noisy(
                options, *own, negative, seed, classes
            )
            hints["real"][image, :number] = True
            hints["groups"][image, :number] = copies // 2 if options.contrastive else copies
            positive = (~negative).nonzero()[:, 0]
            pairs.append(torch.stack((torch.full_like(positive, image), positive, start + objects[positive])))
        start += count
    images, queries, matched = torch.cat(pairs, 1).to(like.device)
    hints = {name: value.to(like.device) for name, value in hints.items()}
    return hints, Matches(torch.zeros_like(images), images, queries, matched)


def _noisy(
    options: DenoisingOptions, labels: Tensor, boxes: Tensor, negative: Tensor, seed: int, classes: int
) -> tuple[Tensor, Tensor]:
    """Add noise to labels (D,) and boxes (D, 4) cxcywh; returns both, with corners within the image if contrastive."""
    rng = generator(seed, "denoising")
    replaced = torch.rand(len(labels), generator=rng) < options.label_noise
    labels = torch.where(replaced, torch.randint(classes, labels.shape, generator=rng), labels)
    amount = torch.rand(boxes.shape, generator=rng, dtype=torch.float32).to(boxes.dtype)  # (D, 4) in [0, 1)
    sign = torch.randint(2, boxes.shape, generator=rng).to(boxes.dtype) * 2 - 1
    half = boxes[:, 2:].repeat(1, 2) / 2  # (D, 4) half width and height, twice
    if options.contrastive:
        shift = sign * (amount + negative[:, None]) * half * options.box_noise
        return labels, to_cxcywh((to_xyxy(boxes) + shift).clamp(0, 1))
    extent = half * half.new_tensor([1.0, 1.0, 2.0, 2.0])  # the centre moves by half a side, a side changes by itself
    return labels, (boxes + sign * amount * extent * options.box_noise).clamp(0, 1)
