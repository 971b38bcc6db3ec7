"""Convolutions followed by a frozen batch norm, which is folded into the weight and bias of the convolution.

If no gradient is needed and oneDNN has a kernel, convolution, shortcut and ReLU are one pass over the feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.device import compute_dtype
from common.nn import kernels


class FrozenBatchNorm(nn.Module):
    """Batch norm with constant statistics and affine parameters: four buffers, one scale and shift per channel.

    It is nearly the identity until a checkpoint is loaded. Unlike with batch statistics, a training step does not
    depend on its split into micro-batches.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.weight_cache = kernels.WeightCache()

    def folded_into(self, conv: nn.Conv2d, *, packed: bool) -> tuple[Tensor, Tensor]:
        """The weight (C, ...) and bias (C,) of a convolution that equals `conv` followed by this norm.

        If the weight is being trained, they are computed in each call. Otherwise they are cached until the weight or
        this norm changes, in autocast's type, and if `packed`, in the layout of `kernels.convolution_relu`.
        """
        weight = conv.weight
        trains = torch.is_grad_enabled() and weight.requires_grad
        if trains or torch.compiler.is_compiling():
            return self._fold(weight)
        dtype = _convolution_dtype(weight)

        def make() -> tuple[Tensor, Tensor]:
            folded, bias = (tensor.to(dtype) for tensor in self._fold(weight))
            return kernels.pack_convolution(folded, conv) if packed else folded, bias

        if not kernels.counts_changes(weight):
            return make()
        cached: tuple[Tensor, Tensor] = self.weight_cache.get((packed, dtype), weight, make, tuple(self.buffers()))
        return cached

    def _fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale_and_shift()
        return weight * scale[:, None, None, None], shift

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,) each: the norm is x * scale + shift."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution that divides the map's size by `stride`, initialised by He et al. 2015 (arXiv 1502.01852)."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    conv.weight = kernels.Parameter(conv.weight.detach())
    return conv


def conv_norm(conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor) -> Tensor:
    """norm(conv(x)), with the norm folded into the convolution, which saves a pass over the feature map."""
    weight, bias = norm.folded_into(conv, packed=False)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def conv_norm_relu(
    conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor, *, shortcut: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """relu(norm(conv(x)) + shortcut), set to zero where `real` (B, 1, H, W) is False.

    None for `shortcut` or `real` omits the sum or the mask.

    To save memory allocations, which for a map of 50 MB take longer than computing it, operations overwrite the
    convolution's output, and `shortcut` if no gradient is needed.
    """
    if kernels.can_fuse(x, conv.weight, shortcut):
        weight, bias = norm.folded_into(conv, packed=True)
        y = kernels.convolution_relu(conv, x, weight, bias, shortcut)
        return y if real is None else y.mul_(real)
    y = conv_norm(conv, norm, x)
    if shortcut is not None:
        y = y.add_(shortcut)
    if real is not None:
        y = y.mul_(real)
    return F.relu(y, inplace=True)


def mask_padding(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B, C, H, W), set to zero where `real` (B, 1, H, W) is False; None means that nothing is padding."""
    return x if real is None else x * real


def _convolution_dtype(weight: Tensor) -> torch.dtype:
    """The type in which autocast computes convolutions, or the weight's own type without autocast."""
    enabled = torch.is_autocast_enabled(weight.device.type)
    return compute_dtype(weight.device) if enabled else weight.dtype
