"""What the export of a model consists of: graphs to trace, metadata, text files, and a comparison of outputs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

GraphFunction = Callable[..., dict[str, Tensor]]  # runs an exported graph: inputs by position -> outputs by name


class Dimension(NamedTuple):
    """A free dimension: an input's dimension whose length the caller may choose."""

    symbol: Any  # a torch.export.Dim, or a multiple of one
    description: str  # the permitted lengths, for model.json


class Graph(NamedTuple):
    """A function of tensors that is exported to one file in each format."""

    name: str  # the name of its files, without suffix
    module: nn.Module
    inputs: dict[str, Tensor]  # examples for tracing; their free dimensions have different lengths of at least 2
    shapes: dict[str, list[str | int]]  # the shapes of the inputs; a string is the name of a free dimension
    outputs: dict[str, str]  # name -> description, in the order in which the module returns them


class Comparison(NamedTuple):
    """The difference between an output of an exported file and the model's output, for the same inputs."""

    inputs: str  # describes the shape of the inputs
    output: str  # the name of the output
    difference: float  # the largest difference, relative for logits; for a tokenizer, the fraction of texts that differ


class Plan(NamedTuple):
    """The export of one model."""

    graphs: list[Graph]
    dimensions: dict[str, Dimension]  # the free dimensions of all graphs
    metadata: dict[str, Any]  # plain types, for model.json
    files: dict[str, str]  # text files, such as tokenizers: name -> content
    comparisons: list[Comparison]  # comparisons of the tokenizers in `files` with ours
    compare: Callable[[Mapping[str, GraphFunction]], list[Comparison]]  # compares graphs (by name) with the model
    notes: tuple[str, ...] = ()  # sentences on what the graphs lack, for the log and model.json
