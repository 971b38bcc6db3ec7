"""The input of DETR against PIL: from JPEGs on the disk to a batch on the device."""

import torch
from torch import Tensor

from common.config.check import build
from common.data.images import list_images, normalise
from common.machine.device import DTYPES, Precision
from common.machine.seeds import generator
from scripts.benchmarks import detr_input
from scripts.benchmarks.detr_peer import config
from scripts.benchmarks.timing import Row, Setting, near


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
    epochs = {
        "ours fp32": 0,
        "ours bf16": 0,
        "PIL": 0,
    }  # the same draws for both in every round, and others in the next

    def draws(side: str) -> list[torch.Generator]:
        epochs[side] += 1
        return [generator(epochs[side], number) for number in range(len(files))]

    def our(precision: Precision) -> tuple[Tensor, Tensor]:
        side = f"ours {precision}"
        batch = data.collate([data.sample("train", number, draw) for number, draw in enumerate(draws(side))])
        images = batch["images"].to(setting.device, non_blocking=True)
        return normalise(images, batch["sizes"], DTYPES[precision]), batch["boxes"]

    def their() -> tuple[Tensor, Tensor]:
        drawn = zip(files, unaugmented, draws("PIL"), strict=True)
        samples = [detr_input.pil_sample(file, *objects, data.augmentation, draw) for file, objects, draw in drawn]
        images, _ = detr_input.pil_collate(samples)
        return images.to(setting.device), torch.cat([boxes for _, boxes, _ in samples])

    contenders = {"PIL": their, "ours fp32": lambda: our("fp32"), "ours bf16": lambda: our("bf16")}

    def check() -> str:
        said = {}
        for _ in range(3):
            their_images, their_boxes = their()
            for name in ("ours fp32", "ours bf16"):
                images, boxes = contenders[name]()
                # The two resizers round to whole levels in their own ways, and an edge may move a level or two.
                said[name] = near(f"{name} pixels", images, their_images, 0.05)
                said[name] += "; " + near(f"{name} boxes", boxes, their_boxes, 1e-3)
        return "; ".join(said.values())

    return Row(
        name=f"input pipeline, {len(files)} JPEGs, one core",
        contenders=contenders,
        pairs=[("ours fp32", "PIL"), ("ours bf16", "PIL")],
        check=check,
        amounts=dict.fromkeys(contenders, (len(files), "images")),
        threads=1,
    )
