"""Convolutions followed by a norm; a frozen batch norm is folded into the weight and bias of the convolution.

If the norm is frozen, no gradient is needed and oneDNN has a kernel, the convolution, the addition of a shortcut and
ReLU are computed in one pass over the feature map. A `FusedConvolution` computes them itself, such as in int8.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.device import compute_dtype
from common.nn import kernels


class FrozenBatchNorm(nn.Module):
    """Batch norm with constant statistics and affine parameters: four buffers with one value per channel each.

    It is nearly the identity until a checkpoint is loaded. It uses no statistics of the batch, so a training step does
    not depend on how the batch is split into micro-batches.
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

    def folded_into(self, conv: nn.Conv2d, *, packed_for: Tensor | None) -> tuple[Tensor, Tensor]:
        """The weight (C, ...) and bias (C,) of a convolution that equals `conv` followed by this norm.

        If a gradient of the weight is needed, or the model is being compiled, both are computed in each call, in the
        type of `conv.weight`.

        Otherwise, both have the type in which autocast computes convolutions or, without autocast, the type of
        `conv.weight`. If `packed_for` is a map (B, C, H, W), the returned weight has the layout that
        `kernels.convolution_relu` reads for maps of its `kernels.size_class`. Both are cached until `conv.weight` or
        this norm changes, provided that `conv.weight` counts its changes (`kernels.counts_changes`).
        """
        weight = conv.weight
        trains = torch.is_grad_enabled() and weight.requires_grad
        if trains or torch.compiler.is_compiling():
            return self._fold(weight)
        dtype = _convolution_dtype(weight)

        def make() -> tuple[Tensor, Tensor]:
            folded, bias = (tensor.to(dtype) for tensor in self._fold(weight))
            return folded if packed_for is None else kernels.pack_convolution(folded, conv, packed_for), bias

        if not kernels.counts_changes(weight):
            return make()
        is_packed = packed_for is not None and kernels.has_packed_layout(conv, dtype)
        size = kernels.size_class(packed_for) if packed_for is not None and is_packed else None
        cached: tuple[Tensor, Tensor] = self.weight_cache.get((size, dtype), weight, make, tuple(self.buffers()))
        return cached

    def _fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.scale_and_shift()
        return weight * scale[:, None, None, None], shift

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The scale and the shift of this norm, (C,) each: the norm is x * scale + shift."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return scale, self.bias - self.running_mean * scale


class FusedConvolution(nn.Module):
    """A convolution and its norm in one module, which takes the place of a convolution before an `nn.Identity`."""

    def forward(self, x: Tensor) -> Tensor:
        """norm(conv(x)): (B, C, H, W) -> (B, C', H', W')."""
        raise NotImplementedError

    def with_relu(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """relu(norm(conv(x)) + shortcut); nothing is added if `shortcut` is None, and it may be overwritten."""
        raise NotImplementedError


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Make a convolution without bias that divides the sides of a feature map by `stride`, rounding up.

    `kernel` is the side of the kernel, an odd number. The weight is initialised as in He et al. 2015 (arXiv
    1502.01852).
    """
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    conv.weight = kernels.Parameter(conv.weight.detach())
    return conv


def conv_norm(conv: nn.Conv2d | FusedConvolution, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)). A frozen norm is folded into the convolution, which saves a pass over the feature map."""
    if not isinstance(norm, FrozenBatchNorm):
        y: Tensor = norm(conv(x))
        return y
    assert isinstance(conv, nn.Conv2d)
    weight, bias = norm.folded_into(conv, packed_for=None)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def conv_norm_relu(
    conv: nn.Conv2d | FusedConvolution,
    norm: nn.Module,
    x: Tensor,
    *,
    shortcut: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """relu(norm(conv(x)) + shortcut), set to zero where `real` (B, 1, H, W) is False.

    If `shortcut` is None, nothing is added; if `real` is None, nothing is set to zero.

    The addition, the mask and ReLU overwrite the convolution's output, because allocating another map (of 50 MB, for
    example) takes longer than these operations. If no gradient is needed, `shortcut` may be overwritten, too.
    """
    if isinstance(conv, FusedConvolution):
        y = conv.with_relu(x, shortcut)
        return y if real is None else y.mul_(real)
    if isinstance(norm, FrozenBatchNorm) and kernels.can_fuse(x, conv.weight, shortcut):
        weight, bias = norm.folded_into(conv, packed_for=x)
        y = kernels.convolution_relu(conv, x, weight, bias, shortcut)
        return y if real is None else y.mul_(real)
    y = conv_norm(conv, norm, x)
    if shortcut is not None:
        y = y.add_(shortcut)
    if real is not None:
        y = y.mul_(real)
    return F.relu(y, inplace=True)


def mask_padding(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B, C, H, W), set to zero where `real` (B, 1, H, W) is False; x itself if `real` is None."""
    return x if real is None else x * real


def _convolution_dtype(weight: Tensor) -> torch.dtype:
    """The type in which autocast computes convolutions, or the weight's own type without autocast."""
    enabled = torch.is_autocast_enabled(weight.device.type)
    return compute_dtype(weight.device) if enabled else weight.dtype
