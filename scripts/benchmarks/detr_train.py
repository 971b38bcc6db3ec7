"""Training steps of DETR-R50, and their matching and loss alone, against transformers.

With `auxiliary_loss` transformers feeds a decoder layer's normed output to the next layer, where the official code
feeds the output itself: the same work, and the same numbers as long as those norms have their first values, as they
have here.
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
from scripts.benchmarks.detr_input import pictures
from scripts.benchmarks.detr_peer import CLASSES, config, detector, peer
from scripts.benchmarks.learning import stepper
from scripts.benchmarks.timing import Row, Setting, alike

FRESH_NORMS = r"decoder\.norm\.|decoder\.blocks\.\d+\.residuals\.2\.norm\."


def step(setting: Setting) -> Row:
    """A training step: forward, loss of all layers, backward, clipping, AdamW; stem and first stage frozen."""
    device, side, counts = setting.device, 96 if setting.tiny else 512, [10, 10]
    images, floats = pictures(len(counts), side, side, device)
    boxes, labels = _objects(counts, device)
    batch: dict[str, Any] = {"ids": [0, 1], "images": images, "boxes": boxes * side, "labels": labels, "counts": counts}
    batch |= {"sizes": torch.tensor([[side, side]] * len(counts), device=device), "padded": False}
    recipe = config()
    clip_norm, adamw = recipe["trainer"]["clip_norm"], recipe["optimizer"]
    model = detector(fresh=FRESH_NORMS)

    def our(precision: str, training: bool = True, compiled: bool = False) -> Callable[[], list[Tensor]]:
        """The trainer's own step."""
        stepped = stepper(copy.deepcopy(model).train(training), recipe, None, device, precision, compiled=compiled)

        def step() -> list[Tensor]:
            parts = stepped([batch], 0)
            return [parts["loss"], parts["gradient_norm"]]

        return step

    def their(precision: str, training: bool = True, compiled: bool = False) -> Callable[[], list[Tensor]]:
        """A plain loop, with the optimizer that their trainer takes by default."""
        trained = peer(model, auxiliary_loss=True).to(device).train(training)
        if compiled:
            trained.compile()
        parameters = [p for p in trained.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=adamw["lr"], weight_decay=adamw["weight_decay"], fused=True)
        contiguous, targets = floats.contiguous(), _as_transformers(boxes, labels, counts)

        def step() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, precision):
                total = trained(pixel_values=contiguous, labels=targets).loss
            total.backward()
            norm = nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            return [total.detach(), norm]

        return step

    def check() -> str:
        both = zip(("loss", "gradient norm"), our("fp32", False)(), their("fp32", False)(), strict=True)
        return "without dropout: " + "; ".join(alike(what, one, other, 1e-3) for what, one, other in both)

    contenders, pairs = {}, []
    for kind in ("", " compiled")[: 1 + setting.compile]:
        for precision in ("fp32", "bf16"):
            contenders[f"transformers {precision}{kind}"] = their(precision, compiled=bool(kind))
            contenders[f"ours {precision}{kind}"] = our(precision, compiled=bool(kind))
        for one, other in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            pairs.append((f"ours {one}{kind}", f"transformers {other}{kind}"))
    counted = flops.operations(model, floats, None, training=True)
    return Row(
        name=f"training step {len(counts)}x3x{side}x{side}, {counts[0]} boxes each",
        contenders=contenders,
        pairs=pairs,
        check=check,
        amounts=dict.fromkeys(contenders, (len(counts), "images")),
        flops=flops.each(contenders, counted),
    )


def matching(setting: Setting) -> Row:
    """Matching and loss alone, of as many objects as crowded images have."""
    return matching_row(setting, objects=20, queries=100)


def matching_row(setting: Setting, *, objects: int, queries: int) -> Row:
    """From the outputs of six decoder layers for two images of so many objects each to the loss."""
    device, (layers, counts) = setting.device, (6, [objects] * 2)
    draw = generator("outputs")
    logits = torch.randn(layers, len(counts), queries, CLASSES + 1, generator=draw).to(device).requires_grad_()
    answers = torch.rand(layers, len(counts), queries, 4, generator=draw).to(device).requires_grad_()
    boxes, labels = _objects(counts, device)
    targets, per_image = to_cxcywh(boxes), _as_transformers(boxes, labels, counts)
    task: Detection = build(config()["task"], data=None)
    options = DetrConfig(num_labels=CLASSES, auxiliary_loss=True)

    def our() -> Tensor:
        outputs = {"logits": logits, "boxes_cxcywh": answers}
        normalisers = task.criterion.normalisers("queries", counts, [queries] * len(counts))
        normalisers = {name: value or 1.0 for name, value in normalisers.items()}  # as the trainer does
        objects = Targets(counts, labels, targets)
        return sum_terms({"queries": task.criterion("queries", outputs, objects, normalisers)})[0]

    def their() -> Tensor:
        return ForObjectDetectionLoss(logits[-1], per_image, device, answers[-1], options, logits, answers)[0]

    return Row(
        name=f"matching and loss, {layers} layers, {len(counts)}x{queries} queries, {objects} boxes each",
        contenders={"transformers": their, "ours": our},
        pairs=[("ours", "transformers")],
        check=lambda: alike("loss", our(), their(), 1e-5),
        amounts=dict.fromkeys(("transformers", "ours"), (len(counts), "images")),
    )


def _objects(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes (T, 4) xyxy within the unit square, and labels (T,)."""
    draw = generator("objects", *counts)
    boxes = torch.rand(sum(counts), 2, 2, generator=draw).sort(1).values.flatten(1)  # (T, 2 corners, 2) -> (T, 4)
    return boxes.to(device), torch.randint(0, CLASSES, (sum(counts),), generator=draw).to(device)


def _as_transformers(boxes: Tensor, labels: Tensor, counts: list[int]) -> list[dict[str, Tensor]]:
    """Targets in its form."""
    per_image = zip(to_cxcywh(boxes).split(counts), labels.split(counts), strict=True)
    return [{"boxes": of_image, "class_labels": classes} for of_image, classes in per_image]
