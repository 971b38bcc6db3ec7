"""Masks as a user trains, evaluates and predicts them: drawn shapes with grounds, and real panoptic images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

pytestmark = pytest.mark.slow
Door = Callable[..., str]
SHORT = ["trainer.log=[]", "trainer.steps=10", "trainer.eval_every=5", "data.batch_size=4"]
SHAPES = ["data.stuff=true", "data.train_count=12", "data.val_count=4", "data.test_count=6"]
EVERYTHING = ["task.predict.threshold=0", "task.predict.panoptic_threshold=0"]


def numbers_of(output: str) -> dict[str, float]:
    numbers: dict[str, float] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return numbers


def ids_in(file: Path) -> Any:
    """The ids (H, W) in a PNG of COCO's panoptic format."""
    colours = np.asarray(Image.open(file).convert("RGB")).astype(np.int64)
    return colours @ [1, 256, 65536]


@pytest.fixture(scope="module")
def run(door: Door, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small DETR with masks on drawn shapes with grounds."""
    folder = tmp_path_factory.mktemp("masks")
    arguments = ["model=detr_masks", *SHAPES, *SHORT, "task.predict.panoptic_threshold=0", "trainer.ema_decay=0.5"]
    door("train", *arguments, f"data.root={folder / 'shapes'}", f"run_dir={folder / 'run'}")
    return folder


def test_evaluation_gives_the_runs_mask_ap_and_panoptic_quality_again(run: Path, door: Door) -> None:
    stored = json.loads((run / "run" / "results.json").read_text())
    numbers = numbers_of(door("evaluate", f"checkpoint={run / 'run' / 'checkpoints' / 'best.pt'}"))
    assert {"test/AP", "test/mask_AP", "test/mask_AR_small", "test/PQ", "test/SQ_things", "test/RQ_stuff"} <= {*numbers}
    assert numbers == {name: stored[name] for name in numbers}
    assert numbers["test/PQ_stuff"] > 0, "grounds are large, so even a short run finds some"


def test_predictions_have_codes_ids_and_pictures_that_agree(run: Path, door: Door, tmp_path: Path) -> None:
    picture = next((run / "shapes").glob("*/test/*.png"))
    checkpoint = f"checkpoint={run / 'run' / 'checkpoints' / 'best.pt'}"
    door("predict", checkpoint, f"input={picture}", f"output={tmp_path}", *EVERYTHING)
    content = json.loads((tmp_path / f"{picture.name}.boxes.json").read_text())
    objects, segments = content["objects"], content["segments"]
    assert len(objects) == 12 and segments
    masks = np.array([rle.decode(item["mask"]) for item in objects]).astype(bool)
    numbers = ids_in(tmp_path / f"{picture.name}.masks.png")
    assert masks.shape == (12, 64, 64) and np.array_equal(numbers > 0, masks.any(0))
    for number in {*np.unique(numbers).tolist()} - {0}:
        assert masks[number - 1][numbers == number].all()
    ids = ids_in(tmp_path / f"{picture.name}.panoptic.png")
    assert {(s["id"], s["area"]) for s in segments} == {(i, int((ids == i).sum())) for i in np.unique(ids) if i}
    assert {"id", "category_id", "area", "name", "score"} == segments[0].keys()


def test_a_frozen_detector_keeps_its_boxes_and_trains_masks(run: Path, door: Door, tmp_path: Path) -> None:
    """A detector without masks is trained first; its checkpoint then gets a mask head, which alone is trained."""
    data = [*SHAPES, *SHORT, f"data.root={run / 'shapes'}"]
    door("train", "model=detr", *data, f"run_dir={tmp_path / 'boxes'}")
    checkpoint = tmp_path / "boxes" / "checkpoints" / "best.pt"
    output = door(
        "train",
        "model=detr_masks",
        "model.frozen=true",
        *data,
        f"checkpoint={checkpoint}",
        f"run_dir={tmp_path / 'masks'}",
    )
    assert "mask_head" in output
    before = numbers_of(door("evaluate", f"checkpoint={checkpoint}"))
    after = numbers_of(door("evaluate", f"checkpoint={tmp_path / 'masks' / 'checkpoints' / 'best.pt'}"))
    assert after["test/AP"] == pytest.approx(before["test/AP"], abs=1e-9) and "test/mask_AP" in after


def test_a_frozen_detector_of_other_classes_is_refused(run: Path, door: Door, tmp_path: Path) -> None:
    """Its class head would stay random."""
    data = [*SHORT, *SHAPES[1:], f"data.root={run / 'shapes'}"]  # without the classes of stuff
    checkpoint = f"checkpoint={run / 'run' / 'checkpoints' / 'best.pt'}"
    arguments = ["model=detr_masks", "model.frozen=true", *data, checkpoint, f"run_dir={tmp_path / 'other'}"]
    message = door("train", *arguments, code=2)
    assert "has no matching class_head" in message and "which the model does not train" in message


def test_real_panoptic_images_are_trained_on_and_evaluated(
    door: Door, real_data: Callable[[str], Path], tmp_path: Path
) -> None:
    small = ["data.augmentation.kind=none", "data.augmentation.eval_size=96", "data.augmentation.max_size=128"]
    arguments = ["model=detr_masks", "data=coco_panoptic", f"data.root={real_data('coco_panoptic_mini')}", *small]
    arguments += [*SHORT, "data.val_count=4", "model.queries=40", "task.predict.panoptic_threshold=0"]
    door("train", *arguments, f"run_dir={tmp_path / 'run'}")
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= stored["test/PQ"] <= 1 and 0 <= stored["test/mask_AP"] <= 1
    results = json.loads((tmp_path / "run" / "predictions" / "panoptic.json").read_text())["annotations"]
    assert len(results) == 27 and all(
        (tmp_path / "run" / "predictions" / "panoptic" / entry["file_name"]).exists() for entry in results
    )
