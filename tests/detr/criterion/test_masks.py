"""Mask losses against transformers and plain loops, in float64; an image alone against one in a padded batch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine.seeds import generator
from detr.criterion.answers import Matches, Targets
from detr.criterion.masks import Dice, MaskFocal, resize_logits
from detr.criterion.terms import Comparison

QUERIES, STRIDE = 5, 4


def scene(sizes: list[tuple[int, int]], counts: list[int]) -> tuple[dict[str, Tensor], Targets, Matches]:
    """Random logits at stride 4, masks padded to the largest size, and pairs of object i with query i."""
    rng = generator("mask losses", *map(str, sizes), *counts)
    shape = tuple(max(side) for side in zip(*sizes, strict=True))
    cells = tuple(math.ceil(side / STRIDE) for side in shape)
    logits = 3 * torch.randn(1, len(sizes), QUERIES, *cells, dtype=torch.float64, generator=rng)
    masks = torch.zeros(sum(counts), *shape, dtype=torch.bool)
    images = [image for image, count in enumerate(counts) for _ in range(count)]
    for mask, image in zip(masks, images, strict=True):
        height, width = sizes[image]
        mask[:height, :width] = torch.rand(height, width, generator=rng) > 0.6
    queries = [query for count in counts for query in range(count)]
    outputs = {"logits": torch.zeros(1, len(sizes), QUERIES, 2), "masks": logits.requires_grad_()}
    objects = Targets(
        counts,
        torch.zeros(len(masks), dtype=torch.long),
        torch.rand(len(masks), 4, generator=rng),
        masks=masks,
        sizes=torch.tensor(sizes),
    )
    pairs = Matches(*(torch.tensor(x, dtype=torch.long) for x in ([0] * len(masks), images, queries)),
                    torch.arange(len(masks)))  # fmt: skip
    return outputs, objects, pairs


def test_losses_and_gradients_are_those_of_transformers() -> None:
    from transformers.loss.loss_for_object_detection import dice_loss, sigmoid_focal_loss

    outputs, objects, pairs = scene([(33, 46)] * 3, [2, 0, 4])
    comparison = Comparison(outputs, objects, pairs)
    ours = torch.cat([MaskFocal(1.0)(comparison), Dice(1.0)(comparison)])
    predicted = outputs["masks"][pairs[:3]]
    predicted = F.interpolate(predicted[:, None], size=(33, 46), mode="bilinear", align_corners=False).flatten(1)
    truth = objects.masks.double().flatten(1)
    theirs = torch.stack([sigmoid_focal_loss(predicted, truth, 1), dice_loss(predicted, truth, 1)])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    direction = torch.tensor([1.0, 0.3], dtype=torch.float64)
    gradients = [torch.autograd.grad((loss * direction).sum(), outputs["masks"])[0] for loss in (ours, theirs)]
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


def test_the_losses_of_an_image_do_not_depend_on_its_batch() -> None:
    sizes, counts = [(17, 46), (33, 21), (40, 64)], [2, 1, 3]
    outputs, objects, pairs = scene(sizes, counts)
    together = [term(Comparison(outputs, objects, pairs)) for term in (MaskFocal(1.0), Dice(1.0))]
    alone = torch.zeros(2, dtype=torch.float64)
    start = 0
    for image, ((height, width), count) in enumerate(zip(sizes, counts, strict=True)):
        rows, columns = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
        for query in range(count):
            logits = outputs["masks"][0, image, query, :rows, :columns]
            predicted = F.interpolate(logits[None, None], size=(height, width), mode="bilinear")[0, 0]
            truth = objects.masks[start, :height, :width]
            alone += torch.stack([plain_focal(predicted, truth), plain_dice(predicted, truth)])
            start += 1
    torch.testing.assert_close(torch.cat(together), alone, rtol=1e-12, atol=0)


def plain_focal(logits: Tensor, truth: Tensor) -> Tensor:
    p = torch.where(truth, logits.sigmoid(), 1 - logits.sigmoid())
    return (torch.where(truth, 0.25, 0.75) * (1 - p) ** 2 * -p.log()).sum() / truth.numel()


def plain_dice(logits: Tensor, truth: Tensor) -> Tensor:
    p = logits.sigmoid()
    return 1 - (2 * p[truth].sum() + 1) / (p.sum() + truth.sum() + 1)


def test_a_perfect_mask_and_an_empty_prediction_of_an_empty_mask_have_no_dice_loss() -> None:
    outputs, objects, pairs = scene([(32, 32)], [2])
    objects.masks[0] = torch.zeros(32, 32, dtype=torch.bool)
    objects.masks[0, :16] = True
    objects.masks[1] = False
    logits = torch.full((1, 1, QUERIES, 8, 8), -1e3, dtype=torch.float64)
    logits[0, 0, 0, :4] = 1e3
    # The bilinear resampling blurs the edge by a row of probability 1/2 at most, of 512 pixels.
    loss = Dice(1.0)(Comparison({**outputs, "masks": logits}, objects, pairs))
    assert 0 <= loss.item() < 0.05


def test_images_without_objects_have_zero_loss_and_zero_gradients() -> None:
    outputs, objects, pairs = scene([(32, 32), (16, 32)], [0, 0])
    comparison = Comparison(outputs, objects, pairs)
    loss = torch.cat([MaskFocal(1.0)(comparison), Dice(1.0)(comparison)])
    assert loss.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(loss.sum(), outputs["masks"])
    assert not gradient.any()


@pytest.mark.parametrize(
    "shape, size", [((64, 64), (64, 64)), ((33, 21), (30, 21)), ((5, 9), (2, 3)), ((1, 1), (1, 1))]
)
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_logits_are_resampled_from_the_cells_that_are_not_padding(shape: Any, size: Any, stride: int) -> None:
    cells = [math.ceil(side / stride) for side in shape]
    logits = torch.randn(2, *cells, dtype=torch.float64, generator=generator("cells"))
    kept = [math.ceil(side / stride) for side in size]
    expected = F.interpolate(logits[None, :, : kept[0], : kept[1]], size=size, mode="bilinear")[0]
    torch.testing.assert_close(resize_logits(logits, shape, size), expected, rtol=0, atol=0)
