"""Benchmarks of Deformable DETR (`model=deformable_detr_r50`) against transformers.

ROWS maps the names of the benchmarks to the functions that build them. transformers samples the levels by PyTorch's
`grid_sample`, as it does wherever its CUDA kernel cannot be loaded. Its encoder has one more dropout than the official
code, of its input. Its bf16 is autocast, because on the CPU its outputs were not finite with weights converted to bf16
for most of the image sizes that were tried (transformers 5.23).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.machine.device import autocast
from detr.models.deformable_detector import DeformableDetector
from scripts.benchmarks import flops
from scripts.benchmarks.deformable_peer import CLASSES, config, detector, peer
from scripts.benchmarks.detr_input import sample_images
from scripts.benchmarks.detr_train import as_transformers, sample_batch
from scripts.benchmarks.learning import stepper
from scripts.benchmarks.timing import Row, Setting, compare_numbers, compare_tensors

Work = Callable[[], list[Tensor]]
CONTENDERS = ("transformers fp32", "transformers bf16", "ours fp32", "ours bf16")
THEIRS = CONTENDERS[:2]
PAIRS: list[tuple[str, str | tuple[str, ...]]] = [
    ("ours fp32", "transformers fp32"),
    ("ours bf16", "transformers fp32"),
    ("ours bf16", "transformers bf16"),
    ("ours fp32", THEIRS),
    ("ours bf16", THEIRS),
]


def forward(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass in evaluation mode.

    The batch has `setting.batch` images of 800 x 1066 pixels (96 x 128 with `setting.tiny`); the default is 8 on CUDA
    and 1 on other devices.
    """
    batch, (height, width) = setting.batch_size(1, 8), (96, 128) if setting.tiny else (800, 1066)
    model = detector().to(setting.device).eval()
    images = sample_images(batch, height, width, setting.device)[1]
    contenders = {name: _forward(name, model, images) for name in CONTENDERS}

    def check() -> str:
        expected, differences = contenders["transformers fp32"](), []
        for name in CONTENDERS[1:]:
            for output, tensor, target in zip(("logits", "boxes"), contenders[name](), expected, strict=True):
                tolerance = 0.15 if "bf16" in name else 0.03 if setting.device.type == "cuda" else 1e-3
                along = None if "bf16" in name else -2
                differences.append(compare_tensors(f"{name} {output}", tensor, target, tolerance, along=along))
        return "; ".join(differences)

    return Row(
        name=f"forward {batch}x3x{height}x{width}",
        contenders=contenders,
        pairs=PAIRS,
        check=check,
        amounts=dict.fromkeys(contenders, (batch, "images")),
        flops=flops.per_contender(contenders, flops.operations(model, images, None, training=False)),
    )


def _forward(name: str, model: DeformableDetector, images: Tensor) -> Work:
    """Make a function that returns a contender's logits (B, Q, K) and boxes (B, Q, 4) of the last layer."""
    if name.startswith("ours"):
        ours = copy.deepcopy(model)  # a copy, so that contenders do not share a cache of packed weights

        def run_ours() -> list[Tensor]:
            with torch.inference_mode(), autocast(images.device, name.split()[1]):
                outputs = ours(images, None)[-1]
            return [outputs["logits"], outputs["boxes_cxcywh"]]

        return run_ours
    theirs, inputs = peer(model).to(images.device).eval(), images.contiguous()

    def run_theirs() -> list[Tensor]:
        with torch.inference_mode(), autocast(images.device, name.split()[1]):
            outputs = theirs(pixel_values=inputs)
        return [outputs.logits, outputs.pred_boxes]

    return run_theirs


def step(setting: Setting) -> Row:
    """Build a benchmark that times a training step: forward and backward pass, gradient clipping and AdamW.

    The loss is that of all decoder layers. The batch has two images with 10 objects each. The backbone's stem and first
    stage are frozen, as in the official code.
    """
    device, side, counts = setting.device, 96 if setting.tiny else 512, [10, 10]
    batch, floats, boxes = sample_batch(counts, side, device)
    labels = batch["labels"]
    model, targets = detector(), as_transformers(boxes, labels, counts)

    def work(name: str, training: bool = True) -> Work:
        precision = name.split()[1]
        if name.startswith("ours"):
            return _our_step(copy.deepcopy(model).train(training), batch, device, precision)
        theirs = peer(model, auxiliary_loss=True).to(device).train(training)
        return _their_step(theirs, floats.contiguous(), targets, precision)

    def check() -> str:
        ours, theirs = work("ours fp32", False)(), work("transformers fp32", False)()
        names = ("loss", "gradient norm")
        return "without dropout: " + "; ".join(
            compare_numbers(*compared, 1e-3) for compared in zip(names, ours, theirs, strict=True)
        )

    contenders = {name: work(name) for name in CONTENDERS}
    return Row(
        name=f"training step {len(counts)}x3x{side}x{side}, {counts[0]} boxes each",
        contenders=contenders,
        pairs=PAIRS,
        check=check,
        amounts=dict.fromkeys(contenders, (len(counts), "images")),
        flops=flops.per_contender(contenders, flops.operations(model, floats, None, training=True)),
    )


class _Classes:
    """Stands for the data in `Detection`, which compares the number of classes with that of the logits."""

    def categories(self) -> list[dict[str, Any]]:
        return [{"id": number, "name": str(number)} for number in range(CLASSES)]


def _our_step(model: nn.Module, batch: dict[str, Any], device: torch.device, precision: str) -> Work:
    """Make a function that runs one optimizer step of our trainer and returns the loss and the gradient norm."""
    trainer_step = stepper(model, config(), _Classes(), device, precision)

    def step() -> list[Tensor]:
        parts = trainer_step([batch], 0)
        return [parts["loss"], parts["gradient_norm"]]

    return step


def _their_step(model: nn.Module, images: Tensor, targets: list[dict[str, Tensor]], precision: str) -> Work:
    """Make a function that runs one step of a plain training loop and returns the loss and the gradient norm.

    The optimizer is fused AdamW, the default of transformers' Trainer.
    """
    recipe = config()
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {name: recipe["optimizer"][name] for name in ("lr", "weight_decay")}
    optimizer = torch.optim.AdamW(parameters, fused=True, **options)

    def step() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with autocast(images.device, precision):
            total = model(pixel_values=images, labels=targets).loss
        total.backward()
        norm = nn.utils.clip_grad_norm_(parameters, recipe["trainer"]["clip_norm"])
        optimizer.step()
        return [total.detach(), norm]

    return step


ROWS = {"forward": forward, "step": step}
