"""The loss of prompted masks against plain loops, and what it may depend on."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from detr.criterion.prompted_masks import MaskLossOptions, ious, mask_losses

OPTIONS = MaskLossOptions(
    focal_weight=20.0, dice_weight=1.0, iou_weight=1.0, focal_alpha=0.25, focal_gamma=2.0, others=0.0
)


def inputs(count: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = generator("masks")
    logits = 3 * torch.randn(count, 3, 5, 5, generator=rng, dtype=torch.float64)
    targets = torch.rand(count, 5, 5, generator=rng) < 0.4
    real = torch.ones(count, 5, 5, dtype=torch.bool)
    real[1, :, 3:] = real[2, 4:] = False
    return logits, torch.rand(count, 3, generator=rng, dtype=torch.float64), targets & real, real


def plain(logits: Tensor, target: Tensor, real: Tensor) -> tuple[float, float, float]:
    """Focal, dice and IoU of one mask, cell by cell."""
    focal, both, predicted, objects, cells, inside, either = 0.0, 0.0, 0.0, 0, 0, 0, 0
    for y in range(5):
        for x in range(5):
            if not real[y, x]:
                continue
            p, t = 1 / (1 + math.exp(-float(logits[y, x]))), bool(target[y, x])
            right = p if t else 1 - p
            focal += (0.25 if t else 0.75) * (1 - right) ** 2 * -math.log(right)
            both, predicted, objects = both + p * t, predicted + p, objects + t
            inside, either = inside + (p > 0.5 and t), either + (p > 0.5 or t)
            cells += 1
    return focal / cells, 1 - (2 * both + 1) / (predicted + objects + 1), inside / either


def test_the_terms_equal_plain_loops_over_the_cells_of_the_image() -> None:
    logits, predicted, targets, real = inputs()
    losses = mask_losses(logits, predicted, targets, real, OPTIONS)
    for i in range(len(logits)):
        masks = [plain(logits[i, k], targets[i], real[i]) for k in range(3)]
        best = min(masks, key=lambda terms: 20 * terms[0] + terms[1])
        assert float(losses.focal[i]) == pytest.approx(best[0], rel=1e-12)  # fp64
        assert float(losses.dice[i]) == pytest.approx(best[1], rel=1e-12)
        errors = [(float(predicted[i, k]) - masks[k][2]) ** 2 for k in range(3)]
        assert float(losses.iou[i]) == pytest.approx(sum(errors) / 3, rel=1e-6)  # IoUs are fp32


def test_only_the_mask_with_the_lowest_loss_is_trained() -> None:
    logits, predicted, targets, real = inputs()
    logits[:, 1] = 8 * targets.double() - 4
    logits.requires_grad_()
    losses = mask_losses(logits, predicted, targets, real, OPTIONS)
    (losses.focal.sum() + losses.dice.sum()).backward()
    assert logits.grad is not None and logits.grad[:, 1].any() and not logits.grad[:, [0, 2]].any()


def test_the_other_masks_share_their_weight() -> None:
    logits, predicted, targets, real = inputs()
    losses = mask_losses(logits, predicted, targets, real, replace(OPTIONS, others=0.3))
    for i in range(len(logits)):
        terms = sorted((plain(logits[i, k], targets[i], real[i]) for k in range(3)), key=lambda t: 20 * t[0] + t[1])
        expected = 0.7 * terms[0][1] + 0.15 * (terms[1][1] + terms[2][1])
        assert float(losses.dice[i]) == pytest.approx(expected, rel=1e-6)  # the weights are fp32
    single = mask_losses(logits[:, :1], predicted[:, :1], targets, real, replace(OPTIONS, others=0.3))
    assert float(single.dice[0]) == pytest.approx(plain(logits[0, 0], targets[0], real[0])[1], rel=1e-12)


def test_padding_changes_nothing() -> None:
    logits, predicted, targets, real = inputs()
    changed = torch.where(real[:, None], logits, 100.0)
    for a, b in zip(
        mask_losses(logits, predicted, targets, real, OPTIONS),
        mask_losses(changed, predicted, targets, real, OPTIONS),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_prompt_does_not_depend_on_the_others() -> None:
    logits, predicted, targets, real = inputs()
    together = mask_losses(logits, predicted, targets, real, OPTIONS)
    for i in range(len(logits)):
        rows = slice(i, i + 1)
        alone = mask_losses(logits[rows], predicted[rows], targets[rows], real[rows], OPTIONS)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[rows], b, rtol=1e-12, atol=0)


def test_a_perfect_mask_has_an_iou_of_one_and_an_empty_one_of_zero() -> None:
    _, _, targets, real = inputs()
    masks = torch.stack((targets, torch.zeros_like(targets)), dim=1)
    assert ious(masks, targets, real).tolist() == [[1.0, 0.0]] * len(targets)
