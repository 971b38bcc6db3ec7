"""Benchmark training steps of DETR-R50, and matching and loss alone, against transformers.

In the official code and in ours, each decoder layer reads the output of the previous layer. With `auxiliary_loss`,
transformers first passes that output through the decoder's final norm. The amount of work is the same. The results are
the same only while the norms in INITIAL_NORMS have their initial weights (1) and biases (0). A decoder layer ends with
one of these norms, and with the initial values, normalising its output again does not change it. Therefore loss and
gradient norm are compared in the first training step, which starts from these values.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from common.config.check import build
from common.machine.device import autocast
from common.machine.seeds import generator
from detr.criterion.answers import Targets
from detr.criterion.boxes import to_cxcywh
from detr.criterion.set_loss import sum_terms
from detr.tasks.detection import Detection
from scripts.benchmarks import flops
from scripts.benchmarks.detr_input import sample_images
from scripts.benchmarks.detr_peer import CLASSES, config, detector, peer
from scripts.benchmarks.learning import stepper
from scripts.benchmarks.timing import Row, Setting, compare_numbers

# The decoder's final norm, and the last norm of each decoder layer.
INITIAL_NORMS = r"decoder\.norm\.|decoder\.blocks\.\d+\.residuals\.2\.norm\."


def step(setting: Setting) -> Row:
    """Build a benchmark that times a training step: forward and backward pass, gradient clipping and AdamW.

    The loss is that of all decoder layers. The batch has two images with 10 objects each. The backbone's stem and first
    stage are frozen, as in the official code.
    """
    device, side, counts = setting.device, 96 if setting.tiny else 512, [10, 10]
    batch, floats, boxes = sample_batch(counts, side, device)
    labels = batch["labels"]
    recipe = config()
    clip_norm, adamw = recipe["trainer"]["clip_norm"], recipe["optimizer"]
    model = detector(fresh=INITIAL_NORMS)

    def our_step(precision: str, training: bool = True, compiled: bool = False) -> Callable[[], list[Tensor]]:
        """Make a function that runs one optimizer step of our trainer and returns the loss and the gradient norm."""
        trainer_step = stepper(copy.deepcopy(model).train(training), recipe, None, device, precision, compiled=compiled)

        def step() -> list[Tensor]:
            parts = trainer_step([batch], 0)
            return [parts["loss"], parts["gradient_norm"]]

        return step

    def their_step(precision: str, training: bool = True, compiled: bool = False) -> Callable[[], list[Tensor]]:
        """Make a function that runs one step of a plain training loop and returns the loss and the gradient norm.

        The optimizer is fused AdamW, the default of transformers' Trainer.
        """
        theirs = peer(model, auxiliary_loss=True).to(device).train(training)
        if compiled:
            theirs.compile()
        parameters = [p for p in theirs.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=adamw["lr"], weight_decay=adamw["weight_decay"], fused=True)
        contiguous, targets = floats.contiguous(), as_transformers(boxes, labels, counts)

        def step() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, precision):
                total = theirs(pixel_values=contiguous, labels=targets).loss
            total.backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            return [total.detach(), norm]

        return step

    def check() -> str:
        numbers = zip(("loss", "gradient norm"), our_step("fp32", False)(), their_step("fp32", False)(), strict=True)
        return "without dropout: " + "; ".join(
            compare_numbers(name, ours, theirs, 1e-3) for name, ours, theirs in numbers
        )

    contenders, pairs = {}, []
    for suffix in ("", " compiled")[: 1 + setting.compile]:
        for precision in ("fp32", "bf16"):
            contenders[f"transformers {precision}{suffix}"] = their_step(precision, compiled=bool(suffix))
            contenders[f"ours {precision}{suffix}"] = our_step(precision, compiled=bool(suffix))
        for ours, theirs in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            pairs.append((f"ours {ours}{suffix}", f"transformers {theirs}{suffix}"))
    operations = flops.operations(model, floats, None, training=True)
    return Row(
        name=f"training step {len(counts)}x3x{side}x{side}, {counts[0]} boxes each",
        contenders=contenders,
        pairs=pairs,
        check=check,
        amounts=dict.fromkeys(contenders, (len(counts), "images")),
        flops=flops.per_contender(contenders, operations),
    )


def matching(setting: Setting) -> Row:
    """Build a benchmark that times matching and loss alone, for two images with 20 objects and 100 queries each."""
    return matching_row(setting, objects=20, queries=100)


def matching_row(setting: Setting, *, objects: int, queries: int) -> Row:
    """Build a benchmark that times matching and loss for the outputs of six decoder layers.

    The batch has two images with `objects` objects each. Each layer has random outputs for `queries` queries per image.
    Only the forward pass is timed.
    """
    device, (layer_count, counts) = setting.device, (6, [objects] * 2)
    rng = generator("outputs")
    logits = torch.randn(layer_count, len(counts), queries, CLASSES + 1, generator=rng).to(device).requires_grad_()
    predicted_boxes = torch.rand(layer_count, len(counts), queries, 4, generator=rng).to(device).requires_grad_()
    boxes, labels = sample_objects(counts, device)
    boxes_cxcywh, their_targets = to_cxcywh(boxes), as_transformers(boxes, labels, counts)
    task: Detection = build(config()["task"], data=None)
    options = DetrConfig(num_labels=CLASSES, auxiliary_loss=True)

    def our_loss() -> Tensor:
        outputs = {"logits": logits, "boxes_cxcywh": predicted_boxes}
        normalisers = task.criterion.normalisers("queries", counts, [queries] * len(counts))
        # As in the trainer, a divisor of 0 is replaced by 1.
        normalisers = {name: value or 1.0 for name, value in normalisers.items()}
        targets = Targets(counts, labels, boxes_cxcywh)
        return sum_terms({"queries": task.criterion("queries", outputs, targets, normalisers)})[0]

    def their_loss() -> Tensor:
        loss: Tensor = ForObjectDetectionLoss(
            logits[-1], their_targets, device, predicted_boxes[-1], options, logits, predicted_boxes
        )[0]
        return loss

    return Row(
        name=f"matching and loss, {layer_count} layers, {len(counts)}x{queries} queries, {objects} boxes each",
        contenders={"transformers": their_loss, "ours": our_loss},
        pairs=[("ours", "transformers")],
        check=lambda: compare_numbers("loss", our_loss(), their_loss(), 1e-5),
        amounts=dict.fromkeys(("transformers", "ours"), (len(counts), "images")),
    )


def sample_batch(counts: list[int], side: int, device: torch.device) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Sample a batch of square images with `counts` objects each.

    Returns the task's batch, the normalised images (B, 3, side, side), and the boxes (T, 4) xyxy relative to the image.
    """
    images, floats = sample_images(len(counts), side, side, device)
    boxes, labels = sample_objects(counts, device)
    batch = {"ids": [*range(len(counts))], "images": images, "boxes": boxes * side, "labels": labels, "counts": counts}
    batch |= {"sizes": torch.tensor([[side, side]] * len(counts), device=device), "padded": False}
    return batch, floats, boxes


def sample_objects(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Sample boxes (T, 4) xyxy within the unit square, and labels (T,).

    `counts` holds the number of objects in each image, and T is their sum.
    """
    rng = generator("objects", *counts)
    boxes = torch.rand(sum(counts), 2, 2, generator=rng).sort(1).values.flatten(1)  # (T, 2 corners, 2) -> (T, 4)
    return boxes.to(device), torch.randint(0, CLASSES, (sum(counts),), generator=rng).to(device)


def as_transformers(boxes: Tensor, labels: Tensor, counts: list[int]) -> list[dict[str, Tensor]]:
    """Convert boxes (T, 4) xyxy and labels (T,) of a batch to transformers' targets, a dict for each image.

    The dict of an image with n objects holds "boxes" (n, 4) cxcywh and "class_labels" (n,).
    """
    per_image = zip(to_cxcywh(boxes).split(counts), labels.split(counts), strict=True)
    return [{"boxes": image_boxes, "class_labels": classes} for image_boxes, classes in per_image]
