"""Linear maps: `Linear`, `Projections` (query, key and value in one matrix), and `Tied` (another module's weight).

`Factored` and `FactoredProjections` replace them by a product of two smaller maps (low rank; see nn/compressed.py). The
function `opened` copies a model and replaces all of them in the copy by plain `nn.Linear`.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from common.nn import kernels


class Linear(nn.Linear):
    """torch.nn.Linear, computed by `kernels.linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.weight = kernels.Parameter(self.weight.detach())
        self.weight_cache = kernels.WeightCache()

    def forward(self, x: Tensor, *, activation: nn.Module | None = None) -> Tensor:
        """(..., in) -> (..., out); `activation` is applied to the outputs, in the same pass if possible."""
        return kernels.linear(x, self.weight, self.bias, cache=self.weight_cache, activation=activation)

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and the bias (out,), or None."""
        return self.weight, self.bias

    def opened(self) -> nn.Module:
        """A plain `nn.Linear` with copies of the weight and bias; see the function `opened`."""
        return _plain_linear(self.weight, self.bias)


class Projections(Linear):
    """The query, key and value projections of an attention, as the rows of one matrix in this order.

    Checkpoints hold them as one matrix, too. With three separate linear maps, a small decoding step would take twice as
    long.
    """

    def forward(self, x: Tensor, rows: slice = slice(None), *, activation: nn.Module | None = None) -> Tensor:
        """(..., in) -> (..., out), or only the outputs in `rows`; `activation` is applied to the outputs."""
        return kernels.linear(x, self.weight, self.bias, rows=rows, cache=self.weight_cache, activation=activation)

    def opened(self) -> nn.Module:
        """Three plain `nn.Linear` with copies of their parts of the weight and bias; see the function `opened`."""
        return SeparateProjections(self)


class SeparateProjections(nn.Module):
    """The query, key and value projections of `joint` as three plain `nn.Linear`: q, k and v."""

    def __init__(self, joint: Projections):
        super().__init__()
        self.width = joint.out_features // 3
        biases = [None] * 3 if joint.bias is None else joint.bias.chunk(3)
        self.q, self.k, self.v = map(_plain_linear, joint.weight.chunk(3), biases)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., in) -> (..., out), or only the outputs in `rows`, which must cover whole projections."""
        start, stop, _ = rows.indices(3 * self.width)
        maps = [self.q, self.k, self.v][start // self.width : stop // self.width]
        outputs = [projection(x) for projection in maps]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class Factored(nn.Module):
    """A linear map of low rank: `down` to `rank` channels, then `up` to the outputs, with the bias on `up`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        super().__init__()
        self.down = Linear(in_features, rank, bias=False)
        self.up = Linear(rank, out_features, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.up(self.down(x))
        return y


class FactoredProjections(nn.Module):
    """The query, key and value projections of an attention as one map of low rank, of which they share `down`."""

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True):
        super().__init__()
        self.down = Linear(in_features, rank, bias=False)
        self.up = Projections(rank, out_features, bias)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., in) -> (..., out), or only the outputs in `rows`."""
        y: Tensor = self.up(self.down(x), rows=rows)
        return y


class Tied(nn.Module):
    """A linear map with the weight of the module `owner`, flattened to a matrix, and with the owner's bias, if any.

    It adds no key to the state dict. The owner's weight is replaced by a `kernels.Parameter` with the same values.
    """

    def __init__(self, owner: Any):
        super().__init__()
        owner.weight = kernels.Parameter(owner.weight.detach())
        self._owner = (owner,)  # in a tuple, so that it is not registered as a submodule
        self.weight_cache = kernels.WeightCache()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return kernels.linear(x, *self.matrix(), cache=self.weight_cache)

    def opened(self) -> nn.Module:
        """A plain `nn.Linear`; see the function `opened`.

        If the owner's weight is a matrix, the `nn.Linear` shares it; otherwise the weight is copied. The bias is
        copied.
        """
        plain = _plain_linear(*self.matrix())
        weight = self._owner[0].weight
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            plain.weight = weight
        return plain

    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and the bias (out,), or None."""
        owner: Any = self._owner[0]
        return owner.weight.flatten(1), getattr(owner, "bias", None)


def opened(model: nn.Module) -> nn.Module:
    """A copy of a model in which every linear map is a plain `nn.Linear`, for tools that replace linear maps.

    Examples of such tools are the quantisation of torch.ao and torchao, pruning, and low-rank adapters. A module that a
    tool puts in place of an `nn.Linear` needs only the method forward(x). The query, key and value projections become
    three maps named q, k and v.
    """
    model = copy.deepcopy(model)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, Linear | Tied):
                plain: nn.Module = child.opened()
                setattr(module, name, plain.train(child.training))
    return model


def _plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return plain
