"""Names that are not UTF-8, and names of the maximum length, from training to prediction."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.files.names import unescape

BYTE = "\udce9"  # how Python shows the byte 0xE9, Latin-1's e acute
TEA = "te\x1b[2Ja"  # with the sequence that clears a terminal
MODEL = ["data.image_size=8", "data.batch_size=4", "trainer.steps=2", "trainer.device=cpu", "model.width=16"]


def write_image(file: Path, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(stream, "PNG")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes in train, val and test; the folder, a class and files have the byte 0xE9 in their names."""
    folder = tmp_path / f"photos{BYTE}"
    try:
        for split in ("train", "val", "test"):
            for number in range(4):
                write_image(folder / split / (TEA, f"caf{BYTE}")[number % 2] / f"{BYTE}{number}.png", number)
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    return folder


def test_a_classifier_of_names_that_are_not_utf8_is_trained_evaluated_and_predicts(
    photos: Path, inside: Callable[..., str], tmp_path: Path
) -> None:
    run, test = tmp_path / f"run{BYTE}", photos / "test"
    train = ["model=vit", "data=imagefolder", f"data.root={photos}", f"run_dir={run}", *MODEL]
    output = inside("train", *train)
    assert "run\\udce9: checkpoints/" in output
    assert json.loads((run / "task.json").read_text("utf-8"))["classes"] == [f"caf{BYTE}", TEA]
    with (run / "predictions" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert {unescape(row["id"]) for row in rows} == {str(file.relative_to(test)) for file in test.rglob("*.png")}
    assert {unescape(row["truth"]) for row in rows} == {f"caf{BYTE}", TEA}
    assert "is finished" in inside("train", *train, "resume=auto")

    best = f"checkpoint={run / 'checkpoints' / 'best.pt'}"
    output = inside("evaluate", best, "details=true", f"output={tmp_path / f'out{BYTE}'}")
    assert "caf\\udce9" in output and "data      test: 4 images of " in output
    assert "\x1b" not in output and r"te\x1b[2Ja" in output
    lines = inside("predict", best, f"input={test / TEA}", f"output={tmp_path / 'answers'}").splitlines()
    assert [line.partition(":")[0] for line in lines if "\\udce9" in line[:8]] == ["\\udce90.png", "\\udce92.png"]
    assert all(r"te\x1b[2Ja 0." in line for line in lines if "\\udce9" in line[:8]) and "\x1b" not in "".join(lines)
    answer = json.loads((tmp_path / "answers" / f"{BYTE}0.png.classes.json").read_text("utf-8"))
    assert answer["file"] == str(test / TEA / f"{BYTE}0.png")


def test_an_image_with_the_longest_name_is_answered(inside: Callable[..., str], tmp_path: Path) -> None:
    image = tmp_path / "images" / f"{'x' * 251}.png"  # 255 bytes
    write_image(image)
    inside("train", "model=vit", "run_dir=run", "trainer.steps=1", "trainer.device=cpu")
    options = ["task.predict.attention=rollout", "output=answers"]
    inside("predict", "checkpoint=run/checkpoints/best.pt", f"input={image}", *options)
    contents = [json.loads(file.read_text("utf-8")) for file in (tmp_path / "answers").glob("*.json")]
    assert [content["file"] for content in contents] == [str(image)]
    assert len([*(tmp_path / "answers").glob("*.attention.png")]) == 1
