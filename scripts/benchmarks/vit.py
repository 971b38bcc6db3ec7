"""ViT against torchvision, timm and transformers, and its augmentation (vit_input.py).

The peers attend by PyTorch's fused kernel, infer in bf16 with converted weights and train in bf16 under autocast, as
they document. Their AdamW is fused, as transformers' trainer takes it by default; timm's plain one has a line of its
own. Weight decay spares what ours spares, and all clip gradients as our recipe does.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import optim
from common.config import build, construct
from common.device import autocast
from common.optim import OptimizerOptions
from common.randomness import generator
from common.step import Stepper
from scripts.benchmarks import vit_input
from scripts.benchmarks.timing import Row, Setting, alike, near
from scripts.benchmarks.vit_input import pictures
from scripts.benchmarks.vit_peers import CLASSES, PEERS, classifier, config, in_layout, peer

BATCH = 8
Pairs = list[tuple[str, str | tuple[str, ...]]]


def forward(setting: Setting) -> Row:
    """The logits of ViT-B/16 in evaluation mode."""
    recipe = config("vit_b16", tiny=setting.tiny)
    model = classifier(recipe).to(setting.device).eval()
    images = pictures(BATCH, recipe["data"]["image_size"][0]).to(setting.device)
    contenders: dict[str, Callable[[], Tensor]] = {}

    def add(name: str, model: nn.Module, images: Tensor, precision: str = "fp32") -> None:
        contenders[name] = lambda: _infer(model, images, precision)
        if setting.compile:
            compiled = torch.compile(model)
            contenders[f"{name} compiled"] = lambda: _infer(compiled, images, precision)

    for name in PEERS:
        theirs = peer(name, model, recipe).to(setting.device).eval()
        add(f"{name} fp32", theirs, images)
        add(f"{name} bf16", copy.deepcopy(theirs).bfloat16(), images.bfloat16())  # faster than autocast
    add("ours fp32", model, images)
    add("ours bf16", model, images, "bf16")

    def check() -> str:
        truth = contenders["torchvision fp32"]()
        exact = 1e-2 if setting.device.type == "cuda" else 1e-4  # CUDA's convolution of patches takes TF32
        others = [name for name in contenders if name != "torchvision fp32"]
        return "; ".join(
            near(f"{name} logits", contenders[name](), truth, exact if "fp32" in name else 0.1, along=0)
            for name in others
        )

    side = images.shape[-1]
    return Row(
        name=f"forward {BATCH}x3x{side}x{side}", contenders=contenders, pairs=_pairs(setting.compile), check=check
    )


def train(setting: Setting) -> Row:
    """A training step of ViT-S/16: forward, smoothed cross-entropy, backward, clipping, AdamW."""
    recipe = config("vit_s16", tiny=setting.tiny)
    model, side = classifier(recipe), recipe["data"]["image_size"][0]
    images = pictures(BATCH, side).to(setting.device)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator("labels")).to(setting.device)
    work = Work(recipe=recipe, images=images, labels=labels)
    learners: dict[str, Learner] = {}
    for compiled in (False, True) if setting.compile else (False,):
        for precision in ("fp32", "bf16"):
            name = f"{precision} compiled" if compiled else precision
            learners[f"ours {name}"] = _ours(work, copy.deepcopy(model), precision, compiled)
            for layout in PEERS:
                theirs = peer(layout, model, recipe)
                learners[f"{layout} {name}"] = _theirs(work, theirs, layout, precision, compiled)
    plain = _theirs(work, peer("timm", model, recipe), "timm", "fp32", compiled=False, fused=None)
    learners["timm fp32 plain AdamW"] = plain
    return Row(
        name=f"training step {BATCH}x3x{side}x{side}",
        contenders={name: learner.step for name, learner in learners.items()},
        pairs=[*_pairs(setting.compile), ("timm fp32", "timm fp32 plain AdamW")],
        check=lambda: _same_step(learners, dict(model.named_parameters())),
    )


def throughput(setting: Setting) -> Row:
    """A training step of ViT-B/16 in bf16 on as many images as keep a GPU busy, beside one large matrix product.

    The product shows what the device can do; operations are those of the model's products, counted by PyTorch.
    """
    recipe, device = config("vit_b16", tiny=setting.tiny), setting.device
    model, side = classifier(recipe), recipe["data"]["image_size"][0]
    batch = setting.batch or (128 if device.type == "cuda" else 2)
    images, labels = pictures(batch, side).to(device), torch.randint(0, CLASSES, (batch,)).to(device)
    work = Work(recipe=recipe, images=images, labels=labels)
    ours = _ours(work, copy.deepcopy(model), "bf16", setting.compile)
    timm = _theirs(work, peer("timm", model, recipe), "timm", "bf16", setting.compile)
    length = 8192 if device.type == "cuda" else 512 if setting.tiny else 2048
    one, other = (torch.randn(length, length, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = batch * operations(model, side)
    return Row(
        name=f"throughput {batch}x3x{side}x{side}, ViT-B/16, bf16{', compiled' if setting.compile else ''}",
        contenders={"ours": ours.step, "timm": timm.step, "matrix product": lambda: one @ other},
        pairs=[("ours", "timm")],
        check=lambda: alike("loss", ours.step(), timm.step(), 0.02),
        flops={"ours": flops, "timm": flops, "matrix product": 2.0 * length**3},
        limit="matrix product",
    )


def operations(model: nn.Module, side: int) -> float:
    """Floating-point operations of the products in a training step on one image, which needs no memory to count."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(torch.empty(1, 3, side, side, device="meta")).sum().backward()
    return float(counter.get_total_flops())


ROWS = {"forward": forward, "train": train, "throughput": throughput, "augment": vit_input.augment}


def _pairs(compiled: bool) -> Pairs:
    """Ours over each peer and over the fastest: like with like, and bf16 over fp32."""
    pairs: Pairs = []
    for kind in ("", " compiled") if compiled else ("",):
        for one, other in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            peers = tuple(f"{name} {other}{kind}" for name in PEERS)
            pairs += [(f"ours {one}{kind}", name) for name in peers]
            pairs.append((f"ours {one}{kind}", peers))
    if compiled:
        pairs.append(("ours bf16 compiled", tuple(f"{name} fp32" for name in PEERS)))
    return pairs


def _logits(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, K), from models that return them or an object with them."""
    outputs = model(images)
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return logits


def _infer(model: Callable[[Tensor], Any], images: Tensor, precision: str) -> Tensor:
    with torch.inference_mode(), autocast(images.device, precision):
        return _logits(model, images)


# Training.


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all learn from, and the recipe of ours."""

    recipe: dict[str, Any]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model, in whose names its parameters are, and what takes a step with it and returns the loss."""

    model: nn.Module
    layout: str | None  # None: ours
    step: Callable[[], Tensor]


class _FixedImages:
    """As much of a data set as a step needs: images that lie on the device."""

    def classes(self) -> list[str]:
        return [str(number) for number in range(CLASSES)]

    def inputs(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        images: Tensor = batch["images"].to(device)
        return images


def _ours(work: Work, model: nn.Module, precision: str, compiled: bool) -> Learner:
    """The trainer's own step."""
    recipe, device = work.recipe, work.images.device
    model.to(device).train()
    optimizer = optim.build(model, construct(OptimizerOptions, recipe["optimizer"]))
    if compiled:
        model.compile()
    task = build(recipe["task"], data=_FixedImages())
    stepper = Stepper(task, model, optimizer, device, precision, recipe["trainer"]["clip_norm"])
    batch = {"ids": [*range(len(work.labels))], "images": work.images, "labels": work.labels.cpu()}
    return Learner(model=model, layout=None, step=lambda: stepper([batch], 0)["loss"])


def _theirs(
    work: Work, model: nn.Module, layout: str, precision: str, compiled: bool, fused: bool | None = True
) -> Learner:
    """A plain loop."""
    device, adamw = work.images.device, work.recipe["optimizer"]
    smoothing, clip_norm = work.recipe["task"]["loss"]["smoothing"], work.recipe["trainer"]["clip_norm"]
    model.to(device).train()
    parameters = [*model.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": adamw["weight_decay"]},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        groups[parameter.squeeze().ndim < 2 or "pos" in name]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=adamw["lr"], fused=fused)
    if compiled:
        model.compile()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = F.cross_entropy(_logits(model, work.images), work.labels, label_smoothing=smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return loss.detach()

    return Learner(model=model, layout=layout, step=step)


def _same_step(learners: dict[str, Learner], before: dict[str, Tensor]) -> str:
    """Take every learner's first step, and compare losses, clipped gradients and updates with those of ours in fp32."""
    losses = {name: learner.step() for name, learner in learners.items()}
    truth, said = learners["ours fp32"], []
    weights, gradients = _weights(truth), _gradients(truth)
    cuda = losses["ours fp32"].device.type == "cuda"  # its convolution of patches takes TF32
    for name, learner in learners.items():
        if learner is truth:
            continue
        rounded = "bf16" in name
        said.append(alike(f"{name} loss", losses[name], losses["ours fp32"], 0.02 if rounded else 1e-4))
        expected = _flat(_placed(gradients, learner.layout))
        tolerance = 0.2 if rounded else 1e-2 if cuda else 1e-4
        said.append(near(f"{name} gradient", _flat(_gradients(learner)), expected, tolerance))
        if not rounded:  # Adam's first step goes by the gradient's sign, and small ones' would be bf16's
            start, ours = (_flat(_placed(tensors, learner.layout)) for tensors in (before, weights))
            # Key biases have gradients of nothing but rounding, and Adam makes steps of them.
            said.append(near(f"{name} update", _flat(_weights(learner)) - start, ours - start, 0.1 if cuda else 1e-2))
    return "; ".join(said)


def _weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().cpu() for name, p in learner.model.named_parameters()}


def _gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: p.grad.cpu() for name, p in learner.model.named_parameters() if p.grad is not None}


def _placed(tensors: dict[str, Tensor], layout: str | None) -> dict[str, Tensor]:
    return tensors if layout is None else in_layout(tensors, layout)


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])
