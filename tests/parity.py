"""For tests of models of images: resampled parameters, random images, and gradients by every parameter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.machine.seeds import generator


def randomised(module: nn.Module, seed: int = 0, std: float | Callable[[str, Tensor], float] = 0.5) -> Any:
    """The module with all parameters sampled: initial zeros or ones would hide a swapped or missing parameter.

    `std` is the standard deviation, or a function of a parameter's name and value that returns it.
    """
    random = generator("parity", seed)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=std(name, parameter) if callable(std) else std, generator=random)
    return module.eval()


def by_fan_in(name: str, parameter: Tensor) -> float:
    """A standard deviation with which activations stay of about one; tables of biases get 1."""
    if "table" in name:
        return 1.0
    return 0.5 if parameter.ndim < 2 else float(1.5 * parameter[0].numel() ** -0.5)


def images(
    height: int = 16, width: int = 16, *, count: int = 2, channels: int = 3, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.randn(count, channels, height, width, dtype=dtype, generator=generator("images", height, width))


def gradients(
    outputs: Tensor | tuple[Tensor, ...], pixels: Tensor, module: nn.Module
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the outputs in random directions by the pixels, and by each parameter under its name.

    The gradient by a parameter that the outputs do not depend on is zero.
    """
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    random = generator("direction")
    directions = [torch.randn(output.shape, dtype=output.dtype, generator=random) for output in outputs]
    names, parameters = zip(*module.named_parameters(), strict=True)
    of_pixels, *rest = torch.autograd.grad(outputs, [pixels, *parameters], directions, allow_unused=True)
    assert of_pixels is not None, "the outputs depend on the pixels"
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(rest, parameters, strict=True)]
    return of_pixels, dict(zip(names, filled, strict=True))


def assert_same_gradients(by_name: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Equal gradients by every parameter, none of which is zero, except that of the bias of keys' norms."""
    assert by_name.keys() == expected.keys()
    for name, gradient in by_name.items():
        torch.testing.assert_close(
            gradient, expected[name].view_as(gradient), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert gradient.any() or name.endswith("k_norm.bias"), f"{name} does not affect the outputs"
