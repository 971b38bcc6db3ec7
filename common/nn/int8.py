"""int8 inference on CPUs: linear maps and convolutions computed by oneDNN's operators on integers.

A weight is int8, symmetric, with one scale for each output channel. An input is uint8, with one scale and one zero
point for each map (Jacob et al. 2018, arXiv 1712.05877, section 2.1), from a range that calibration measured
(quantisation.py). The ranges are constants, so that a sample's outputs do not depend on the rest of its batch.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.machine.device import compute_dtype
from common.nn.blocks import Residual
from common.nn.convolution import FrozenBatchNorm, FusedConvolution
from common.nn.kernels import NO_POST, Post, size_class
from common.nn.linear import Linear, Projections, Tied

Range = Sequence[float]  # the lowest and the highest value of a tensor

# From this number of elements on, a view of the integers of a quantised tensor is made in less time than a copy.
MIN_VIEWED_ELEMENTS = 2**16

_ONEDNN = torch.ops.onednn
_OPERATORS = ("qlinear_prepack", "qlinear_pointwise", "qconv_prepack", "qconv2d_pointwise")
_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")  # without them, oneDNN's sums of products may overflow
_ROUND: Any = getattr(torch, "quantize_per_tensor", None)  # one pass over the tensor; deprecated in torch 2.15


class Quantisation(NamedTuple):
    """An affine map between numbers and the integers 0 to 255: number = scale * (integer - zero_point)."""

    scale: float
    zero_point: int


def quantisation(*ranges: Range) -> Quantisation:
    """The quantisation of the union of ranges and zero, so that zero is represented exactly."""
    lows, highs = zip(*ranges, strict=True)
    low, high = min(0.0, *lows), max(0.0, *highs)
    scale = (high - low) / 255 or 1.0  # any scale represents a tensor of zeros
    return Quantisation(scale, round(-low / scale))


def quantise_tensor(x: Tensor, to: Quantisation) -> Tensor:
    """x (...) of floats -> uint8 (...), rounded to the nearest integer, half to even, and clamped to 0 to 255."""
    if _ROUND is None:
        return torch.add(to.zero_point, (x.float() * (1 / to.scale)).round_()).clamp_(0, 255).to(torch.uint8)
    rounded = _ROUND(x.float(), to.scale, to.zero_point, torch.quint8)
    if x.numel() < MIN_VIEWED_ELEMENTS:
        copy: Tensor = rounded.int_repr()
        return copy
    return torch.empty(0, dtype=torch.uint8).set_(rounded.untyped_storage(), 0, rounded.shape, rounded.stride())


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, ...) -> integers of -127 to 127, int8 (out, ...), and the scales of the output channels (out,)."""
    largest = weight.detach().flatten(1).abs().amax(1)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    integers = (weight.detach() / scales.view(-1, *[1] * (weight.ndim - 1))).round_().to(torch.int8)
    return integers, scales


def unsupported() -> str | None:
    """Why this machine cannot compute in int8, as the end of a sentence; None if it can."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(_ONEDNN, name) for name in _OPERATORS):
        return "this PyTorch lacks oneDNN's int8 operators"
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # in newer versions of torch
    checks = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("vnni", "amx_tile"))
    if not any(capabilities.get(name) for name in _INSTRUCTIONS) and not any(check() for check in checks):
        return "this CPU lacks instructions for int8 (VNNI or AMX)"
    return None


class Int8Linear(nn.Module):
    """A linear map whose input is quantised by `source` and whose output is quantised by `target`.

    If `target` is None, the output has the type `dtype`; None means the type in which autocast computes products, or
    fp32 without autocast. `post` names an activation that the operator applies to the output (see
    `kernels.post_operation`). If `residual` is not None, it is added to the output, which then has its type (see
    `Int8Residual`).
    """

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        source: Quantisation,
        *,
        target: Quantisation | None = None,
        dtype: torch.dtype | None = None,
        post: Post = NO_POST,
    ):
        super().__init__()
        self.source, self.target, self.dtype, self.post = source, target, dtype, post
        self.residual: Tensor | None = None
        zero_points = torch.zeros(len(scales), dtype=torch.int64)
        bias = None if bias is None else bias.detach().float()
        self.constants = _ONEDNN.qlinear_prepack(weight, None), scales, zero_points, bias

    @classmethod
    def of(cls, plain: Linear | Tied, source: Quantisation, **options: Any) -> "Int8Linear":
        """The quantised `plain`; `options` are the keyword arguments of the constructor."""
        weight, bias = plain.matrix()
        return cls(*quantise_weight(weight), bias, source, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) of floats, or already quantised by `source` -> (..., out)."""
        integers = x if x.dtype == torch.uint8 else quantise_tensor(x, self.source)
        if self.residual is not None:
            return self._add(integers, self.residual.contiguous())
        scale, zero_point = self.target or (1.0, 0)
        dtype = (self.dtype or compute_dtype(x.device)) if self.target is None else torch.uint8
        y: Tensor = _ONEDNN.qlinear_pointwise(
            integers, *self.source, *self.constants, scale, zero_point, dtype, *self.post
        )
        return y

    def _add(self, integers: Tensor, residual: Tensor) -> Tensor:
        packed, scales, zero_points, bias = self.constants
        # "add" writes a new tensor, while "sum" would overwrite the residual.
        y: Tensor = _ONEDNN.qlinear_pointwise.binary(
            *(integers, *self.source, packed, scales, zero_points, residual, bias),
            *(1.0, 0, residual.dtype, 1.0, 0, "add", 1.0, *NO_POST),
        )
        return y


class Int8Residual(nn.Module):
    """A `common.nn.blocks.Residual` in evaluation whose addition `last` does, the last map of the sub-layer."""

    def __init__(self, residual: Residual, last: Int8Linear):
        super().__init__()
        self.pre_norm, self.norm = residual.pre_norm, residual.norm
        self._last = (last,)  # in a tuple, so that it is not registered twice as a submodule

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, N, C) -> (B, N, C); `sublayer` maps (B, N, C) to (B, N, C) by one call of `last` at its end."""
        last = self._last[0]
        inputs = self._normalise(x) if self.pre_norm else x
        last.residual = x
        try:
            y = sublayer(inputs)
        finally:
            last.residual = None
        return y if self.pre_norm else self._normalise(y)

    def _normalise(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class Int8Projections(nn.Module):
    """The query, key and value projections of an attention; `ranges` are those of their three inputs.

    The weight's rows are packed in the first call that needs them. A call for several projections, which have the same
    input, uses the union of their ranges.
    """

    def __init__(self, joint: Projections, ranges: Sequence[Range]):
        super().__init__()
        self.weight, self.scales = quantise_weight(joint.weight)
        self.bias, self.ranges = joint.bias, ranges
        self.parts: dict[tuple[int, int], Int8Linear] = {}

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., in) -> (..., out), or only the outputs in `rows`, which must cover whole projections."""
        part = self.parts.get((rows.start, rows.stop))
        if part is None:
            part = self.parts[rows.start, rows.stop] = self._part(rows)
        y: Tensor = part(x)
        return y

    def _part(self, rows: slice) -> Int8Linear:
        start, stop, _ = rows.indices(len(self.weight))
        width = len(self.weight) // 3
        bias = None if self.bias is None else self.bias[rows]
        source = quantisation(*self.ranges[start // width : stop // width])
        return Int8Linear(self.weight[rows], self.scales[rows], bias, source)


class Int8Convolution(FusedConvolution):
    """A convolution with its frozen norm; inputs, shortcuts and outputs are quantised.

    The weight is packed in the first call for maps of a size class (`kernels.size_class`). The packed weights of all
    classes are kept, one byte per element each; a copy of the module has none.

    Args:
        conv: the convolution.
        norm: its norm, which is folded into the weight and the bias before the weight is quantised.
        source: the quantisation of the input.
        target: the quantisation of the output.
        shortcut: the quantisation of the shortcut that is added; None if nothing is added.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: FrozenBatchNorm,
        source: Quantisation,
        target: Quantisation,
        shortcut: Quantisation | None = None,
    ):
        super().__init__()
        self.source, self.target, self.shortcut = source, target, shortcut
        with torch.no_grad():
            scale, shift = norm.scale_and_shift()
            weight, scales = quantise_weight(conv.weight * scale[:, None, None, None])
        assert not isinstance(conv.padding, str)
        self.geometry = [*conv.stride], [*conv.padding], [*conv.dilation], conv.groups
        self.weight, self.packed_weights = weight, dict[int, Tensor]()
        self.constants = scales, torch.zeros(len(scales), dtype=torch.int64), shift

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed_weights": {}}

    def forward(self, x: Tensor) -> Tensor:
        """norm(conv(x)): (B, C, H, W) -> uint8 (B, C', H', W'), quantised by `target`."""
        return self._convolve(x, None, "none")

    def with_relu(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """relu(norm(conv(x)) + shortcut), uint8, quantised by `target`; see `FusedConvolution`."""
        return self._convolve(x, shortcut, "relu")

    def _packed(self, x: Tensor) -> Tensor:
        """The weight in the layout for maps of the size of x (B, C, H, W)."""
        name, weights = size_class(x), self.packed_weights
        if name not in weights:
            scales = self.constants[0]
            weights[name] = _ONEDNN.qconv_prepack(self.weight, scales, *self.source, *self.geometry, [*x.shape])
        return weights[name]

    def _convolve(self, x: Tensor, shortcut: Tensor | None, activation: str) -> Tensor:
        integers = x if x.dtype == torch.uint8 else quantise_tensor(x, self.source)
        arguments = integers, *self.source, self._packed(x), *self.constants
        output = *self.geometry, *self.target, torch.uint8
        y: Tensor
        if shortcut is None:
            y = _ONEDNN.qconv2d_pointwise(*arguments, *output, activation, [], "")
        else:
            assert self.shortcut is not None
            y = _ONEDNN.qconv2d_pointwise.binary(
                *arguments[:-1], shortcut, arguments[-1], *output, *self.shortcut, "sum", 1.0, activation, [], ""
            )
        return y


class Int8MaxPool(nn.Module):
    """The maximum over windows of a uint8 map; PyTorch's own operator refuses uint8."""

    def __init__(self, pool: nn.MaxPool2d):
        super().__init__()
        self.window = [[side, side] for side in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]

    def forward(self, x: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> uint8 (B, C, H', W')."""
        y: Tensor = torch.ops.quantized.max_pool2d(x, *self.window, False)
        return y


def dequantise_tensor(x: Tensor, source: Quantisation) -> Tensor:
    """uint8 (...) -> the numbers (...), in the type in which autocast computes products, or fp32 without autocast."""
    numbers = x.to(compute_dtype(x.device))
    return (numbers - source.zero_point if source.zero_point else numbers).mul_(source.scale)


def silence_deprecation() -> None:
    """Round a tensor with PyTorch's warnings ignored: it warns of a deprecated function once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantise_tensor(torch.zeros(1), Quantisation(1.0, 0))
