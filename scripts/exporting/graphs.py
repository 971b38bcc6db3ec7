"""Trace graphs, write them by torch.export (.pt2) or as ONNX, and read them back as functions."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from common.errors import UserError
from scripts.exporting.plan import Dimension, Graph, GraphFunction

Format = Literal["torch", "onnx"]
ENDINGS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # needed for the export to ONNX
MAX_EMBEDDED_BYTES = 1_900_000_000  # an .onnx file holds at most 2 GiB; larger weights are written to a file beside it


@torch.no_grad()
def trace(graph: Graph, dimensions: Mapping[str, Dimension]) -> ExportedProgram:
    """Trace a graph for all lengths of its free dimensions (see plan.py).

    `dimensions` are the free dimensions by name. Raises UserError if tracing makes the length of a free dimension
    constant. This happens, for example, if the model's code branches on this length.
    """
    dynamic = {
        name: {i: dimensions[length].symbol for i, length in enumerate(shape) if isinstance(length, str)}
        for name, shape in graph.shapes.items()
    }
    try:
        with _silenced():
            return torch.export.export(
                graph.module,
                tuple(graph.inputs.values()),
                dynamic_shapes=tuple(dynamic[name] for name in graph.inputs),
                # Conditions that the tracer cannot prove for all lengths are checked when the graph runs.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except (torch._dynamo.exc.UserError, ValueError) as error:  # tracing made a length constant
        lines = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")] or [str(error)]
        raise UserError(
            f"the model cannot be traced for every {', '.join(dimensions)} ({lines[0][:200]}); it must not branch on "
            "these lengths, and must use x.shape[0], not len(x), which is a constant for the tracer."
        ) from error


def write(program: ExportedProgram, graph: Graph, path: Path, format: Format) -> None:
    """Write a traced graph to the file `path` in `format`."""
    with _silenced():
        if format == "torch":
            torch.export.save(program, path)
            return
        names = {
            name: {i: length for i, length in enumerate(shape) if isinstance(length, str)}
            for name, shape in graph.shapes.items()
        }
        weight_bytes = sum(tensor.nbytes for tensor in program.state_dict.values())
        torch.onnx.export(
            program,
            (),
            path,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(names[name] for name in graph.inputs),  # readable names in the file
            external_data=weight_bytes > MAX_EMBEDDED_BYTES,
            verbose=False,
        )


def read(path: Path, graph: Graph, format: Format) -> GraphFunction:
    """Read an exported graph from its file; returns a function that runs the graph on the CPU."""
    if format == "torch":
        with _silenced():
            module = torch.export.load(path).module()
        return lambda *inputs: dict(zip(graph.outputs, module(*inputs), strict=True))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> dict[str, Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(graph.inputs, inputs, strict=True)}
        return dict(zip(graph.outputs, map(torch.from_numpy, session.run(list(graph.outputs), arrays)), strict=True))

    return call


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress the exporters' log lines and warnings; errors are still raised."""
    level: Any = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
