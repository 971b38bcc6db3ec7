"""Time exported graphs beside the model."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch

from scripts.exporting.plan import Graph, GraphFunction

ROUNDS = 5


@torch.no_grad()
def timing_rows(graphs: Sequence[Graph], contenders: Mapping[str, Mapping[str, GraphFunction]]) -> list[list[Any]]:
    """The rows of a table of times: a row for each graph, and a column for each contender, the model or a format.

    `contenders` map the names of graphs to functions. Each is called with the inputs of tracing, which are small, once
    before the measurement and then in turn with the others.
    """
    rows: list[list[Any]] = [["graph", "shape", *contenders]]
    for graph in graphs:
        inputs = tuple(graph.inputs.values())
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(1 + ROUNDS):
            for name, functions in contenders.items():
                start = time.perf_counter()
                functions[graph.name](*inputs)
                times[name].append(1000 * (time.perf_counter() - start))
        shape = " x ".join(map(str, inputs[0].shape))
        rows.append([graph.name, shape, *(f"{median(values[1:]):.3g}" for values in times.values())])
    return rows
