"""Label assignments from the command line: files, tables and numbers on a small drawn data set, and the refusals."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli.command import commands
from common.config.check import build
from common.config.compose import configure
from common.files import checkpoint
from common.machine.seeds import generator
from scripts.assignments import main

Printed = pytest.CaptureFixture[str]
DATA = ["data.train_count=6", "data.val_count=4", "data.test_count=2"]
SMALL = [
    *("model=detr", "model.width=16", "model.heads=2", "model.feedforward=24", "model.queries=7"),
    *("model.encoder_layers=1", "model.decoder_layers=2"),
]
METHODS = ["RPN", "RetinaNet", "FCOS", "FreeAnchor", "YOLOv1", "YOLOv2", "YOLOv3", "AutoAssign", "DETR"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the drawn images."""
    return tmp_path_factory.mktemp("shapes")


def keys(root: Path) -> list[str]:
    return [*SMALL, *DATA, f"data.root={root}"]


def save_checkpoint(file: Path, root: Path, seed: int) -> Path:
    """Write a checkpoint of a small detector with random tensors."""
    config = configure("train", keys(root))
    names = ("circle", "square", "triangle", "star")
    model, rng = build(config["model"], classes=4), generator("assignments", seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(std=0.3 if tensor.ndim < 2 else 2 * tensor[0].numel() ** -0.5, generator=rng)
    task = {"categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)]}
    content = {"step": 7, "model": dict(model.state_dict()), "average": None, "task": task, "config": config}
    file.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(file, content)
    return file


def run(folder: Path, *arguments: Any, code: int = 0) -> dict[str, Any]:
    """Run the script; returns the content of assignments.json, which is empty after an error."""
    assert main([*map(str, arguments), f"output={folder}"]) == code
    return json.loads((folder / "assignments.json").read_text()) if code == 0 else {}


def test_the_initial_models_sheet_is_drawn_with_the_numbers_of_the_table(root: Path, tmp_path: Path, capsys: Printed):
    record = run(tmp_path, *keys(root), "image=3")
    printed = capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"assignments.png", "suppression.png", "assignments.json"}
    assert record["id"] == 3 and record["split"] == "val" and "not trained" in record["weights"]
    assert "stability" not in record
    truth = build(configure("train", keys(root))["data"]).ground_truth("val")
    boxes = [box["bbox"] for box in truth["annotations"] if box["image_id"] == 3]
    assert [box["box"] for box in record["objects"]] == [[x, y, x + w, y + h] for x, y, w, h in boxes]
    lines = printed.splitlines()
    header = next(line for line in lines if line.startswith("object ")).split()
    assert header == ["object", "width", "height", *METHODS]
    for number, part in enumerate(record["objects"], 1):
        cells = next(line for line in lines if line.startswith(f"{number} {part['name']} ")).split()
        assert list(map(int, cells[4:])) == [part["positives"][method] for method in METHODS]
    for part in record["objects"]:
        counts = part["positives"]
        assert counts["DETR"] == 1 and counts["FreeAnchor"] == 50 and counts["RPN"] > 0 and counts["RetinaNet"] > 0
    sizes = {name: Image.open(tmp_path / name).size for name in ("assignments.png", "suppression.png")}
    assert min(sizes["assignments.png"]) > 1000, "ten panels of 448 pixels"


def test_the_counts_of_cells_and_points_are_those_of_loops(root: Path, tmp_path: Path):
    record = run(tmp_path, *keys(root), "image=000002.png", "split=train")
    boxes = [part["box"] for part in record["objects"]]
    centres = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes]
    cells = [(int(x / 64 * 7), int(y / 64 * 7)) for x, y in centres]
    for index, (part, (x0, y0, x1, y1)) in enumerate(zip(record["objects"], boxes, strict=True)):
        assert part["positives"]["YOLOv1"] == (cells.index(cells[index]) == index)
        points = [np.arange(stride / 2, 64, stride) for stride in (2, 4, 8, 16, 32)]
        inside = sum(((p > x0) & (p < x1)).sum() * ((p > y0) & (p < y1)).sum() for p in points)
        assert part["positives"]["AutoAssign"] == inside


def test_checkpoints_are_compared_and_suppression_gets_the_last_ones_detections(
    root: Path, tmp_path: Path, capsys: Printed
):
    folder = tmp_path / "run/checkpoints"
    for step, seed in ((100, 0), (200, 1), (300, 1)):
        save_checkpoint(folder / f"step_{step:08d}.pt", root, seed)
    record = run(tmp_path / "out", f"checkpoint={folder}", "images=3")
    first, second = record["stability"]
    assert (first["from"], first["to"], first["images"]) == ("100", "200", 3)
    assert first["changed"] > 0 and first["share"] == first["changed"] / first["objects"]
    assert first["share"] * first["objects"] / 3 <= first["instability"] <= 2 * first["changed"] / 3
    assert second["changed"] == 0 and second["instability"] == 0, "the last two have the same weights"
    assert 1 <= len(record["suppression"]) <= 7, "detections of the 7 queries"
    scores = [row["score"] for row in record["suppression"]]
    assert scores == sorted(scores, reverse=True) and record["suppression"][0]["dropped by"] is None
    assert record["weights"] == "Weights: step_00000300.pt."
    assert "matching from one checkpoint to the next (val)" in capsys.readouterr().out
    assert (tmp_path / "out/stability.png").is_file()
    files = ",".join(str(folder / f"step_{step:08d}.pt") for step in (100, 300))
    by_files = run(tmp_path / "files", f"checkpoint={files}", "images=3")["stability"]
    assert [(row["from"], row["to"], row["changed"]) for row in by_files] == [("100", "300", first["changed"])]


def test_an_image_without_objects_is_drawn(root: Path, tmp_path: Path):
    data = build(configure("train", keys(root))["data"])
    folder = Path(data.where("val", 0)).parent
    truth = data.ground_truth("val")
    truth["annotations"] = [box for box in truth["annotations"] if box["image_id"] != 1]
    (tmp_path / "val.json").write_text(json.dumps(truth))
    files = [f"data.train.images={folder}", f"data.train.annotations={tmp_path / 'val.json'}", "data.val_count=0"]
    files += [f"data.test.images={folder}", f"data.test.annotations={tmp_path / 'val.json'}"]
    record = run(tmp_path / "out", *SMALL, "data=coco", *files, "data.augmentation.eval_size=64", "image=1")
    assert record["split"] == "test" and record["objects"] == [] and record["suppression"] == []


REFUSED = {
    "a photo": (["input=photo.jpg"], r"^input=: a photo has no objects to assign; give image=ID"),
    "no image": (
        ["image=99"],
        r"^image=99: no image of val has this id or file name; give one such as 1 or 000001.png",
    ),
    "no split": (["split=vall"], r"^split=vall is no split; did you mean val\?|^split=vall is no split"),
    "images": (["images=0"], r"^images=0 is not a whole number of at least 1\.$"),
    "nms": (["nms=1.5"], r"^nms=1.5 is not a number from 0 to 1\.$"),
    "a key": (["imge=3"], r"imge"),
    "a folder": (["checkpoint={root}"], r"holds 0 step checkpoints .* trainer\.average_last=N"),
    "a file": (["checkpoint=none.pt"], r"^checkpoint=none.pt: there is no such file\.$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_in_one_sentence(case: str, root: Path, tmp_path: Path, capsys: Printed):
    words, sentence = REFUSED[case]
    words = [word.format(root=root) for word in words]
    others = [] if words[0].startswith("checkpoint=") else keys(root)
    run(tmp_path / "out", *others, *words, code=2)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(sentence, error.strip()), error


def test_without_a_model_or_with_a_classifier_nothing_is_drawn(tmp_path: Path, capsys: Printed):
    run(tmp_path / "out", "data=shapes", code=2)
    assert "Neither a checkpoint nor a model is given" in capsys.readouterr().err
    run(tmp_path / "out", "model=vit", code=2)
    assert "The task Classification has no boxes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_checkpoints_of_different_detectors_are_refused(root: Path, tmp_path: Path, capsys: Printed):
    files = [save_checkpoint(tmp_path / f"{seed}.pt", root, seed) for seed in range(2)]
    content = checkpoint.load(files[0])
    content["task"]["categories"][0]["name"] = "disc"
    checkpoint.save(files[0], content)
    run(tmp_path / "out", f"checkpoint={files[0]},{files[1]}", code=2)
    assert "has other classes or queries than" in capsys.readouterr().err


def test_the_script_is_a_command():
    assert commands()["assignments"].name == "assignments.py"
