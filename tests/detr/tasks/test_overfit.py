"""A detector that cannot overfit a handful of real images has a fault somewhere between JPEG and AP."""

import json
from pathlib import Path

import pytest

from common.config.check import construct
from common.config.compose import configure
from common.files.log import Log
from common.train import assembly
from common.train.optim import OptimizerOptions, ScheduleOptions
from common.train.state import Run

IMAGES = 4


def handful(source: Path, folder: Path) -> Path:
    """A COCO JSON of the first images with two to six objects and no crowd."""
    content = json.loads((source / "train.json").read_text())
    by_image: dict[int, list[dict]] = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    usable = [i for i, objects in by_image.items() if 2 <= len(objects) <= 6 and not any(a["iscrowd"] for a in objects)]
    chosen = set(usable[:IMAGES])
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    file = folder / "handful.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.slow
def test_a_handful_of_real_images_is_overfitted(real_data, tmp_path):
    source = real_data("coco_mini")
    file = handful(source, tmp_path)
    files = [f"data.{split}.images={source / 'images'}" for split in ("train", "val", "test")]
    files += [f"data.{split}.annotations={file}" for split in ("train", "val", "test")]
    resizing = ["data.augmentation.kind=none", "data.augmentation.eval_size=128", "data.augmentation.max_size=192"]
    length = ["trainer.steps=500", "trainer.eval_every=250", "trainer.workers=0", "trainer.log_every=50"]
    config = configure(
        "train", ["model=detr", "data=coco", *files, *resizing, *length, f"data.batch_size={IMAGES}", "data.cache=true"]
    )
    parts = assembly.assemble(config)
    run = Run(
        task=parts.task,
        data=parts.data,
        model=parts.model,
        optimizer=construct(OptimizerOptions, config["optimizer"]),
        schedule=construct(ScheduleOptions, config["schedule"]),
        config=config,
        seed=0,
        folder=tmp_path / "run",
    )
    with Log(run.folder, main=True) as log:
        numbers = parts.trainer.fit(run, log, on=parts.device, resume=False)
    assert numbers["test/AP50"] >= 0.9, numbers
