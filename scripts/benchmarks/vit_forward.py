"""Benchmark forward passes of ViT-B/16 against its peers: the models of torchvision, timm and transformers.

For bf16, the weights of the peers are converted to bf16, and our model runs under autocast. On the CPU, inference
engines and PyTorch's libraries for int8 are timed, too (scripts/benchmarks/engines.py, quantisers.py).
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from common.machine.device import autocast
from scripts.benchmarks import flops, quantised
from scripts.benchmarks.engines import NO_ENGINES, Engines, engines
from scripts.benchmarks.engines import PAIRS as ENGINE_PAIRS
from scripts.benchmarks.quantisers import PAIRS as QUANTISER_PAIRS
from scripts.benchmarks.quantisers import quantisers
from scripts.benchmarks.timing import Row, Setting, compare_tensors
from scripts.benchmarks.vit_input import sample_images
from scripts.benchmarks.vit_peers import PEERS, classifier, config, peer

# The largest accepted difference of logits from fp32, relative to their deviation from the batch's mean. Random weights
# differ more than trained ones: Swin-T's logits in int8 by 0.12, and ViT-B's by 0.26 with torch.ao, which rounds the
# inputs of a linear map with one scale. Those of another model differ by more than 1. The first name that fits counts.
LIMITS = {"torch.ao": 0.4, "int8": 0.25, "bf16": 0.1}
Pairs = list[tuple[str, str | tuple[str, ...]]]


def latency(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass of one image."""
    return row(setting, batch=1, with_engines=True)


def forward(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass of `setting.batch` images (default: 128 on CUDA, otherwise 8)."""
    return row(setting, batch=setting.batch_size(8, 128), with_engines=True)


def row(
    setting: Setting,
    *,
    batch: int,
    side: int | None = None,
    peers: tuple[str, ...] = PEERS,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    with_engines: bool = False,
) -> Row:
    """Build a benchmark that times a forward pass in evaluation mode.

    The input is `batch` images of `side` x `side` pixels. If `side` is None, their size is that of the config. `peers`
    are the libraries of the other models. All models are timed in each of `precisions`; `with_engines` adds inference
    engines.
    """
    recipe = config("vit_b16", tiny=setting.tiny, side=side)
    model = classifier(recipe).eval()
    images = sample_images(batch, recipe["data"]["image_size"][0])
    others = NO_ENGINES
    if with_engines:
        others = engines(setting, model, images, ("logits",), onnx=True)
        others = others.and_also(quantisers(setting.device, model, images))
    return compare(setting, model, {name: peer(name, model, recipe) for name in peers}, images, precisions, others)


def compare(
    setting: Setting,
    model: nn.Module,
    peers: Mapping[str, nn.Module],
    images: Tensor,
    precisions: tuple[str, ...] = ("fp32", "bf16"),
    others: Engines = NO_ENGINES,
) -> Row:
    """Build a benchmark that times a forward pass of our `model` and of its `peers`, which have the same weights.

    `images` (B, 3, H, W) is the input. All models are timed in evaluation mode, in each of `precisions`. `others` are
    further contenders, which return a list with the logits.
    """
    model, images = model.to(setting.device).eval(), images.to(setting.device)
    contenders: dict[str, Callable[[], Tensor]] = {}

    def add(name: str, model: nn.Module, images: Tensor, precision: str = "fp32") -> None:
        contenders[name] = lambda: _infer(model, images, precision)
        if setting.compile:
            compiled = torch.compile(model)
            contenders[f"{name} compiled"] = lambda: _infer(compiled, images, precision)

    for name, theirs in peers.items():
        theirs.to(setting.device).eval()
        if "fp32" in precisions:
            add(f"{name} fp32", theirs, images)
        if "bf16" in precisions:
            add(f"{name} bf16", copy.deepcopy(theirs).bfloat16(), images.bfloat16())  # faster than autocast
    for precision in precisions:
        ours = copy.deepcopy(model)  # each copy has its own cache of packed weights
        add(f"ours {precision}", ours, images, precision)
    if "bf16" in precisions and quantised.is_supported(setting.device):
        ours = quantised.quantised(model, lambda model: model(images))
        contenders[quantised.NAME] = lambda: _infer(ours, images, "int8")
    for name, run in others.contenders.items():
        contenders[name] = partial(_first, run)

    def check() -> str:
        reference, *names = contenders
        expected = contenders[reference]()
        tolerance = 1e-2 if setting.device.type == "cuda" else 1e-4  # CUDA's convolution of patches uses TF32
        differences = [
            compare_tensors(
                f"{name} logits",
                contenders[name](),
                expected,
                next((limit for precision, limit in LIMITS.items() if precision in reference + name), tolerance),
                along=0 if len(images) > 1 else -1,
            )
            for name in names
        ]
        return "; ".join([*others.notes, *differences])

    operations = flops.operations(model, images, training=False)
    return Row(
        name=f"forward {'x'.join(str(length) for length in images.shape)}",
        contenders=contenders,
        pairs=[
            *pairs(contenders, tuple(peers), compiled=setting.compile),
            *(pair for pair in (*ENGINE_PAIRS, *QUANTISER_PAIRS) if contenders.keys() >= {*pair}),
        ],
        check=check,
        amounts=dict.fromkeys(contenders, (len(images), "images")),
        flops=flops.per_contender([name for name in contenders if "int8" not in name], operations),
    )


def pairs(contenders: Mapping[str, Any], peers: tuple[str, ...] = PEERS, *, compiled: bool) -> Pairs:
    """List the pairs (contender, reference) whose times are compared.

    Our model is paired with each peer and, if there are several, with the tuple of all peers, of which the fastest is
    the reference. Our model is paired with peers in the same precision; in bf16 and int8, it is paired with peers in
    fp32.
    If `compiled`, our compiled model is paired with compiled peers in the same way, and in bf16 also with the tuple of
    the eager peers in fp32. A pair is left out if `contenders` lacks one of its models in the precision of the pair.
    """
    pairs: Pairs = []
    for suffix in ("", " compiled") if compiled else ("",):
        for ours, theirs in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"), ("int8", "fp32")):
            if (suffix and ours == "int8") or not {f"ours {ours}", f"{peers[0]} {theirs}"} <= contenders.keys():
                continue
            references = tuple(f"{name} {theirs}{suffix}" for name in peers)
            pairs += [(f"ours {ours}{suffix}", reference) for reference in references]
            pairs += [(f"ours {ours}{suffix}", references)] if len(references) > 1 else []
    if compiled and {"ours bf16", f"{peers[0]} fp32"} <= contenders.keys():
        pairs.append(("ours bf16 compiled", tuple(f"{name} fp32" for name in peers)))
    return pairs


def logits(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """Return the logits (B, K) of K classes for images (B, 3, H, W).

    `model` returns the logits, or an object with the attribute `logits`.
    """
    outputs = model(images)
    tensor: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return tensor


def _infer(model: Callable[[Tensor], Any], images: Tensor, precision: str) -> Tensor:
    with torch.inference_mode(), autocast(images.device, precision):
        return logits(model, images)


def _first(run: Callable[[], list[Tensor]]) -> Tensor:
    return run()[0]
