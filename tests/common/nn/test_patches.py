"""Patches against the paper's text written out pixel by pixel, and both forms against each other."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.patches import Form, Patches

EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of a few dozen terms of size one
FORMS: list[Form] = ["convolution", "multiply"]


def patches(form: Form, *, channels: int = 3, size: int = 4, width: int = 5) -> Patches:
    """The same weights for any form, the bias drawn too."""
    module = Patches(channels=channels, size=size, width=width, form=form).double()
    drawn = generator("patches", channels)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=drawn)
    return module


def images(height: int, width: int, channels: int = 3) -> Tensor:
    drawn = generator("images", height, width)
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=drawn)


def plain(images: Tensor, module: Patches) -> Tensor:
    """Equation 1: each square as one vector times E, squares from the top left, row by row."""
    p = module.size
    tokens = []
    for row in range(images.shape[2] // p):
        for column in range(images.shape[3] // p):
            square = images[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append((square[:, None] * module.weight).sum(dim=(2, 3, 4)) + module.bias)
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (12, 4), (4, 4), (16, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_are_the_papers_row_by_row(form: Form, height: int, width: int, channels: int) -> None:
    module, pixels = patches(form, channels=channels), images(height, width, channels)
    assert module.grid(height, width) == (height // 4, width // 4)
    torch.testing.assert_close(module(pixels), plain(pixels, module), **EXACT)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_cut_and_multiply_is_the_convolution_in_values_and_gradients(size: int) -> None:
    results = []
    for form in FORMS:
        module, pixels = patches(form, size=size), images(2 * size, 5 * size).requires_grad_()
        y = module(pixels)
        direction = torch.randn(y.shape, dtype=y.dtype, generator=generator("direction"))
        results.append([y, *torch.autograd.grad(y, [pixels, *module.parameters()], direction)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_both_forms_load_a_convolutions_own_tensors() -> None:
    convolution = nn.Conv2d(3, 5, 4, stride=4).double()
    pixels = images(8, 12)
    expected = convolution(pixels).flatten(2).mT
    for form in FORMS:
        module = Patches(channels=3, size=4, width=5, form=form).double()
        module.load_state_dict(convolution.state_dict())
        torch.testing.assert_close(module(pixels), expected, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_any_memory_layout_gives_the_same(form: Form) -> None:
    module, pixels = patches(form), images(8, 12)
    for other in (pixels.to(memory_format=torch.channels_last), pixels.mT.contiguous().mT):
        torch.testing.assert_close(module(other), module(pixels), **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("height", "width", "near"),
    [
        (30, 30, "28 x 28 or 32 x 32"),
        (28, 30, "28 x 28 or 28 x 32"),
        (30, 28, "28 x 28 or 32 x 28"),
        (3, 30, "4 x 28 or 4 x 32"),
        (2, 3, "4 x 4"),
        (3, 8, "4 x 8"),
    ],
)
def test_an_image_that_squares_do_not_fill_is_refused_with_sizes_that_fit(
    form: Form, height: int, width: int, near: str
) -> None:
    module = patches(form)
    with pytest.raises(UserError) as caught:
        module(torch.zeros(1, 3, height, width, dtype=torch.float64))
    assert str(caught.value) == (
        f"Images of {height} x {width} pixels cannot be split into patches of 4 x 4: both sides must be multiples of "
        f"4, such as {near}; change data.image_size or model.patch_size."
    )
    for named in near.split(" or "):
        module.grid(*map(int, named.split(" x ")))


def test_weights_start_as_the_authors_truncated_normal() -> None:
    """LeCun's: a deviation of 1 / sqrt(inputs) after a normal was cut at two of its own deviations."""
    torch.manual_seed(0)
    module = Patches(channels=3, size=4, width=1000, form="convolution")
    inputs = 3 * 4 * 4
    before = 1 / math.sqrt(inputs) / stats.truncnorm(-2, 2).std()
    values = module.weight.detach().flatten().double()
    # 48,000 draws: the deviation is known to one part in 440 (two deviations: half a percent).
    assert values.std().item() == pytest.approx(1 / math.sqrt(inputs), rel=0.01)
    assert abs(values.mean().item()) < 4 / math.sqrt(inputs * len(values))
    assert values.abs().max().item() == pytest.approx(2 * before, rel=0.001), "cut, and drawn up to the cut"
    assert stats.kstest(values[:5000].numpy() / before, stats.truncnorm(-2, 2).cdf).pvalue > 0.01
    assert not module.bias.any()
