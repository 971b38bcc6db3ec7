"""Attention within windows as maps over an image, and relative position biases (Liu et al. 2021, arXiv 2103.14030).

The model has a method `window_layout`; see `OptionalModel` in common/task.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.nn.attention import record_attention
from common.nn.windows import ShiftedWindowAttention
from vit.evaluation.attention_maps import layer_number

Edges = tuple[list[int], list[int]]  # the rows and columns of a map at which another window begins


class WindowMaps(NamedTuple):
    """Where the tokens of a layer look, and its windows."""

    maps: Tensor  # (B, heads, gh, gw)
    edges: Edges


@torch.no_grad()
def window_maps(model: Any, images: Tensor, layer: int) -> WindowMaps:
    """Record one layer's attention to each token, as the mean over all tokens of the image: maps in fp32.

    A token attends to its window only, so a map shows what draws attention in each window; it sums to one. `images`
    (B, channels, H, W) is the model's input. Layers are numbered from 0; negative numbers count from the last layer,
    which is -1. Raises UserError when the model has no layer of this number.
    """
    number = layer_number(layer, len(_attentions(model)))
    with record_attention(model) as records:
        model(images)
    attention = [*records.values()][number][-1].float()  # (B n, h, S, S)
    layout = model.window_layout(number, images.shape[-2], images.shape[-1], images.device)
    attention = attention.unflatten(0, (len(images), -1))  # (B, n, h, S, S)
    queries = (layout.positions >= 0).view(attention.shape[1], -1).to(attention) / len(layout.slots)  # (n, S)
    received = torch.einsum("bnhqk,nq->bhnk", attention, queries).flatten(2)  # (B, h, n S)
    maps = received[..., layout.slots].unflatten(-1, layout.size)
    rows, columns = (
        [*range(shift or length, side, length)]
        for side, length, shift in zip(layout.size, layout.window, layout.shift, strict=True)
    )
    return WindowMaps(maps, (rows, columns))


@torch.no_grad()
def bias_maps(model: Any, layer: int) -> Tensor:
    """The relative position bias of each head in one layer, by the place of the key: (heads, 2 h - 1, 2 w - 1), fp32.

    The middle is the bias of a token to itself, and the cell above it that to the token above. `layer` is numbered as
    in `window_maps`. Raises UserError when the model has no layer of this number or no windows.
    """
    attentions = _attentions(model)
    if not attentions:
        raise UserError(
            f"task.predict.attention=bias: {type(model).__name__} has no relative position biases, which Swin "
            "Transformers have; use task.predict.attention=maps."
        )
    table = attentions[layer_number(layer, len(attentions))].table
    # The table is indexed by the query's place minus the key's.
    return table.detach().float().flip(0, 1).permute(2, 0, 1).cpu()


def _attentions(model: Any) -> list[ShiftedWindowAttention]:
    """The model's attention modules, from input to output."""
    return [module for module in model.modules() if isinstance(module, ShiftedWindowAttention)]
