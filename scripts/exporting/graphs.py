"""A traced function as a file, by torch.export (.pt2) or as ONNX, and back as something that can be called."""

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
from scripts.exporting.plan import Call, Graph, Size

Format = Literal["torch", "onnx"]
ENDINGS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx"}
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # which ONNX needs
LARGEST = 1_900_000_000  # bytes of weights inside an .onnx, whose format ends at 2 GiB; more lie in a file beside it


@torch.no_grad()
def trace(graph: Graph, sizes: Mapping[str, Size]) -> ExportedProgram:
    """One graph for all sizes that callers may choose; raises UserError for code that asks how large they are."""
    free = {
        name: {i: sizes[size].dim for i, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in graph.shapes.items()
    }
    try:
        with _quiet():
            return torch.export.export(
                graph.module,
                tuple(graph.inputs.values()),
                dynamic_shapes=tuple(free[name] for name in graph.inputs),
                # What is true of all sizes, but not seen to be (H W is no multiple of ...), is asserted in the graph.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except (torch._dynamo.exc.UserError, ValueError) as error:  # what it raises for a size that is not free
        lines = [line.strip(" -") for line in str(error).splitlines() if line.startswith("  - ")] or [str(error)]
        raise UserError(
            f"the model cannot be traced for every {', '.join(sizes)} ({lines[0][:200]}); it must not ask how large "
            "they are, nor use len(x), which is a plain number, where x.shape[0] is one of any size."
        ) from error


def write(program: ExportedProgram, graph: Graph, path: Path, format: Format) -> None:
    """Write a traced graph to `path`."""
    with _quiet():
        if format == "torch":
            torch.export.save(program, path)
            return
        named = {
            name: {i: size for i, size in enumerate(shape) if isinstance(size, str)}
            for name, shape in graph.shapes.items()
        }
        weights = sum(tensor.nbytes for tensor in program.state_dict.values())
        torch.onnx.export(
            program,
            (),
            path,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(named[name] for name in graph.inputs),  # by their names, for those who read the file
            external_data=weights > LARGEST,
            verbose=False,
        )


def read(path: Path, graph: Graph, format: Format) -> Call:
    """A written graph, from its file alone, on the CPU."""
    if format == "torch":
        with _quiet():
            module = torch.export.load(path).module()
        return lambda *inputs: dict(zip(graph.outputs, module(*inputs), strict=True))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> dict[str, Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(graph.inputs, inputs, strict=True)}
        return dict(zip(graph.outputs, map(torch.from_numpy, session.run(list(graph.outputs), given)), strict=True))

    return call


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the exporters say of their own inner life from the console; errors are raised all the same."""
    before: Any = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
