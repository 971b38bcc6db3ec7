"""What a wing hands over for export: graphs to trace, what is told about them, and how their answers are compared."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

Call = Callable[..., dict[str, Tensor]]  # a graph as read from a file: tensors in its inputs' order -> named outputs


class Size(NamedTuple):
    """A length that callers choose: as torch.export takes it, and what may be chosen, in words."""

    dim: Any
    words: str


class Graph(NamedTuple):
    """One function of tensors, to become a file in each format."""

    name: str  # of the files
    module: nn.Module
    inputs: dict[str, Tensor]  # an example of each; all free sizes of 2 or more, and no two of them alike
    shapes: dict[str, list[str | int]]  # of the inputs, with the names of free sizes
    outputs: dict[str, str]  # and what they are, in words


class Row(NamedTuple):
    """One comparison with the model itself."""

    what: str  # shape of the inputs
    output: str
    difference: float


class Plan(NamedTuple):
    """All of one export."""

    graphs: list[Graph]
    sizes: dict[str, Size]
    about: dict[str, Any]  # plain types, for model.json
    files: dict[str, str]  # further texts by their names
    rows: list[Row]  # comparisons of these
    compare: Callable[[Mapping[str, Call]], list[Row]]
