"""Modules that are smaller than the model's class makes them: fewer attention heads, fewer hidden neurons, lower rank.

A compressed model is built like any other and then made smaller by `shrink`, with the sizes that its config holds under
`model.compressed`. Weights that fit these sizes come from `keep_heads`, `keep_neurons` and `factorise`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import Attention
from common.nn.blocks import FeedForward
from common.nn.linear import Factored, FactoredProjections, Linear, Projections
from common.types import Positive

LowRank = Factored | FactoredProjections


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that differ from those that the model's class gives, by the names of the modules.

    heads: number of heads of an attention; each head keeps its width.
    neurons: number of hidden channels of a feed-forward.
    ranks: rank of a linear map, which is then a product of two (`common.nn.linear.Factored`).
    """

    heads: dict[str, Positive]
    neurons: dict[str, Positive]
    ranks: dict[str, Positive]


def shrink(model: nn.Module, sizes: Sizes) -> None:
    """Make the modules of a new model as small as `sizes` says, in place; their weights have no meaning yet.

    Raises UserError for a module that the model does not have, and for a number of heads or neurons that is not smaller
    than that of the module.
    """
    for name, count in sizes.heads.items():
        attention = _find(attentions(model), name, "heads")
        keep_heads(attention, range(_smaller(count, attention.heads, f"heads.{name}")))
    for name, count in sizes.neurons.items():
        feed_forward = _find(feed_forwards(model), name, "neurons")
        keep_neurons(feed_forward, range(_smaller(count, neurons_of(feed_forward), f"neurons.{name}")))
    for name, rank in sizes.ranks.items():
        linear = _find(linear_maps(model), name, "ranks")
        model.set_submodule(name, _empty_factors(linear, rank))


def attentions(model: nn.Module) -> dict[str, Attention]:
    """The attentions whose heads can be removed, by name.

    Subclasses of `Attention` are left out, because they may hold parameters of their own for each head.
    """
    return {name: module for name, module in model.named_modules() if type(module) is Attention}


def feed_forwards(model: nn.Module) -> dict[str, FeedForward]:
    """The feed-forwards of the model's blocks, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeedForward)}


def linear_maps(model: nn.Module) -> dict[str, Linear]:
    """The linear maps of attentions and feed-forwards by name, without those that are factored already.

    Embeddings, heads and all maps outside of blocks are left out.
    """
    parts = [(name, m) for name, m in model.named_modules() if isinstance(m, Attention | FeedForward)]
    children = {f"{name}.{child}": linear for name, part in parts for child, linear in part.named_children()}
    return {name: child for name, child in children.items() if isinstance(child, Linear)}


def neurons_of(feed_forward: FeedForward) -> int:
    """The number of hidden channels of a feed-forward."""
    contract = feed_forward.contract
    return (contract.down if isinstance(contract, Factored) else contract).in_features


def keep_heads(attention: Attention, heads: Sequence[int]) -> None:
    """Remove all heads but `heads` (indices in ascending order) from an attention, in place."""
    width = attention.inner_width // attention.heads
    channels = [head * width + i for head in heads for i in range(width)]
    rows = [part * attention.inner_width + channel for part in range(3) for channel in channels]
    attention.in_proj = _with_rows(attention.in_proj, rows)
    attention.out_proj = _with_columns(attention.out_proj, channels)
    attention.heads, attention.inner_width = len(heads), len(channels)


def keep_neurons(feed_forward: FeedForward, neurons: Sequence[int]) -> None:
    """Remove all hidden channels but `neurons` (indices in ascending order) from a feed-forward, in place."""
    feed_forward.expand = _with_rows(feed_forward.expand, neurons)
    feed_forward.contract = _with_columns(feed_forward.contract, neurons)


@torch.no_grad()
def factorise(model: nn.Module, name: str, down: Tensor, up: Tensor) -> None:
    """Replace the linear map `name` of a model by the product of `up` (out, rank) and `down` (rank, in), in place."""
    linear = linear_maps(model)[name]
    factors = _empty_factors(linear, len(down))
    factors.down.weight.copy_(down)
    factors.up.weight.copy_(up)
    if linear.bias is not None:
        factors.up.bias.copy_(linear.bias)
    model.set_submodule(name, factors)


def saves(linear: Linear, rank: int) -> bool:
    """Whether two factors of this rank have fewer weights than the linear map."""
    return rank * (linear.in_features + linear.out_features) < linear.in_features * linear.out_features


def _empty_factors(linear: Linear, rank: int) -> Any:
    kind = FactoredProjections if isinstance(linear, Projections) else Factored
    with torch.device(linear.weight.device):
        factors = kind(linear.in_features, linear.out_features, rank, linear.bias is not None)
    return _like(factors, linear)


def _with_rows(linear: Any, rows: Sequence[int]) -> Any:
    """A copy of a linear map with only the outputs `rows`."""
    if isinstance(linear, LowRank):
        linear.up = _with_rows(linear.up, rows)
        return linear
    bias = None if linear.bias is None else linear.bias[_indices(rows, linear)]
    return _linear(linear, linear.weight[_indices(rows, linear)], bias)


def _with_columns(linear: Any, columns: Sequence[int]) -> Any:
    """A copy of a linear map with only the inputs `columns`."""
    if isinstance(linear, LowRank):
        linear.down = _with_columns(linear.down, columns)
        return linear
    return _linear(linear, linear.weight[:, _indices(columns, linear)], linear.bias)


@torch.no_grad()
def _linear(former: Linear, weight: Tensor, bias: Tensor | None) -> Linear:
    """A linear map of the class of `former` with this weight and bias."""
    with torch.device(weight.device):
        linear: Linear = _like(type(former)(weight.shape[1], weight.shape[0], bias is not None), former)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


def _like(module: Any, former: Linear) -> Any:
    """Give a new module the type of numbers, the training mode and the frozen state of `former`."""
    return module.to(former.weight.dtype).train(former.training).requires_grad_(former.weight.requires_grad)


def _indices(values: Sequence[int], linear: Linear) -> Tensor:
    return torch.tensor(values, device=linear.weight.device)


def _find(modules: dict[str, Any], name: str, key: str) -> Any:
    if name not in modules:
        raise UserError(
            f"model.compressed.{key} names {name}, which this model does not have; leave the other keys of the model "
            "as they are in the compressed checkpoint."
        )
    return modules[name]


def _smaller(size: int, full: int, key: str) -> int:
    if size >= full:
        raise UserError(
            f"model.compressed.{key}={size} is not below {full}, so it compresses nothing; leave the other keys of the "
            "model as they are in the compressed checkpoint."
        )
    return size
