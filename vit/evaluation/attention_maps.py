"""Where a vision transformer looks: attention maps and attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928).

Both start from what `common.nn.attention.record_attention` collects, which does not depend on the kernel in use. Tokens
are `prefix` ones (class token, then registers) and the patches of a grid row by row.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import record_attention


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, layer: int) -> list[Tensor]:
    """The attention weights of all encoder layers up to `layer`, which is the last of the list: (B, h, N, N) each.

    `images` is what the model takes. Layers count from 0, or from the end: -1 is the last. The model stays in the
    mode it is in; for pictures that is eval. Raises UserError when there is no such layer.
    """
    names = encoder_attentions(model)
    if not -len(names) <= layer < len(names):
        raise UserError(
            f"there is no layer {layer}: this model has {len(names)} layers; give one from 0 to {len(names) - 1}, or "
            f"from -1, the last, to {-len(names)}."
        )
    with record_attention(model) as maps:
        model(images)
    return [maps[name][-1] for name in names[: layer % len(names) + 1]]


def encoder_attentions(model: nn.Module) -> list[str]:
    """The names of the encoder's attention modules from the first layer to the last: block 2 before block 10."""
    with record_attention(model) as maps:
        names = [name for name in maps if name.startswith("encoder.")]
    assert names, "the model has no attention modules under encoder."
    return sorted(names, key=lambda name: [int(part) for part in re.findall(r"\d+", name)])


def attention_map(weights: Tensor, prefix: int, pooled_by_token: bool, grid: tuple[int, int]) -> Tensor:
    """How much what is pooled looks at each patch, in one layer: weights (B, h, N, N) -> (B, h, gh, gw) in fp32.

    That is the class token's row or, with mean pooling, the mean of the rows of all patches. A map sums to one less
    what goes to the class token and the registers.
    """
    _check(weights, prefix, pooled_by_token, grid)
    rows = weights.float()[:, :, 0] if pooled_by_token else weights.float()[:, :, prefix:].mean(2)  # (B, h, N)
    maps: Tensor = rows[..., prefix:].unflatten(-1, grid)
    return maps


def rollout(layers: Sequence[Tensor], prefix: int, pooled_by_token: bool, grid: tuple[int, int]) -> Tensor:
    """How much what is pooled takes from each patch through `layers`, first to last: (B, h, N, N) -> (B, gh, gw).

    Section 3 of the paper: A = 0.5 W + 0.5 I of the heads' mean W, its rows made to sum to one again; the rollout is
    A_L ... A_2 A_1. Only the row of the class token (or, with mean pooling, the mean of the patches' rows) is asked
    for, so that row goes through the matrices from the last layer down, without a product of two matrices. In fp32.
    """
    for weights in layers:
        _check(weights, prefix, pooled_by_token, grid)
    asked = torch.zeros(layers[0].shape[-1], device=layers[0].device)  # (N,)
    asked[0 if pooled_by_token else slice(prefix, None)] = 1
    row = (asked / asked.sum()).expand(len(layers[0]), 1, -1)  # (B, 1, N)
    with torch.autocast(row.device.type, enabled=False):
        for weights in reversed(layers):
            row = row @ _with_residual(weights)
    map: Tensor = row[:, 0, prefix:].unflatten(-1, grid)
    return map


def _with_residual(weights: Tensor) -> Tensor:
    """The mean over heads, half of it replaced by what the residual connection carries: (B, h, N, N) -> (B, N, N)."""
    mean = weights.float().mean(1)
    mixed = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)
    return mixed / mixed.sum(-1, keepdim=True)


def _check(weights: Tensor, prefix: int, pooled_by_token: bool, grid: tuple[int, int]) -> None:
    tokens = prefix + grid[0] * grid[1]
    assert weights.shape[-2:] == (tokens, tokens), f"{weights.shape}, but {prefix} tokens and a grid of {grid}"
    assert prefix > 0 or not pooled_by_token, "pooled by a token that is not there"
