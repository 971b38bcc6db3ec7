"""Logits of ViT-B/16 against torchvision, timm and transformers, which infer in bf16 with converted weights."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.machine.device import autocast
from scripts.benchmarks import flops
from scripts.benchmarks.timing import Row, Setting, near
from scripts.benchmarks.vit_input import pictures
from scripts.benchmarks.vit_peers import PEERS, classifier, config, peer

Pairs = list[tuple[str, str | tuple[str, ...]]]


def latency(setting: Setting) -> Row:
    """One image."""
    return row(setting, batch=1)


def forward(setting: Setting) -> Row:
    """As many images as keep the device busy."""
    return row(setting, batch=setting.at_once(8, 128))


def row(
    setting: Setting,
    *,
    batch: int,
    side: int | None = None,
    peers: tuple[str, ...] = PEERS,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
) -> Row:
    """The logits of `batch` images of side x side pixels (None: the preset's), in evaluation mode."""
    recipe = config("vit_b16", tiny=setting.tiny, side=side)
    model, side = classifier(recipe).to(setting.device).eval(), recipe["data"]["image_size"][0]
    images = pictures(batch, side).to(setting.device)
    contenders: dict[str, Callable[[], Tensor]] = {}

    def add(name: str, model: nn.Module, images: Tensor, precision: str = "fp32") -> None:
        contenders[name] = lambda: _infer(model, images, precision)
        if setting.compile:
            compiled = torch.compile(model)
            contenders[f"{name} compiled"] = lambda: _infer(compiled, images, precision)

    for name in peers:
        theirs = peer(name, model, recipe).to(setting.device).eval()
        if "fp32" in precisions:
            add(f"{name} fp32", theirs, images)
        if "bf16" in precisions:
            add(f"{name} bf16", copy.deepcopy(theirs).bfloat16(), images.bfloat16())  # faster than autocast
    for precision in precisions:
        add(f"ours {precision}", copy.deepcopy(model), images, precision)  # each keeps weights in its order

    def check() -> str:
        first, *others = contenders
        truth = contenders[first]()
        exact = 1e-2 if setting.device.type == "cuda" else 1e-4  # CUDA's convolution of patches takes TF32
        return "; ".join(
            near(
                f"{name} logits",
                contenders[name](),
                truth,
                0.1 if "bf16" in first + name else exact,
                along=0 if batch > 1 else -1,
            )
            for name in others
        )

    counted = flops.operations(model, images, training=False)
    return Row(
        name=f"forward {batch}x3x{side}x{side}",
        contenders=contenders,
        pairs=pairs(contenders, peers, compiled=setting.compile),
        check=check,
        amounts=dict.fromkeys(contenders, (batch, "images")),
        flops=flops.each(contenders, counted),
    )


def pairs(contenders: Mapping[str, Any], peers: tuple[str, ...] = PEERS, *, compiled: bool) -> Pairs:
    """Ours over each peer and over the fastest: like with like, and bf16 over fp32; of those that there are."""
    found: Pairs = []
    for kind in ("", " compiled") if compiled else ("",):
        for one, other in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            if not {f"ours {one}", f"{peers[0]} {other}"} <= contenders.keys():
                continue
            names = tuple(f"{name} {other}{kind}" for name in peers)
            found += [(f"ours {one}{kind}", name) for name in names]
            found += [(f"ours {one}{kind}", names)] if len(names) > 1 else []
    if compiled and {"ours bf16", f"{peers[0]} fp32"} <= contenders.keys():
        found.append(("ours bf16 compiled", tuple(f"{name} fp32" for name in peers)))
    return found


def logits(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, K), from models that return them or an object with them."""
    outputs = model(images)
    found: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return found


def _infer(model: Callable[[Tensor], Any], images: Tensor, precision: str) -> Tensor:
    with torch.inference_mode(), autocast(images.device, precision):
        return logits(model, images)
