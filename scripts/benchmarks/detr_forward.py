"""Answers of DETR-R50 against transformers', which runs as it documents: by PyTorch's fused kernel, in bf16 converted.

Its eager attention and PyTorch's channels_last memory format, which it does not document, have lines of their own.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.machine.device import autocast
from scripts.benchmarks import flops
from scripts.benchmarks.detr_input import pictures
from scripts.benchmarks.detr_peer import detector, peer
from scripts.benchmarks.timing import Row, Setting, near

BOTH = ("transformers fp32", "transformers bf16", "ours fp32", "ours bf16")
EAGER, CHANNELS_LAST = "transformers fp32 eager", "transformers fp32 channels_last"
PAIRS: list[tuple[str, str | tuple[str, ...]]] = [
    ("ours fp32", "transformers fp32"),
    ("ours bf16", "transformers fp32"),
    ("ours bf16", "transformers bf16"),
    (EAGER, "transformers fp32"),
    (CHANNELS_LAST, "transformers fp32"),
    ("ours fp32 compiled", "transformers fp32 compiled"),
    ("ours bf16 compiled", "transformers fp32"),
    ("ours bf16 compiled", "transformers bf16 compiled"),
]


def latency(setting: Setting) -> Row:
    """One image."""
    return row(setting, batch=1, names=(*BOTH, EAGER, CHANNELS_LAST))


def forward(setting: Setting) -> Row:
    """As many images as keep the device busy."""
    return row(setting, batch=setting.at_once(2 if setting.tiny else 8, 32))


def row(
    setting: Setting,
    *,
    batch: int,
    names: Sequence[str] = BOTH,
    size: tuple[int, int] | None = None,
    queries: int = 100,
) -> Row:
    """The answers to `batch` images of `size` (height, width; None: the paper's largest), in evaluation mode.

    `names` are the contenders, the first of them the one with which all others are compared.
    """
    device, (height, width) = setting.device, size or ((96, 128) if setting.tiny else (800, 1066))
    model = detector(f"model.queries={queries}").to(device).eval()
    images = pictures(batch, height, width, device)[1]
    contenders: dict[str, Callable[[], list[Tensor]]] = {}
    for name in names:
        for compiled in (False, True) if setting.compile and name in BOTH else (False,):
            contenders[f"{name} compiled" if compiled else name] = _contender(name, model, images, compiled)

    def check() -> str:
        first, *others = contenders
        truth, said = contenders[first](), []
        exact = 0.03 if device.type == "cuda" else 1e-3  # CUDA's convolutions take TF32; a wrong weight is 0.1 or more
        for name in others:
            for what, one, other in zip(("logits", "boxes"), contenders[name](), truth, strict=True):
                if "bf16" in first + name:
                    said.append(near(f"{name} {what}", one, other, 0.15))
                else:
                    said.append(near(f"{name} {what}", one, other, exact, along=-2))
        return "; ".join(said)

    counted = flops.operations(model, images, None, training=False)
    return Row(
        name=f"forward {batch}x3x{height}x{width}{'' if queries == 100 else f', {queries} queries'}",
        contenders=contenders,
        pairs=[(one, other) for one, other in PAIRS if one in contenders and other in contenders],
        check=check,
        amounts=dict.fromkeys(contenders, (batch, "images")),
        flops=flops.each(contenders, counted),
    )


def _contender(name: str, model: nn.Module, images: Tensor, compiled: bool) -> Callable[[], list[Tensor]]:
    """Logits (B, Q, K + 1) and boxes (B, Q, 4) of the last layer, by the contender of that name."""
    if name.startswith("ours"):
        own = copy.deepcopy(model)  # which keeps weights in its precision
        run = torch.compile(own) if compiled else own
        return lambda: _our(run, images, name.split()[1])
    theirs = peer(model, attention="eager" if name == EAGER else "sdpa").to(images.device).eval()
    given = images if name == CHANNELS_LAST else images.contiguous()
    if name == CHANNELS_LAST:
        theirs = theirs.to(memory_format=torch.channels_last)
    elif "bf16" in name:  # converted weights, faster than autocast
        theirs, given = theirs.bfloat16(), given.bfloat16()
    called = torch.compile(theirs) if compiled else theirs
    return lambda: _their(called, given)


def _our(model: Callable[..., list[dict[str, Tensor]]], images: Tensor, precision: str) -> list[Tensor]:
    with torch.inference_mode(), autocast(images.device, precision):
        outputs = model(images, None)[-1]
    return [outputs["logits"], outputs["boxes_cxcywh"]]


def _their(model: Callable[..., Any], images: Tensor) -> list[Tensor]:
    with torch.inference_mode():
        outputs = model(pixel_values=images)
    return [outputs.logits, outputs.pred_boxes]
