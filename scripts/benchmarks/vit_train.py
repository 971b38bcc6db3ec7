"""Training steps of ViT against torchvision, timm and transformers.

The peers train in bf16 under autocast, as they document. Their AdamW is fused, as transformers' trainer takes it by
default; timm's plain one has a line of its own. Weight decay spares what ours spares, and all clip gradients as our
recipe does.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.device import autocast
from common.machine.seeds import generator
from scripts.benchmarks import flops
from scripts.benchmarks.learning import Learner, same_step, stepper
from scripts.benchmarks.timing import Row, Setting, alike
from scripts.benchmarks.vit_forward import logits, pairs
from scripts.benchmarks.vit_input import pictures
from scripts.benchmarks.vit_peers import CLASSES, PEERS, classifier, config, in_layout, peer

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all learn from, and the recipe of ours."""

    recipe: dict[str, Any]
    images: Tensor
    labels: Tensor


def train(setting: Setting) -> Row:
    """A training step of ViT-S/16: forward, smoothed cross-entropy, backward, clipping, AdamW."""
    work = _work("vit_s16", BATCH, setting)
    model = classifier(work.recipe)
    learners: dict[str, Learner] = {}
    for compiled in (False, True) if setting.compile else (False,):
        for precision in ("fp32", "bf16"):
            name = f"{precision} compiled" if compiled else precision
            learners[f"ours {name}"] = _ours(work, copy.deepcopy(model), precision, compiled)
            for layout in PEERS:
                theirs = peer(layout, model, work.recipe)
                learners[f"{layout} {name}"] = _theirs(work, theirs, layout, precision, compiled)
    plain = _theirs(work, peer("timm", model, work.recipe), "timm", "fp32", compiled=False, fused=None)
    learners["timm fp32 plain AdamW"] = plain
    cuda = setting.device.type == "cuda"  # its convolution of patches takes TF32
    return Row(
        name=f"training step {_shape(work)}",
        contenders={name: learner.step for name, learner in learners.items()},
        pairs=[*pairs(learners, compiled=setting.compile), ("timm fp32", "timm fp32 plain AdamW")],
        # Key biases have gradients of nothing but rounding, and Adam makes steps of them.
        check=lambda: same_step(
            learners, dict(model.named_parameters()), gradient=1e-2 if cuda else 1e-4, update=0.1 if cuda else 1e-2
        ),
        amounts=dict.fromkeys(learners, (BATCH, "images")),
        flops=flops.each(learners, _operations(model, work)),
    )


def throughput(setting: Setting) -> Row:
    """A training step of ViT-B/16 in bf16 on as many images as keep a GPU busy."""
    work = _work("vit_b16", setting.at_once(2, 128), setting)
    model = classifier(work.recipe)
    learners = {
        "ours bf16": _ours(work, copy.deepcopy(model), "bf16", setting.compile),
        "timm bf16": _theirs(work, peer("timm", model, work.recipe), "timm", "bf16", setting.compile),
    }
    return Row(
        name=f"throughput {_shape(work)}, ViT-B/16, bf16{', compiled' if setting.compile else ''}",
        contenders={name: learner.step for name, learner in learners.items()},
        pairs=[("ours bf16", "timm bf16")],
        check=lambda: alike("loss", *(learner.step() for learner in learners.values()), 0.02),
        amounts=dict.fromkeys(learners, (len(work.images), "images")),
        flops=flops.each(learners, _operations(model, work)),
    )


class _FixedImages:
    """As much of a data set as a step needs: images that lie on the device."""

    def classes(self) -> list[str]:
        return [str(number) for number in range(CLASSES)]

    def inputs(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        images: Tensor = batch["images"].to(device)
        return images


def _work(preset: str, batch: int, setting: Setting) -> Work:
    recipe = config(preset, tiny=setting.tiny)
    images = pictures(batch, recipe["data"]["image_size"][0]).to(setting.device)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator("labels")).to(setting.device)
    return Work(recipe=recipe, images=images, labels=labels)


def _shape(work: Work) -> str:
    return "x".join(str(size) for size in work.images.shape)


def _operations(model: nn.Module, work: Work) -> float:
    return flops.operations(model, work.images, training=True)


def _ours(work: Work, model: nn.Module, precision: str, compiled: bool) -> Learner:
    """The trainer's own step."""
    step = stepper(model.train(), work.recipe, _FixedImages(), work.images.device, precision, compiled=compiled)
    batch = {"ids": [*range(len(work.labels))], "images": work.images, "labels": work.labels.cpu()}
    return Learner(model=model, step=lambda: step([batch], 0)["loss"])


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
            loss = F.cross_entropy(logits(model, work.images), work.labels, label_smoothing=smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return loss.detach()

    return Learner(model=model, step=step, placed=partial(in_layout, layout=layout))
