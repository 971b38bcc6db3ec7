"""Benchmark forward passes of DETR-R50 against transformers.

The model of transformers uses PyTorch's fused attention and, for bf16, weights converted to bf16, as the documentation
of transformers advises. The benchmark `latency` has more contenders: the model of transformers with eager attention,
and with PyTorch's channels_last memory format, and on the CPU OpenVINO (scripts/benchmarks/engines.py).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.machine.device import autocast
from detr.models.detector import Detector
from scripts.benchmarks import flops, quantised
from scripts.benchmarks.detr_input import sample_images
from scripts.benchmarks.detr_peer import detector, peer
from scripts.benchmarks.engines import NO_ENGINES, engines
from scripts.benchmarks.engines import PAIRS as ENGINE_PAIRS
from scripts.benchmarks.timing import Row, Setting, compare_tensors

OUTPUTS = ("logits", "boxes")
CONTENDERS = ("transformers fp32", "transformers bf16", "ours fp32", "ours bf16")
EAGER, CHANNELS_LAST = "transformers fp32 eager", "transformers fp32 channels_last"
PAIRS: list[tuple[str, str | tuple[str, ...]]] = [
    ("ours fp32", "transformers fp32"),
    ("ours bf16", "transformers fp32"),
    ("ours bf16", "transformers bf16"),
    (quantised.NAME, "transformers fp32"),
    (EAGER, "transformers fp32"),
    (CHANNELS_LAST, "transformers fp32"),
    ("ours fp32 compiled", "transformers fp32 compiled"),
    ("ours bf16 compiled", "transformers fp32"),
    ("ours bf16 compiled", "transformers bf16 compiled"),
    *ENGINE_PAIRS,
]
NO_ONNX_NOTE = (
    "ONNX Runtime was not timed, because its int8 of linear maps leaves convolutions, most of the work, in fp32"
)


class LastLayer(nn.Module):
    """A detector that returns the outputs of its last decoder layer as a tuple of tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) -> logits (B, Q, K + 1) of K classes, and boxes (B, Q, 4), cxcywh."""
        outputs = self.model(images, None)[-1]
        return outputs["logits"], outputs["boxes_cxcywh"]


def latency(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass of one image."""
    return row(setting, batch=1, names=(*CONTENDERS, EAGER, CHANNELS_LAST), with_engines=True)


def forward(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass of a batch.

    The batch has `setting.batch` images; the default is 32 on CUDA, which keeps the GPU busy, and 8 on other devices (2
    with `setting.tiny`).
    """
    return row(setting, batch=setting.batch_size(2 if setting.tiny else 8, 32))


def row(
    setting: Setting,
    *,
    batch: int,
    names: Sequence[str] = CONTENDERS,
    size: tuple[int, int] | None = None,
    queries: int = 100,
    with_engines: bool = False,
) -> Row:
    """Build a benchmark that times a forward pass of `batch` images of `size` (height, width), in evaluation mode.

    If `size` is None, images are 800 x 1066 pixels, or 96 x 128 if `setting.tiny`. `names` are the contenders. With
    `setting.compile`, those in CONTENDERS are also timed under torch.compile. `with_engines` adds OpenVINO. The outputs
    of all other contenders are compared with those of the first.
    """
    device, (height, width) = setting.device, size or ((96, 128) if setting.tiny else (800, 1066))
    model = detector(f"model.queries={queries}").to(device).eval()
    images = sample_images(batch, height, width, device)[1]
    contenders: dict[str, Callable[[], list[Tensor]]] = {}
    for name in names:
        for compiled in (False, True) if setting.compile and name in CONTENDERS else (False,):
            contenders[f"{name} compiled" if compiled else name] = _contender(name, model, images, compiled)
    if "ours bf16" in names and quantised.is_supported(device):
        ours = quantised.quantised(model, lambda model: model(images, None))
        contenders[quantised.NAME] = lambda: _run_ours(ours, images, "int8")
    others = engines(setting, LastLayer(model), images, OUTPUTS, onnx=False) if with_engines else NO_ENGINES
    contenders |= others.contenders

    def check() -> str:
        reference, *names = contenders
        expected, differences = contenders[reference](), []
        tolerance = 0.03 if device.type == "cuda" else 1e-3  # CUDA's convolutions use TF32; a wrong weight gives >= 0.1
        for name in names:
            for output, tensor, target in zip(OUTPUTS, contenders[name](), expected, strict=True):
                if any(precision in reference + name for precision in ("bf16", "int8")):
                    differences.append(compare_tensors(f"{name} {output}", tensor, target, 0.15))
                else:
                    differences.append(compare_tensors(f"{name} {output}", tensor, target, tolerance, along=-2))
        notes = [*others.notes, *([NO_ONNX_NOTE] if with_engines else [])]
        return "; ".join([*notes, *differences])

    operations = flops.operations(model, images, None, training=False)
    return Row(
        name=f"forward {batch}x3x{height}x{width}{'' if queries == 100 else f', {queries} queries'}",
        contenders=contenders,
        pairs=[pair for pair in PAIRS if all(name in contenders for name in pair)],
        check=check,
        amounts=dict.fromkeys(contenders, (batch, "images")),
        flops=flops.per_contender([name for name in contenders if "int8" not in name], operations),
    )


def _contender(name: str, model: Detector, images: Tensor, compiled: bool) -> Callable[[], list[Tensor]]:
    """Make a function that runs a contender.

    The function returns the last layer's logits (B, Q, K + 1) for K classes, and its boxes (B, Q, 4), cxcywh relative
    to the image.
    """
    if name.startswith("ours"):
        ours = copy.deepcopy(model)  # a copy, so that contenders do not share a cache of packed weights
        function = torch.compile(ours) if compiled else ours
        return lambda: _run_ours(function, images, name.split()[1])
    theirs = peer(model, attention="eager" if name == EAGER else "sdpa").to(images.device).eval()
    inputs = images if name == CHANNELS_LAST else images.contiguous()
    if name == CHANNELS_LAST:
        theirs = theirs.to(memory_format=torch.channels_last)
    elif "bf16" in name:  # converted weights are faster than autocast
        theirs, inputs = theirs.bfloat16(), inputs.bfloat16()
    function = torch.compile(theirs) if compiled else theirs
    return lambda: _run_theirs(function, inputs)


def _run_ours(model: Callable[..., list[dict[str, Tensor]]], images: Tensor, precision: str) -> list[Tensor]:
    with torch.inference_mode(), autocast(images.device, precision):
        outputs = model(images, None)[-1]
    return [outputs["logits"], outputs["boxes_cxcywh"]]


def _run_theirs(model: Callable[..., Any], images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        outputs = model(pixel_values=images)
    return [outputs.logits, outputs.pred_boxes]
