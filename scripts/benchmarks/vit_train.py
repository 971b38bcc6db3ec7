"""Benchmark training steps of ViT against its peers: the models of torchvision, timm and transformers.

In bf16, the peers train under autocast, as their documentation describes. The peers' AdamW is fused, which is the
default of transformers' Trainer. One more contender is timm's model with timm's default, an AdamW that is not fused.
Weight decay and gradient clipping are those of our config.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine.device import autocast
from common.machine.seeds import generator
from scripts.benchmarks import flops
from scripts.benchmarks.learning import Tensors, TrainingContender, compare_first_steps, stepper
from scripts.benchmarks.timing import Row, Setting, compare_numbers
from scripts.benchmarks.vit_forward import Pairs, logits, pairs
from scripts.benchmarks.vit_input import sample_images
from scripts.benchmarks.vit_peers import CLASSES, PEERS, classifier, config, peer, to_layout

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The config and the batch that all contenders share: images (B, 3, H, W) and labels (B,) int64."""

    recipe: dict[str, Any]
    images: Tensor
    labels: Tensor


def train(setting: Setting) -> Row:
    """Build a benchmark that times a training step of ViT-S/16 on a batch of BATCH images.

    The loss is cross-entropy with label smoothing. Gradients are clipped, and the optimizer is AdamW.
    """
    recipe = config("vit_s16", tiny=setting.tiny)
    workload, model = workload_of(recipe, BATCH, setting), classifier(recipe)
    peers = {layout: (peer(layout, model, recipe), partial(to_layout, layout=layout)) for layout in PEERS}
    contenders = training_contenders(setting, workload, model, peers)
    unfused = _theirs(workload, peer("timm", model, recipe), peers["timm"][1], "fp32", compiled=False, fused=None)
    contenders["timm fp32 plain AdamW"] = unfused
    ratios = [*pairs(contenders, compiled=setting.compile), ("timm fp32", "timm fp32 plain AdamW")]
    return training_row(setting, workload, model, contenders, ratios)


def training_contenders(
    setting: Setting,
    workload: Workload,
    model: nn.Module,
    peers: Mapping[str, tuple[nn.Module, Callable[[Tensors], Tensors]]],
) -> dict[str, TrainingContender]:
    """Make the contenders of a training benchmark: our `model` and its peers, in fp32 and bf16.

    `peers` holds each peer's model, and the function that converts our parameters to its names and shapes. Copies of
    the models are trained. With `setting.compile`, there are compiled contenders, too.
    """
    contenders: dict[str, TrainingContender] = {}
    for compiled in (False, True) if setting.compile else (False,):
        for precision in ("fp32", "bf16"):
            name = f"{precision} compiled" if compiled else precision
            contenders[f"ours {name}"] = _ours(workload, copy.deepcopy(model), precision, compiled)
            for layout, (theirs, from_ours) in peers.items():
                copied = copy.deepcopy(theirs)
                contenders[f"{layout} {name}"] = _theirs(workload, copied, from_ours, precision, compiled)
    return contenders


def training_row(
    setting: Setting,
    workload: Workload,
    model: nn.Module,
    contenders: Mapping[str, TrainingContender],
    ratios: Pairs,
) -> Row:
    """Build a benchmark that times training steps; `ratios` are the pairs of contenders that it compares."""
    cuda = setting.device.type == "cuda"  # on CUDA, the convolution of patches uses TF32
    return Row(
        name=f"training step {_shape(workload)}",
        contenders={name: contender.step for name, contender in contenders.items()},
        pairs=ratios,
        # Updates need a wide tolerance: the gradients of key biases are rounding errors, which Adam scales up.
        check=lambda: compare_first_steps(
            contenders,
            dict(model.named_parameters()),
            gradient_tolerance=1e-2 if cuda else 1e-4,
            update_tolerance=0.1 if cuda else 1e-2,
        ),
        amounts=dict.fromkeys(contenders, (len(workload.images), "images")),
        flops=flops.per_contender(contenders, _operations(model, workload)),
    )


def throughput(setting: Setting) -> Row:
    """Build a benchmark that times a training step of ViT-B/16 in bf16 on a large batch.

    The batch has `setting.batch` images; the default is 128 on CUDA, which keeps the GPU busy, and 2 on other devices.
    With `setting.compile`, only compiled models are timed.
    """
    recipe = config("vit_b16", tiny=setting.tiny)
    workload, model = workload_of(recipe, setting.batch_size(2, 128), setting), classifier(recipe)
    from_ours = partial(to_layout, layout="timm")
    contenders = {
        "ours bf16": _ours(workload, copy.deepcopy(model), "bf16", setting.compile),
        "timm bf16": _theirs(workload, peer("timm", model, recipe), from_ours, "bf16", setting.compile),
    }
    return Row(
        name=f"throughput {_shape(workload)}, ViT-B/16, bf16{', compiled' if setting.compile else ''}",
        contenders={name: contender.step for name, contender in contenders.items()},
        pairs=[("ours bf16", "timm bf16")],
        check=lambda: compare_numbers("loss", contenders["ours bf16"].step(), contenders["timm bf16"].step(), 0.02),
        amounts=dict.fromkeys(contenders, (len(workload.images), "images")),
        flops=flops.per_contender(contenders, _operations(model, workload)),
    )


class _FixedImages:
    """A substitute for a data set, with only the methods that the task calls."""

    def classes(self) -> list[str]:
        return [str(number) for number in range(CLASSES)]

    def inputs(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        images: Tensor = batch["images"].to(device)
        return images


def workload_of(recipe: dict[str, Any], batch: int, setting: Setting) -> Workload:
    """Make a workload of `batch` random images of the size in the config `recipe`, on the device."""
    images = sample_images(batch, recipe["data"]["image_size"][0]).to(setting.device)
    labels = torch.randint(0, CLASSES, (batch,), generator=generator("labels")).to(setting.device)
    return Workload(recipe=recipe, images=images, labels=labels)


def _shape(workload: Workload) -> str:
    return "x".join(str(length) for length in workload.images.shape)


def _operations(model: nn.Module, workload: Workload) -> float:
    return flops.operations(model, workload.images, training=True)


def _ours(workload: Workload, model: nn.Module, precision: str, compiled: bool) -> TrainingContender:
    """Make our contender, which runs an optimizer step of our trainer."""
    step = stepper(model.train(), workload.recipe, _FixedImages(), workload.images.device, precision, compiled=compiled)
    batch = {"ids": [*range(len(workload.labels))], "images": workload.images, "labels": workload.labels.cpu()}
    return TrainingContender(model=model, step=lambda: step([batch], 0)["loss"])


def _theirs(
    workload: Workload,
    model: nn.Module,
    from_ours: Callable[[Tensors], Tensors],
    precision: str,
    compiled: bool,
    fused: bool | None = True,
) -> TrainingContender:
    """Make a peer's contender, which runs a step of a plain training loop.

    `from_ours` converts our parameters to the names and shapes of the peer. `fused` is the option of torch.optim.AdamW;
    None is PyTorch's default. As in our config, vectors and tables of positions have no weight decay.
    """
    device, adamw = workload.images.device, workload.recipe["optimizer"]
    smoothing, clip_norm = workload.recipe["task"]["loss"]["smoothing"], workload.recipe["trainer"]["clip_norm"]
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
            loss = F.cross_entropy(logits(model, workload.images), workload.labels, label_smoothing=smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return loss.detach()

    return TrainingContender(model=model, step=step, from_ours=from_ours)
