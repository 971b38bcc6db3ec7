"""Linear maps as modules: plain, three in one, tied to another module's weight, and opened for other tools."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from common.nn import kernels


class Linear(nn.Linear):
    """torch.nn.Linear, by `kernels.linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.weight = kernels.Parameter(self.weight.detach())
        self.weight_cache = kernels.WeightCache()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return kernels.linear(x, self.weight, self.bias, cache=self.weight_cache)

    def opened(self) -> nn.Module:
        """See the function `opened`."""
        return _plain(self.weight, self.bias)


class Projections(Linear):
    """The query, key and value projections of an attention: the rows of one matrix, in this order.

    All stored files hold them as one, and as three maps they take twice the time of a small decoding step.
    """

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., in) -> (..., out), or the outputs in `rows` alone."""
        return kernels.linear(x, self.weight, self.bias, rows=rows, cache=self.weight_cache)

    def opened(self) -> nn.Module:
        """See the function `opened`."""
        return SeparateProjections(self)


class SeparateProjections(nn.Module):
    """`Projections` as three plain maps."""

    def __init__(self, joint: Projections):
        super().__init__()
        self.width = joint.out_features // 3
        biases = [None] * 3 if joint.bias is None else joint.bias.chunk(3)
        self.q, self.k, self.v = map(_plain, joint.weight.chunk(3), biases)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., in) -> (..., out), or the outputs in `rows` alone, which begin and end where q, k or v do."""
        start, stop, _ = rows.indices(3 * self.width)
        maps = [self.q, self.k, self.v][start // self.width : stop // self.width]
        outputs = [part(x) for part in maps]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


class Tied(nn.Module):
    """The linear map of a weight that belongs to another module, flattened to a matrix; it adds no key to a file."""

    def __init__(self, owner: Any):
        super().__init__()
        owner.weight = kernels.Parameter(owner.weight.detach())
        self._owner = (owner,)  # in a tuple, so as not to be registered as a part
        self.weight_cache = kernels.WeightCache()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return kernels.linear(x, *self._matrix(), cache=self.weight_cache)

    def opened(self) -> nn.Module:
        """See the function `opened`. The weight stays shared where it is a matrix."""
        plain = _plain(*self._matrix())
        weight = self._owner[0].weight
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            plain.weight = weight
        return plain

    def _matrix(self) -> tuple[Tensor, Tensor | None]:
        owner: Any = self._owner[0]
        return owner.weight.flatten(1), getattr(owner, "bias", None)


def opened(model: nn.Module) -> nn.Module:
    """A copy of a model whose linear maps are all plain `nn.Linear`, for tools that replace these.

    Such are torch.ao's and torchao's quantisation, pruning, and low-rank maps: whatever replaces a map needs
    forward(x) alone. The query, key and value projections become three maps, under names of their own.
    """
    model = copy.deepcopy(model)
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, Linear | Tied):
                plain: nn.Module = child.opened()
                setattr(module, name, plain.train(child.training))
    return model


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return plain
