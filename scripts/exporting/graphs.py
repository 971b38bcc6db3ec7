"""Trace graphs, write them by torch.export (.pt2), as ONNX or for OpenVINO, and read them back as functions."""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram

from common.errors import UserError
from scripts.exporting.openvino_attention import rewrite_attention_of_one_query
from scripts.exporting.plan import Dimension, Graph, GraphFunction

Format = Literal["torch", "onnx", "onnx_int8", "openvino"]
ENDINGS: dict[Format, str] = {"torch": ".pt2", "onnx": ".onnx", "onnx_int8": ".int8.onnx", "openvino": ".xml"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
PACKAGES: dict[str, tuple[str, ...]] = {  # needed for the export, besides torch
    "torch": (),
    "onnx": ONNX_PACKAGES,
    "onnx_int8": ONNX_PACKAGES,
    "openvino": (*ONNX_PACKAGES[:2], "openvino"),
}
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
        elif format == "onnx":
            _write_onnx(program, graph, path)
        else:
            with TemporaryDirectory(dir=path.parent) as folder:
                _write_onnx(program, graph, source := Path(folder, "model.onnx"))
                with _one_sentence(graph, format):
                    (_write_int8 if format == "onnx_int8" else _write_openvino)(source, path)


def _write_onnx(program: ExportedProgram, graph: Graph, path: Path) -> None:
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


def _write_int8(source: Path, path: Path) -> None:
    """Quantise the linear maps of an ONNX file to int8, with a scale per channel; their inputs are when it runs."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # the exporter's shapes of intermediate tensors, which the quantiser contradicts
    _copy_shared_weights(model.graph)
    large = sum(len(weight.raw_data) for weight in model.graph.initializer) > MAX_EMBEDDED_BYTES
    options = {"per_channel": True, "op_types_to_quantize": ["MatMul", "Gemm"], "use_external_data_format": large}
    quantize_dynamic(model, path, weight_type=QuantType.QInt8, **options)


def _copy_shared_weights(graph: Any) -> None:
    """Give each linear map its own copy of a weight that other nodes use, too, such as a tied embedding.

    The quantiser transposes the weights of a Gemm in place.
    """
    weights = {weight.name: weight for weight in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        for i, name in enumerate(node.input):
            if node.op_type in ("Gemm", "MatMul") and name in weights and uses[name] > 1:
                graph.initializer.append(weights[name])
                graph.initializer[-1].name = node.input[i] = f"{name} of {node.name}"


def _write_openvino(source: Path, path: Path) -> None:
    """Convert an ONNX file to OpenVINO's, in fp32: `path`, and the weights in a file of the same name with .bin."""
    import openvino

    model = openvino.convert_model(source)
    rewrite_attention_of_one_query(model)
    openvino.save_model(model, path, compress_to_fp16=False)


def read(path: Path, graph: Graph, format: Format) -> GraphFunction:
    """Read an exported graph from its file; returns a function that runs the graph on the CPU.

    Raises UserError if the library that converted the graph cannot read the result.
    """
    if format == "torch":
        with _silenced():
            module = torch.export.load(path).module()
        return lambda *inputs: dict(zip(graph.outputs, module(*inputs), strict=True))
    with _one_sentence(graph, format):
        return _read_openvino(path, graph) if format == "openvino" else _read_onnx(path, graph)


def _read_openvino(path: Path, graph: Graph) -> GraphFunction:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def call(*inputs: Tensor) -> dict[str, Tensor]:
        results = compiled([tensor.numpy() for tensor in inputs])
        return {name: torch.from_numpy(results[i].copy()) for i, name in enumerate(graph.outputs)}

    return call


def _read_onnx(path: Path, graph: Graph) -> GraphFunction:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(*inputs: Tensor) -> dict[str, Tensor]:
        arrays = {name: tensor.numpy() for name, tensor in zip(graph.inputs, inputs, strict=True)}
        return dict(zip(graph.outputs, map(torch.from_numpy, session.run(list(graph.outputs), arrays)), strict=True))

    return call


@contextmanager
def _one_sentence(graph: Graph, format: Format) -> Iterator[None]:
    """Raise a UserError in place of the errors of onnxruntime and OpenVINO, which are of many classes."""
    try:
        yield
    except OSError:
        raise  # a full disk
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--format {format}: the library that converts the graph {graph.name!r} cannot do so ({reason}); give "
            "--format torch,onnx."
        ) from error


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
