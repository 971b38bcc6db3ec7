"""Patches against the paper's equation, patch by patch, and both forms against each other."""

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
    """Patches with the same random weight and bias for both forms."""
    module = Patches(channels=channels, size=size, width=width, form=form).double()
    rng = generator("patches", channels)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=rng)
    return module


def images(height: int, width: int, channels: int = 3) -> Tensor:
    rng = generator("images", height, width)
    return torch.randn(2, channels, height, width, dtype=torch.float64, generator=rng)


def plain(images: Tensor, module: Patches) -> Tensor:
    """Equation 1: each patch as one vector times E, patches from the top left, row by row."""
    p = module.size
    tokens = []
    for row in range(images.shape[2] // p):
        for column in range(images.shape[3] // p):
            patch = images[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append((patch[:, None] * module.weight).sum(dim=(2, 3, 4)) + module.bias)
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12), (12, 4), (4, 4), (16, 20)])
@pytest.mark.parametrize("channels", [1, 3])
def test_tokens_are_the_papers_row_by_row(form: Form, height: int, width: int, channels: int) -> None:
    module, pixels = patches(form, channels=channels), images(height, width, channels)
    assert module.grid(height, width) == (height // 4, width // 4)
    torch.testing.assert_close(module(pixels), plain(pixels, module), **EXACT)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_both_forms_have_the_same_values_and_gradients(size: int) -> None:
    results = []
    for form in FORMS:
        module, pixels = patches(form, size=size), images(2 * size, 5 * size).requires_grad_()
        y = module(pixels)
        direction = torch.randn(y.shape, dtype=y.dtype, generator=generator("direction"))
        results.append([y, *torch.autograd.grad(y, [pixels, *module.parameters()], direction)])
    for by_convolution, by_multiplication in zip(*results, strict=True):
        torch.testing.assert_close(by_convolution, by_multiplication, **EXACT)


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
    for strided in (pixels.to(memory_format=torch.channels_last), pixels.mT.contiguous().mT):
        torch.testing.assert_close(module(strided), module(pixels), **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("height", "width", "suitable"),
    [
        (30, 30, "28 x 28 or 32 x 32"),
        (28, 30, "28 x 28 or 28 x 32"),
        (30, 28, "28 x 28 or 32 x 28"),
        (3, 30, "4 x 28 or 4 x 32"),
        (2, 3, "4 x 4"),
        (3, 8, "4 x 8"),
    ],
)
def test_an_image_that_patches_do_not_fill_is_refused_with_sizes_that_fit(
    form: Form, height: int, width: int, suitable: str
) -> None:
    module = patches(form)
    with pytest.raises(UserError) as caught:
        module(torch.zeros(1, 3, height, width, dtype=torch.float64))
    assert str(caught.value) == (
        f"Images of {height} x {width} pixels cannot be split into patches of 4 x 4: both sides must be multiples of "
        f"4, such as {suitable}; change data.image_size or model.patch_size."
    )
    for size in suitable.split(" or "):
        module.grid(*map(int, size.split(" x ")))


def test_weights_start_as_the_authors_truncated_normal() -> None:
    """LeCun's: a standard deviation of 1 / sqrt(inputs) after truncation at two standard deviations of the normal."""
    torch.manual_seed(0)
    module = Patches(channels=3, size=4, width=1000, form="convolution")
    inputs = 3 * 4 * 4
    untruncated_std = 1 / math.sqrt(inputs) / stats.truncnorm(-2, 2).std()
    values = module.weight.detach().flatten().double()
    # 48,000 samples: the standard error of the deviation is 1/440 of it, and two of these are half a percent.
    assert values.std().item() == pytest.approx(1 / math.sqrt(inputs), rel=0.01)
    assert abs(values.mean().item()) < 4 / math.sqrt(inputs * len(values))
    assert values.abs().max().item() == pytest.approx(2 * untruncated_std, rel=0.001), "values reach the truncation"
    assert stats.kstest(values[:5000].numpy() / untruncated_std, stats.truncnorm(-2, 2).cdf).pvalue > 0.01
    assert not module.bias.any()
