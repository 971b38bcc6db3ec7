"""What the export of a model consists of: graphs to trace, metadata, further files, and a comparison of outputs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

GraphFunction = Callable[..., dict[str, Tensor]]  # an exported graph: input tensors in order -> outputs by name


class Dimension(NamedTuple):
    """A length of an input that the caller chooses."""

    symbol: Any  # a torch.export.Dim, or a product of one
    description: str  # the permitted lengths, for model.json


class Graph(NamedTuple):
    """A function of tensors that becomes one file in each format."""

    name: str  # of the files, without the ending
    module: nn.Module
    inputs: dict[str, Tensor]  # examples; their free dimensions are at least 2 long, and all of different length
    shapes: dict[str, list[str | int]]  # of the inputs; a name stands for a free dimension
    outputs: dict[str, str]  # names -> descriptions


class Comparison(NamedTuple):
    """The difference between an exported output and the model's own."""

    inputs: str  # their shape
    output: str
    difference: float


class Plan(NamedTuple):
    """The export of one model."""

    graphs: list[Graph]
    dimensions: dict[str, Dimension]  # the free dimensions of all graphs
    metadata: dict[str, Any]  # plain types, for model.json
    files: dict[str, str]  # further text files: names -> contents
    comparisons: list[Comparison]  # of these files
    compare: Callable[[Mapping[str, GraphFunction]], list[Comparison]]  # takes the exported graphs by name
