"""Attention maps and attention rollout of a vision transformer (Abnar and Zuidema 2020, arXiv 2005.00928).

`common.nn.attention.record_attention` records the attention probabilities, whichever kernel the model uses.

Of the N tokens of an image, the first `prefix` are the class token, if any, and the registers. The others are the
patches of a grid (gh, gw), row by row. Maps show the attention from the pooled query to the patches. If the model pools
by the class token (`pooled_by_token`), the pooled query is this token. With mean pooling, the attention of all patches
is averaged.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import record_attention


@torch.no_grad()
def attention_up_to_layer(model: nn.Module, images: Tensor, layer: int, stack: str = "encoder") -> list[Tensor]:
    """Record the attention probabilities (B, h, N, N) of each encoder layer from the first to `layer`, inclusive.

    `images` (B, channels, H, W) is the model's input, and `stack` the name of the module that holds the layers. Layers
    are numbered from 0; negative numbers count from the last layer, which is -1. The model stays in its current mode,
    so call `eval()` first to disable dropout. Raises UserError when the model has no layer of this number.
    """
    names = encoder_attentions(model, stack)
    number = layer_number(layer, len(names))
    with record_attention(model) as maps:
        model(images)
    return [maps[name][-1] for name in names[: number + 1]]


def layer_number(layer: int, count: int) -> int:
    """Convert the number of a layer, which may be negative, to one from 0 to `count` - 1.

    Raises UserError when there is no layer of this number.
    """
    if not -count <= layer < count:
        raise UserError(
            f"there is no layer {layer}: this model has {count} layers; give a number from 0 to {count - 1}, or from "
            f"-1, the last, to {-count}."
        )
    return layer % count


def encoder_attentions(model: nn.Module, stack: str = "encoder") -> list[str]:
    """List the names of the attention modules in the model's module `stack`, sorted by the number of their block."""
    with record_attention(model) as maps:
        names = [name for name in maps if name.startswith(f"{stack}.")]
    assert names, f"the model has no attention modules under {stack}."
    return sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


def attention_map(attention: Tensor, prefix: int, pooled_by_token: bool, grid: tuple[int, int]) -> Tensor:
    """Select one layer's attention from the pooled query to each patch: (B, h, N, N) -> (B, h, gh, gw) in fp32.

    With mean pooling, the map is the mean of the attention from all patches. A map sums to one minus the attention to
    the class token and the registers.
    """
    _check(attention, prefix, pooled_by_token, grid)
    rows = attention.float()[:, :, 0] if pooled_by_token else attention.float()[:, :, prefix:].mean(2)  # (B, h, N)
    maps: Tensor = rows[..., prefix:].unflatten(-1, grid)
    return maps


def rollout(attentions: Sequence[Tensor], prefix: int, pooled_by_token: bool, grid: tuple[int, int]) -> Tensor:
    """Compute attention rollout from the pooled query to each patch, in fp32: L tensors (B, h, N, N) -> (B, gh, gw).

    `attentions` are the attention probabilities of L layers, from the first to the last. In section 3 of the paper,
    each layer has a matrix A = 0.5 W + 0.5 I, where W is its attention averaged over heads and I is the identity. The
    rows of A are normalised to sum to one. The rollout is the matrix A_L ... A_2 A_1.

    Only one row of the rollout is needed: that of the class token or, with mean pooling, the mean of the patches' rows.
    Therefore a row vector is multiplied by A_L first, then by A_{L-1}, and so on to A_1.
    """
    for attention in attentions:
        _check(attention, prefix, pooled_by_token, grid)
    pooled = torch.zeros(attentions[0].shape[-1], device=attentions[0].device)  # (N,)
    pooled[0 if pooled_by_token else slice(prefix, None)] = 1
    row = (pooled / pooled.sum()).expand(len(attentions[0]), 1, -1)  # (B, 1, N)
    with torch.autocast(row.device.type, enabled=False):
        for attention in reversed(attentions):
            row = row @ _with_residual(attention)
    map: Tensor = row[:, 0, prefix:].unflatten(-1, grid)
    return map


def _with_residual(attention: Tensor) -> Tensor:
    """Average attention over heads, and average the result with the identity: (B, h, N, N) -> (B, N, N).

    The identity stands for the residual connection. The rows are normalised to sum to one.
    """
    mean = attention.float().mean(1)  # (B, h, N, N) -> (B, N, N)
    mixed = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)
    return mixed / mixed.sum(-1, keepdim=True)


def _check(attention: Tensor, prefix: int, pooled_by_token: bool, grid: tuple[int, int]) -> None:
    tokens = prefix + grid[0] * grid[1]
    assert attention.shape[-2:] == (tokens, tokens), f"{attention.shape} but {prefix} tokens and a grid of {grid}"
    assert prefix > 0 or not pooled_by_token, "pooling by a class token needs one"
