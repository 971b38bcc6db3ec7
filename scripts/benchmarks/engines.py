"""Inference engines as contenders: OpenVINO in fp32, bf16 and int8, and ONNX Runtime in int8, on the CPU.

They run our own model as scripts/export.py exports it, with its weights, traced for the shape of the benchmark's input.
OpenVINO's int8 is the post-training quantisation of NNCF for Transformers, calibrated on the benchmark's input. Where
the processor has bf16, the operations that NNCF leaves in floats are computed in bf16, which is OpenVINO's default.
ONNX Runtime quantises the weights of linear maps in advance and their inputs in each call, as its documentation advises
for Transformers. Models are compiled before they are timed, for the latency of one call, and use as many threads as
PyTorch. Their threads do not spin between calls, which would take a core from the next contender.
"""

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scripts.benchmarks import quantised
from scripts.benchmarks.timing import Setting
from scripts.exporting import graphs
from scripts.exporting.plan import Graph

OPENVINO = {"OpenVINO fp32": "f32", "OpenVINO bf16": "bf16"}  # name -> INFERENCE_PRECISION_HINT
OPENVINO_INT8, ONNX_INT8 = "OpenVINO int8", "ONNX Runtime int8"
PAIRS: list[tuple[str, str | tuple[str, ...]]] = [
    ("ours fp32", "OpenVINO fp32"),
    ("ours bf16", "OpenVINO bf16"),
    (quantised.NAME, OPENVINO_INT8),
    (quantised.NAME, ONNX_INT8),
]


class Engines(NamedTuple):
    """The contenders that engines run, and notes on those that are missing."""

    contenders: Mapping[str, Callable[[], list[Tensor]]]  # each returns the outputs of the graph
    notes: list[str]

    def and_also(self, others: "Engines") -> "Engines":
        """These contenders and notes, followed by those of `others`."""
        return Engines({**self.contenders, **others.contenders}, [*self.notes, *others.notes])


NO_ENGINES = Engines({}, [])


def engines(setting: Setting, model: nn.Module, images: Tensor, outputs: tuple[str, ...], *, onnx: bool) -> Engines:
    """Make the contenders for a model from images (B, 3, H, W) to a tensor or to a tuple of the tensors `outputs`.

    With `onnx`, they include ONNX Runtime. Files that already lie in `setting.scratch` are read again, so that a second
    process does not convert the model again.
    """
    if setting.device.type != "cpu":
        return Engines({}, ["OpenVINO and ONNX Runtime are timed on the CPU only"])
    images = images.contiguous()
    graph = Graph(
        "engines", model, {"images": images}, {"images": list(images.shape)}, dict.fromkeys(outputs, "an output")
    )
    contenders: dict[str, Callable[[], list[Tensor]]] = {}
    notes: list[str] = []
    if is_installed(notes, "OpenVINO", "openvino", "onnx", "onnxscript"):
        contenders |= _openvino(graph, setting.scratch, notes)
    if onnx and is_installed(notes, ONNX_INT8, "onnxruntime", "onnx", "onnxscript"):
        contenders[ONNX_INT8] = _onnx_runtime(graph, setting.scratch)
    return Engines(contenders, notes)


def is_installed(notes: list[str], name: str, *packages: str) -> bool:
    """Whether all packages of a contender are installed; adds a note otherwise."""
    missing = [package for package in packages if not util.find_spec(package)]
    if missing:
        notes.append(f"{name} was not timed, because {missing[0]} is not installed (pip install {' '.join(packages)})")
    return not missing


def _openvino(graph: Graph, folder: Path, notes: list[str]) -> dict[str, Callable[[], list[Tensor]]]:
    import openvino

    core = openvino.Core()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    source = _exported(graph, folder, "openvino")
    images = graph.inputs["images"].numpy()

    def contender(path: Path, precision: str) -> Callable[[], list[Tensor]]:
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        compiled = core.compile_model(path, "CPU", {**options, "INFERENCE_PRECISION_HINT": precision})
        return lambda: [torch.from_numpy(output) for output in compiled([images]).values()]

    contenders = {
        name: contender(source, precision) for name, precision in OPENVINO.items() if has_bf16 or precision != "bf16"
    }
    notes += [] if has_bf16 else ["OpenVINO does not compute in bf16 on this CPU"]
    if is_installed(notes, OPENVINO_INT8, "nncf"):
        quantised_model = _quantised(core, source, images, folder / "openvino_int8.xml")
        contenders[OPENVINO_INT8] = contender(quantised_model, "bf16" if has_bf16 else "f32")
    return contenders


def _quantised(core: Any, source: Path, images: Any, path: Path) -> Path:
    """Quantise the OpenVINO model `source` to int8, calibrated on `images`; returns the file of the result, `path`."""
    if not path.exists():
        import nncf
        import openvino

        with redirect_stdout(io.StringIO()):  # of NNCF's progress bars
            model = nncf.quantize(
                core.read_model(source), nncf.Dataset([images]), model_type=nncf.ModelType.TRANSFORMER, subset_size=1
            )
        openvino.save_model(model, path, compress_to_fp16=False)
    return path


def _onnx_runtime(graph: Graph, folder: Path) -> Callable[[], list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # at the end of each call
    session = onnxruntime.InferenceSession(
        _exported(graph, folder, "onnx_int8"), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"images": graph.inputs["images"].numpy()}
    return lambda: [torch.from_numpy(output) for output in session.run(None, inputs)]


def _exported(graph: Graph, folder: Path, form: graphs.Format) -> Path:
    """Export a graph in a format, unless its file exists; returns the file."""
    path = folder / f"{graph.name}{graphs.ENDINGS[form]}"
    if not path.exists():
        graphs.write(graphs.trace(graph, {}), graph, path, form)
    return path
