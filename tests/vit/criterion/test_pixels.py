"""The losses of image GPT, worked out by hand."""

import math

import pytest
import torch

from common.errors import UserError
from vit.criterion.pixels import PixelLossOptions, masked_means, pixel_nats, sample_masks


def test_nats_are_minus_the_log_probabilities_of_the_colours() -> None:
    """Probabilities 1/2, 1/4, 1/4: colour 0 has ln 2, colour 2 ln 4."""
    logits = torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]]).log()
    nats = pixel_nats(logits, torch.tensor([[0, 2]]))
    torch.testing.assert_close(nats, torch.tensor([[math.log(2), math.log(4)]]))
    assert pixel_nats(logits.bfloat16(), torch.tensor([[0, 2]])).dtype == torch.float32


def test_masked_pixels_are_averaged_per_image() -> None:
    """The first image: (1 + 3) / 2 = 2; the second: 6; the third has no masked pixel."""
    nats = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    masked = torch.tensor([[True, False, True], [False, False, True], [False, False, False]])
    assert masked_means(nats, masked).tolist() == [2.0, 6.0, 0.0]


def test_a_mask_depends_on_its_own_seed_alone_and_has_the_probability() -> None:
    together, alone = sample_masks([5, 6, 7], 10_000, 0.15), sample_masks([6], 10_000, 0.15)
    assert torch.equal(together[1], alone[0]) and not torch.equal(together[0], together[1])
    # A standard error of 0.0021 for 30,000 pixels.
    assert float(together.float().mean()) == pytest.approx(0.15, abs=0.01)


def test_a_loss_without_any_weight_is_refused() -> None:
    options = {"objective": "autoregressive", "masked": 0.15, "smoothing": 0.0}
    with pytest.raises(UserError, match=r"task.loss.generation=0 and task.loss.classification=0 leave no loss"):
        PixelLossOptions(**options, generation=0.0, classification=0.0)
    assert PixelLossOptions(**options, generation=0.0, classification=1.0).classification
