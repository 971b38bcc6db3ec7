"""DETR-R50 (`model=detr_r50`) against transformers' DetrForObjectDetection, and its input against PIL.

transformers runs as it documents, with attn_implementation="sdpa" and, for bf16 inference, dtype=bfloat16; its eager
attention and PyTorch's channels_last memory format have lines of their own. With `auxiliary_loss` it feeds a decoder
layer's normed output to the next layer, where the official code feeds the output itself: the same work, and the same
numbers as long as those norms have their first values, as they have here in training.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from common import optim
from common.config import build, construct
from common.device import autocast
from common.images import list_images
from common.optim import OptimizerOptions
from common.randomness import generator
from common.step import Stepper
from detr import loss
from detr.boxes import to_cxcywh
from detr.task import Detection
from detr.transforms import normalise
from scripts.benchmarks import detr_input
from scripts.benchmarks.detr_peer import CLASSES, config, detector, peer
from scripts.benchmarks.timing import Row, Setting, alike, near

FRESH_NORMS = r"decoder\.norm\.|decoder\.blocks\.\d+\.residuals\.2\.norm\."


def forward(setting: Setting) -> Row:
    """The answers to one image, in evaluation mode."""
    device, (height, width) = setting.device, (96, 128) if setting.tiny else (800, 1066)
    model = detector().to(device).eval()
    sdpa, eager = (peer(model, attention=kind).to(device).eval() for kind in ("sdpa", "eager"))
    last = copy.deepcopy(sdpa).to(memory_format=torch.channels_last)
    half = copy.deepcopy(sdpa).bfloat16()  # faster than autocast
    images = _pictures(1, height, width, device)[1]
    contiguous = images.contiguous()

    def our(model: Callable[..., dict[str, Tensor]], precision: str) -> list[Tensor]:
        with torch.inference_mode(), autocast(device, precision):
            outputs = model(images, None)
        return [outputs["logits"][-1], outputs["boxes_cxcywh"][-1]]

    def their(model: nn.Module, images: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            outputs = model(pixel_values=images)
        return [outputs.logits, outputs.pred_boxes]

    contenders: dict[str, Callable[[], list[Tensor]]] = {
        "transformers fp32": lambda: their(sdpa, contiguous),
        "transformers fp32 eager": lambda: their(eager, contiguous),
        "transformers fp32 channels_last": lambda: their(last, images),
        "transformers bf16": lambda: their(half, contiguous.bfloat16()),
        "ours fp32": lambda: our(model, "fp32"),
        "ours bf16": lambda: our(model, "bf16"),
    }
    pairs = [
        ("ours fp32", "transformers fp32"),
        ("ours bf16", "transformers fp32"),
        ("ours bf16", "transformers bf16"),
        ("transformers fp32 eager", "transformers fp32"),
        ("transformers fp32 channels_last", "transformers fp32"),
    ]
    if setting.compile:
        compiled = torch.compile(model)
        contenders["ours bf16 compiled"] = lambda: our(compiled, "bf16")
        pairs.append(("ours bf16 compiled", "transformers fp32"))

    def check() -> str:
        said = []
        truth = contenders["transformers fp32"]()
        exact = 0.03 if device.type == "cuda" else 1e-3  # CUDA's convolutions take TF32; a wrong weight is 0.1 or more
        for name in [name for name in contenders if name != "transformers fp32"]:
            for what, one, other in zip(("logits", "boxes"), contenders[name](), truth, strict=True):
                if "fp32" in name:
                    said.append(near(f"{name} {what}", one, other, exact, along=-2))
                else:
                    said.append(near(f"{name} {what}", one, other, 0.15))
        return "; ".join(said)

    return Row(name=f"forward 1x3x{height}x{width}", contenders=contenders, pairs=pairs, check=check)


def step(setting: Setting) -> Row:
    """A training step: forward, loss of all layers, backward, clipping, AdamW; stem and first stage frozen."""
    device, side, counts = setting.device, 96 if setting.tiny else 512, [10, 10]
    images, floats = _pictures(len(counts), side, side, device)
    boxes, labels = _objects(counts, device)
    batch: dict[str, Any] = {"ids": [0, 1], "images": images, "boxes": boxes * side, "labels": labels, "counts": counts}
    batch |= {"sizes": torch.tensor([[side, side]] * len(counts), device=device), "padded": False}
    recipe = config()
    clip_norm, adamw = recipe["trainer"]["clip_norm"], recipe["optimizer"]
    model = detector(fresh=FRESH_NORMS)

    def our(precision: str, training: bool = True) -> Callable[[], list[Tensor]]:
        """The trainer's own step."""
        trained = copy.deepcopy(model).to(device).train(training)
        optimizer = optim.build(trained, construct(OptimizerOptions, adamw))
        stepper = Stepper(build(recipe["task"], data=None), trained, optimizer, device, precision, clip_norm)

        def step() -> list[Tensor]:
            parts = stepper([batch], 0)
            return [parts["loss"], parts["gradient_norm"]]

        return step

    def their(precision: str, training: bool = True) -> Callable[[], list[Tensor]]:
        """A plain loop, with the optimizer that their trainer takes by default."""
        trained = peer(model, auxiliary_loss=True).to(device).train(training)
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

    return Row(
        name=f"training step {len(counts)}x3x{side}x{side}, {counts[0]} boxes each",
        contenders={
            "transformers fp32": their("fp32"),
            "transformers bf16": their("bf16"),
            "ours fp32": our("fp32"),
            "ours bf16": our("bf16"),
        },
        pairs=[
            ("ours fp32", "transformers fp32"),
            ("ours bf16", "transformers fp32"),
            ("ours bf16", "transformers bf16"),
        ],
        check=check,
    )


def matching(setting: Setting) -> Row:
    """Matching and loss alone, from the outputs of six decoder layers for two images."""
    device, (layers, queries, counts) = setting.device, (6, 100, [20, 20])
    draw = generator("outputs")
    logits = torch.randn(layers, len(counts), queries, CLASSES + 1, generator=draw).to(device).requires_grad_()
    answers = torch.rand(layers, len(counts), queries, 4, generator=draw).to(device).requires_grad_()
    boxes, labels = _objects(counts, device)
    targets, per_image = to_cxcywh(boxes), _as_transformers(boxes, labels, counts)
    task: Detection = build(config()["task"], data=None)
    options = DetrConfig(num_labels=CLASSES, auxiliary_loss=True)

    def our() -> Tensor:
        outputs = {"logits": logits, "boxes_cxcywh": answers}
        sizes = loss.sizes(task.loss_options, counts, queries)
        return loss.set_loss(task.loss_options, task.matcher, outputs, labels, targets, counts, sizes)[0]

    def their() -> Tensor:
        return ForObjectDetectionLoss(logits[-1], per_image, device, answers[-1], options, logits, answers)[0]

    return Row(
        name=f"matching and loss, {layers} layers, {len(counts)}x{queries} queries, {counts[0]} boxes each",
        contenders={"transformers": their, "ours": our},
        pairs=[("ours", "transformers")],
        check=lambda: alike("loss", our(), their(), 1e-5),
    )


def pipeline(setting: Setting) -> Row:
    """From JPEGs on the disk to a normalised batch on the device, with the paper's augmentation, on one core."""
    folder = setting.images or setting.scratch
    if setting.images is None:
        shapes = [(48, 64), (64, 48)] if setting.tiny else [(480, 640), (640, 480), (427, 640), (640, 427)]
        detr_input.write_photos(folder, shapes)
    files = [file for file in list_images(folder) if file.suffix.lower() in (".jpg", ".jpeg")]
    annotations = setting.scratch / "annotations.json"
    detr_input.write_annotations(annotations, files, boxes=7)  # as many as COCO has on average
    tiny = ["data.augmentation.sizes=[64]", "data.augmentation.middle_sizes=[56]", "data.augmentation.crop=[40,48]"]
    keys = [f"data.train.images={folder}", f"data.train.annotations={annotations}", "data.val_count=0"]
    data = build(config(*keys, *(tiny if setting.tiny else []))["data"])
    unaugmented = [detr_input.targets(annotations, number) for number in range(len(files))]
    epochs = {"ours": 0, "PIL": 0}  # the same draws for both in every round, and others in the next

    def draws(side: str) -> list[torch.Generator]:
        epochs[side] += 1
        return [generator(epochs[side], number) for number in range(len(files))]

    def our() -> tuple[Tensor, Tensor]:
        batch = data.collate([data.sample("train", number, draw) for number, draw in enumerate(draws("ours"))])
        images = batch["images"].to(setting.device, non_blocking=True)
        return normalise(images, batch["sizes"]), batch["boxes"]

    def their() -> tuple[Tensor, Tensor]:
        drawn = zip(files, unaugmented, draws("PIL"), strict=True)
        samples = [detr_input.pil_sample(file, *objects, data.augmentation, draw) for file, objects, draw in drawn]
        images, _ = detr_input.pil_collate(samples)
        return images.to(setting.device), torch.cat([boxes for _, boxes, _ in samples])

    def check() -> str:
        for _ in range(3):
            (images, boxes), (their_images, their_boxes) = our(), their()
            # The two resizers round to whole levels in their own ways, and an edge may move a level or two.
            said = near("pixels", images, their_images, 0.05)
            said += "; " + near("boxes", boxes, their_boxes, 1e-3)
        return said

    return Row(
        name=f"input pipeline, {len(files)} JPEGs, one core",
        contenders={"PIL": their, "ours": our},
        pairs=[("ours", "PIL")],
        check=check,
        threads=1,
    )


ROWS = {"forward": forward, "step": step, "matching": matching, "pipeline": pipeline}


def _pictures(count: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 (count, 3, height, width) without padding, and the same normalised; channels last, as ours come."""
    images = torch.stack([detr_input.photo(height, width, seed) for seed in range(count)])
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return images, normalise(images, torch.tensor([[height, width]] * count))


def _objects(counts: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes (T, 4) xyxy within the unit square, and labels (T,)."""
    draw = generator("objects", *counts)
    boxes = torch.rand(sum(counts), 2, 2, generator=draw).sort(1).values.flatten(1)  # (T, 2 corners, 2) -> (T, 4)
    return boxes.to(device), torch.randint(0, CLASSES, (sum(counts),), generator=draw).to(device)


def _as_transformers(boxes: Tensor, labels: Tensor, counts: list[int]) -> list[dict[str, Tensor]]:
    """Targets in its form."""
    per_image = zip(to_cxcywh(boxes).split(counts), labels.split(counts), strict=True)
    return [{"boxes": of_image, "class_labels": classes} for of_image, classes in per_image]
