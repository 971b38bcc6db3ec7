"""Convolutions with a frozen batch norm behind them, which is folded into their weights.

On the CPU, where no gradient is wanted, oneDNN computes convolution, shortcut and ReLU in one pass over the map, from
weights that are kept in the order in which its kernel reads them. Everywhere else this is torch's convolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.device import computed_in

_ONEDNN = torch.ops.mkldnn if torch.backends.mkldnn.is_available() else None
_FUSED = getattr(_ONEDNN, "_convolution_pointwise", None)
_FUSED_ONTO = getattr(_ONEDNN, "_convolution_pointwise_", None)
_PACK = getattr(_ONEDNN, "_reorder_convolution_weight", None)
_HAS_BF16 = _ONEDNN is not None and bool(getattr(_ONEDNN, "_is_mkldnn_bf16_supported", bool)())


class FrozenBatchNorm(nn.Module):
    """Batch norm whose statistics and affine part never change: four buffers, one scale and shift per channel.

    Without weights to load it changes nothing. Norms that depend on the batch would make a step depend on its cut.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._kept: tuple[object, tuple[Tensor, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles fold anew: packed weights can be neither."""
        return {**self.__dict__, "_kept": None}

    def folded_into(self, conv: nn.Conv2d, *, packed: bool) -> tuple[Tensor, Tensor]:
        """The weight (C, ...) and bias (C,) of a convolution that does the work of this norm, too.

        They are computed in every step that learns the weight. Otherwise they are kept as long as nothing that they
        come from has been written to, in the type that autocast would turn them into each time, and `packed` for
        oneDNN's kernel.
        """
        weight = conv.weight
        learns = torch.is_grad_enabled() and weight.requires_grad
        if learns or torch.compiler.is_compiling() or weight.is_inference():
            self._kept = None
            return self._fold(weight)
        dtype = _type(weight)
        written = packed, dtype, *((tensor.data_ptr(), tensor._version) for tensor in (weight, *self.buffers()))
        if self._kept is None or self._kept[0] != written:
            with torch.inference_mode(False), torch.no_grad():  # or a gradient that passes through could not save it
                folded, bias = (tensor.to(dtype) for tensor in self._fold(weight))
                self._kept = written, (_pack(folded, conv) if packed else folded, bias)
        return self._kept[1]

    def _fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale_and_shift()
        return weight * scale[:, None, None, None], shift

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,), (C,) so that the norm is x * scale + shift."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution that keeps the map's size but for its stride, drawn as ResNet's are (arXiv 1502.01852)."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def normed(conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor) -> Tensor:
    """norm(conv(x)), with the norm folded into the convolution's weights, which saves a pass over the map."""
    weight, bias = norm.folded_into(conv, packed=False)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def layer(
    conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor, *, shortcut: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """relu(norm(conv(x)) + shortcut), with zeros wherever real (B, 1, H, W) is False; None means no such thing.

    A map of 50 MB takes longer to allocate than to compute, so what the convolution returns is overwritten and, where
    no gradient is wanted, `shortcut`, too.
    """
    if _is_fused(x, conv.weight, shortcut):
        y = _fused(conv, norm, x, shortcut)
        return y if real is None else y.mul_(real)
    y = normed(conv, norm, x)
    if shortcut is not None:
        y = y.add_(shortcut)
    if real is not None:
        y = y.mul_(real)
    return F.relu(y, inplace=True)


def zero_padding(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B, C, H, W) with zeros wherever real (B, 1, H, W) is False; None means that nothing is padding."""
    return x if real is None else x * real


def _type(weight: Tensor) -> torch.dtype:
    """What autocast computes convolutions in, or the weight's own type."""
    enabled = torch.is_autocast_enabled(weight.device.type)
    return computed_in(weight.device) if enabled else weight.dtype


def _is_fused(x: Tensor, weight: Tensor, shortcut: Tensor | None) -> bool:
    """Whether oneDNN's fused kernel has all that it needs; a compiler makes its own choice."""
    if None in (_FUSED, _FUSED_ONTO, _PACK) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    learns = any(tensor is not None and tensor.requires_grad for tensor in (x, weight, shortcut))
    if (torch.is_grad_enabled() and learns) or not torch.backends.mkldnn.enabled or not x.numel():
        return False
    return _type(weight) in ((torch.float32, torch.bfloat16) if _HAS_BF16 else (torch.float32,))


def _fused(conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor, shortcut: Tensor | None) -> Tensor:
    weight, bias = norm.folded_into(conv, packed=True)
    x = x.to(weight.dtype)
    places = conv.padding, conv.stride, conv.dilation, conv.groups
    y: Tensor
    if shortcut is None:
        y = _FUSED(x, weight, bias, *places, "relu", [], "")
    else:
        y = _FUSED_ONTO(shortcut.to(weight.dtype), x, weight, bias, *places, "add", 1.0, "relu", [], "")
    return y


def _pack(weight: Tensor, conv: nn.Conv2d) -> Tensor:
    if weight.dtype == torch.float32 and conv.kernel_size != (3, 3):
        return weight  # the best order depends on the map's size, and another's is up to 10 times as slow
    like = [1, conv.in_channels, 32, 32]  # any map: without one it takes an order that is slow in the same way
    packed: Tensor = _PACK(weight, conv.padding, conv.stride, conv.dilation, conv.groups, like)
    return packed
