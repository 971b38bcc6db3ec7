"""Benchmark DETR's input pipeline, from JPEGs on disk to a batch on the device.

The reference is the same pipeline written with PIL (scripts/benchmarks/detr_input.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.config.check import build
from common.data.images import normalise
from common.machine.device import DTYPES, Precision
from common.machine.seeds import generator
from scripts.benchmarks import detr_input
from scripts.benchmarks.detr_peer import config
from scripts.benchmarks.timing import Row, Setting, compare_tensors


def pipeline(setting: Setting) -> Row:
    """Build a benchmark that times the input pipeline on one CPU core.

    Each call reads all JPEGs from disk, applies the paper's augmentation, and returns a normalised batch on the device.
    The JPEGs are those in the folder `setting.images`. If `setting.images` is None, synthetic photos are used.
    """
    folder = setting.images or setting.scratch
    if setting.images is None:
        shapes = [(48, 64), (64, 48)] if setting.tiny else [(480, 640), (640, 480), (427, 640), (640, 427)]
        detr_input.write_photos(folder, shapes)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".jpg", ".jpeg"))
    annotations = setting.scratch / "annotations.json"
    detr_input.write_annotations(annotations, files, boxes=7)  # COCO's average per image
    tiny = ["data.augmentation.sizes=[64]", "data.augmentation.middle_sizes=[56]", "data.augmentation.crop=[40,48]"]
    keys = [f"data.train.images={folder}", f"data.train.annotations={annotations}", "data.val_count=0"]
    data = build(config(*keys, *(tiny if setting.tiny else []))["data"])
    targets = [detr_input.targets(annotations, number) for number in range(len(files))]
    # The number of calls of each contender so far. It seeds the augmentation: all contenders apply the same
    # augmentation in a round, and the augmentation changes from round to round.
    epochs = {"ours fp32": 0, "ours bf16": 0, "PIL": 0}

    def generators(contender: str) -> list[torch.Generator]:
        epochs[contender] += 1
        return [generator(epochs[contender], number) for number in range(len(files))]

    def run_ours(precision: Precision) -> tuple[Tensor, Tensor]:
        rngs = generators(f"ours {precision}")
        batch = data.collate([data.sample("train", number, rng) for number, rng in enumerate(rngs)])
        images = batch["images"].to(setting.device, non_blocking=True)
        return normalise(images, batch["sizes"], DTYPES[precision]), batch["boxes"]

    def run_pil() -> tuple[Tensor, Tensor]:
        inputs = zip(files, targets, generators("PIL"), strict=True)
        samples = [detr_input.pil_sample(file, *objects, data.augmentation, rng) for file, objects, rng in inputs]
        images, _ = detr_input.pil_collate(samples)
        return images.to(setting.device), torch.cat([boxes for _, boxes, _ in samples])

    contenders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "PIL": run_pil,
        "ours fp32": lambda: run_ours("fp32"),
        "ours bf16": lambda: run_ours("bf16"),
    }

    def check() -> str:
        differences = {}
        for _ in range(3):
            pil_images, pil_boxes = run_pil()
            for name in ("ours fp32", "ours bf16"):
                images, boxes = contenders[name]()
                # PIL's resizing and ours round to integers differently. At edges in the image, pixels therefore differ
                # by one or two of 255 levels.
                differences[name] = compare_tensors(f"{name} pixels", images, pil_images, 0.05)
                differences[name] += "; " + compare_tensors(f"{name} boxes", boxes, pil_boxes, 1e-3)
        return "; ".join(differences.values())

    return Row(
        name=f"input pipeline, {len(files)} JPEGs, one core",
        contenders=contenders,
        pairs=[("ours fp32", "PIL"), ("ours bf16", "PIL")],
        check=check,
        amounts=dict.fromkeys(contenders, (len(files), "images")),
        threads=1,
    )
