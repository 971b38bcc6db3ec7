"""Plan the export of an image GPT as one graph, from the colours of pixels to logits.

The graph computes all pixels of an image at once. It has no key-value cache: to sample with it, run it once per pixel.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from scripts.exporting.classification import preprocessing
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.verify.comparison import relative_difference
from vit.tasks.image_modelling import ImageModelling

SEED = 0
BATCH_SIZES = (1, 2, 5)


class NamedLogits(nn.Module):
    """An image GPT that returns its outputs as a plain tuple, to which `Graph.outputs` gives names."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        """Colours (B, N), booleans (B, N) for a masked model -> logits (B, N, V) and, if any, of classes (B, K)."""
        outputs = self.model(tokens) if masked is None else self.model(tokens, masked)
        return tuple(output for output in outputs if output is not None)


def plan(model: nn.Module, task: ImageModelling) -> Plan:
    """Plan the export for any batch size, and images of the task's size."""
    pixels = math.prod(task.data.image_size)
    shape: list[str | int] = ["batch", pixels]
    inputs, outputs = _sample_inputs(task, 3), {"colours": "(batch, pixels, colours): logits of each pixel's colour"}
    if task.classifies:
        outputs["classes"] = "(batch, classes): softmax makes them probabilities"
    graph = Graph("model", NamedLogits(model), inputs, dict.fromkeys(inputs, shape), outputs)
    metadata = {
        "kind": "image modelling",
        "objective": task.loss_options.objective,
        "classes": task.classes if task.classifies else [],
        "palette": [[float(value) for value in colour] for colour in task.palette.colours],
        "palette_of": "values in -1 to 1: rint(127.5 * (value + 1)) is a pixel's value; a pixel's index is that of the "
        "nearest colour",
        "preprocessing": preprocessing(task.data),
    }

    @torch.no_grad()
    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        comparisons = []
        for count in BATCH_SIZES:
            sample = _sample_inputs(task, count)
            computed, expected = functions["model"](*sample.values()), graph.module(*sample.values())
            for name, tensor in zip(outputs, expected, strict=True):
                comparisons.append(Comparison(f"{count} x {pixels}", name, relative_difference(computed[name], tensor)))
        return comparisons

    return Plan([graph], {"batch": Dimension(Dim("batch", min=1), "1 or more")}, metadata, {}, [], compare)


def _sample_inputs(task: ImageModelling, count: int) -> dict[str, Any]:
    """Sample colours and, for a masked model, masks of `count` images: (count, N) each."""
    random, pixels = torch.Generator().manual_seed(SEED + count), math.prod(task.data.image_size)
    inputs = {"tokens": torch.randint(len(task.palette), (count, pixels), generator=random)}
    if task.masks:
        inputs["masked"] = torch.rand(count, pixels, generator=random) < task.loss_options.masked
    return inputs
