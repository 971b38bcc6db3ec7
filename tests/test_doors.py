"""The doors as a user goes through them: one small run on drawn shapes, then everything that can be done with it."""

import json
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.files import checkpoint
from common.train import assembly
from detr.importing import official

ROOT = Path(__file__).parents[1]
TINY = [
    "trainer.precision=fp32",  # which ranks that sum in another order are compared in
    "trainer.steps=6",
    "trainer.eval_every=3",
    "trainer.log_every=2",
    "trainer.workers=1",
    "data.train_count=40",
    "data.val_count=7",
    "data.test_count=9",
    "data.batch_size=4",
    "model.width=32",
    "model.queries=7",
    "schedule.warmup=1",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shapes of (all), kinds")  # a path that Hydra's grammar would take apart


@pytest.fixture(scope="module")
def trained(door, tmp_path_factory, shapes) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, door("train", "model=detr", *TINY, f"data.root={shapes}", f"run_dir={folder}")


def test_a_run_prints_its_numbers_and_where_everything_lies(trained):
    folder, said = trained
    for word in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"):
        assert f"test/{word} " in said
    assert str(folder) in said and "resume=auto" in said and "parameters" in said and "9 images" in said
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "train.log",
        "results.json",
        "checkpoints/best.pt",
        "predictions/boxes.json",
    ):
        assert (folder / name).exists(), name
    assert list(folder.glob("events.out.tfevents*"))
    assert "\r" not in said, "no progress bar outside a terminal"


def test_the_same_line_again_gives_the_same_numbers(door, trained, tmp_path, shapes):
    folder = trained[0]
    door("train", "model=detr", *TINY, f"data.root={shapes}", f"run_dir={tmp_path / 'two'}", "trainer.workers=0")
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()
    door("train", "--config-dir", str(folder), "--config-name", "config", f"run_dir={tmp_path / 'three'}")
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "three/metrics.jsonl").read_bytes()


def test_a_finished_run_says_so_and_is_not_written_over(door, trained, shapes):
    folder = trained[0]
    line = ["model=detr", *TINY, f"data.root={shapes}", f"run_dir={folder}"]
    assert "is finished" in door("train", *line, "resume=auto")
    assert "already holds a run" in door("train", *line, code=2)


def test_evaluation_gives_the_numbers_of_training_again(door, trained, tmp_path):
    folder = trained[0]
    said = door(
        "evaluate",
        f"checkpoint={folder}/checkpoints/best.pt",
        "details=true",
        f"output={tmp_path}",
        "trainer.workers=0",
    )
    expected = json.loads((folder / "results.json").read_text())
    tested = {name: value for name, value in expected.items() if name.startswith("test/")}
    assert json.loads(next(line for line in said.splitlines() if line.startswith("{"))) == tested
    assert "triangle" in said and "averaged (EMA)" in said
    assert (tmp_path / "boxes.json").read_bytes() == (folder / "predictions/boxes.json").read_bytes()
    assert json.loads((tmp_path / "results.json").read_text()) == tested


@pytest.mark.parametrize("name", ["pycocotools", "faster_coco_eval"])
def test_either_evaluator_gives_the_numbers_of_training_again(door, trained, name):
    if name == "faster_coco_eval":
        pytest.importorskip(name)
    said = door("evaluate", f"checkpoint={trained[0]}/checkpoints/best.pt", f"task.evaluator={name}")
    expected = json.loads((trained[0] / "results.json").read_text())
    numbers = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert numbers == {key: value for key, value in expected.items() if key.startswith("test/")}


def test_two_processes_evaluate_to_the_same_numbers(door, trained):
    folder = trained[0]
    said = door("evaluate", f"checkpoint={folder}/checkpoints/best.pt", processes=2)
    numbers = [line for line in said.splitlines() if line.startswith("{")]
    expected = json.loads((folder / "results.json").read_text())
    assert [json.loads(line) for line in numbers] == [{k: v for k, v in expected.items() if k.startswith("test/")}]


def test_two_processes_train_into_one_folder_and_take_the_same_first_steps(door, trained, tmp_path, shapes):
    folder = tmp_path / "two processes"
    said = door("train", "model=detr", *TINY, f"data.root={shapes}", f"run_dir={folder}", processes=2)
    assert said.count("All of it lies in") == 1, "one log"
    one, two = ([json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (trained[0], folder))
    assert one[0]["train/loss"] == pytest.approx(two[0]["train/loss"], rel=1e-5)


def test_predictions_are_pictures_and_json(door, trained, tmp_path, shapes):
    source = tmp_path / "my pictures, mostly [mine]"
    source.mkdir()
    Image.new("L", (90, 50), 120).save(source / "grey=1.png")
    Image.new("RGBA", (64, 64), (9, 99, 200, 100)).save(source / "clear.png")
    said = door(
        "predict",
        f"checkpoint={trained[0]}/checkpoints/best.pt",
        f"input={source}",
        f"output={tmp_path / 'out'}",
        "threshold=0",
    )
    assert "grey=1.png:" in said and "clear.png:" in said
    answer = json.loads((tmp_path / "out/grey=1.png.boxes.json").read_text())
    assert len(answer["objects"]) == 7 and {"box", "name", "score"} == set(answer["objects"][0])
    assert Image.open(tmp_path / "out/grey=1.png.boxes.jpg").size[0] >= 90


def test_a_notebook_needs_one_call(trained, tmp_path):
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "photo.png")
    model, task = assembly.load(trained[0] / "checkpoints/best.pt")
    answers = [task.predict(model, batch)[0] for batch in task.read(str(tmp_path / "photo.png"))]
    assert answers[0]["boxes"].shape == (7, 4) and task.categories[0]["name"] == "circle"


def test_fine_tuning_makes_anew_just_what_does_not_fit(door, trained, tmp_path, shapes):
    line = [
        "model=detr",
        *TINY,
        f"data.root={shapes}",
        "trainer.steps=2",
        f"checkpoint={trained[0]}/checkpoints/best.pt",
    ]
    said = door("train", *line, "model.queries=9", f"run_dir={tmp_path / 'queries'}")
    assert "re-initialised: queries.weight\n" in said
    said = door("train", *line, f"run_dir={tmp_path / 'same'}")
    assert "re-initialised" not in said


def test_sweeps_run_every_combination_and_outlive_a_failure(door, shapes, tmp_path):
    said = door(
        "train", "-m", "model=detr", *TINY, f"data.root={shapes}", "trainer.steps=1", "model.heads=4,5",
        f"sweep_dir={tmp_path}", code=2,
    )  # fmt: skip
    assert "model.heads=5" in said
    done = [*tmp_path.glob("*/results.json")]
    assert len(done) == 1 and not {*"=, "} & {*done[0].parent.name}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A random ResNet-18 DETR in the official layout, with the official file's extras, in the serialisation of 2020."""
    from common.config.check import build
    from common.config.compose import configure

    config = configure(
        "train", ["model=detr_r18", "model.queries=11", "model.encoder_layers=1", "model.decoder_layers=2"]
    )
    torch.manual_seed(0)
    model = build(config["model"], classes=91)
    file = tmp_path_factory.mktemp("official") / "detr-r18.pth"
    content = {**official.export(model.state_dict()), "epoch": 499, "args": Namespace(lr=1e-4)}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file


SMALL_R18 = ["model=detr_r18", "model.queries=11", "model.encoder_layers=1", "model.decoder_layers=2"]
SMALL_IMAGES = ["data.augmentation.eval_size=64", "data.augmentation.sizes=[64]", "data.augmentation.kind=flip"]


def coco_mini(folder: Path) -> list[str]:
    """Only keys: no code knows this data set."""
    files = [f"data.{split}.images={folder}/images" for split in ("train", "val", "test")]
    files += [f"data.{split}.annotations={folder}/{name}.json" for split, name in
              (("train", "train"), ("val", "val"), ("test", "val"))]  # fmt: skip
    return ["data=coco", *files, *SMALL_IMAGES]


def test_an_official_file_is_evaluated_with_its_92_logits(door, published, real_data, tmp_path):
    said = door(
        "evaluate", f"checkpoint={published}", *SMALL_R18, *coco_mini(real_data("coco_mini")), f"output={tmp_path}"
    )
    assert "imported" in said and '"test/AP"' in said
    found = json.loads((tmp_path / "boxes.json").read_text())
    assert len({line["image_id"] for line in found}) == 42
    assert {line["category_id"] for line in found} <= set(range(91))
    assert "needs model=NAME" in door("evaluate", f"checkpoint={published}", code=2)
    said = door("evaluate", f"checkpoint={published}", "model=detr_r34", code=2)
    assert "another model" in said and "model=" in said


def test_an_official_file_is_fine_tuned_on_other_classes(door, published, real_data, tmp_path):
    said = door(
        "train", f"checkpoint={published}", *SMALL_R18, *coco_mini(real_data("coco_mini")), "data.batch_size=2",
        "trainer.epochs=null", "trainer.steps=2", "trainer.workers=0", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert "re-initialised: class_head.weight, class_head.bias\n" in said
    assert "Warning" not in said, "weights were given, so nothing is to be said of a backbone without"


def test_real_cells_train_evaluate_and_predict_by_keys_alone(door, real_data, tmp_path):
    cells = real_data("bccd")
    keys = [f"data.{split}.{key}" for split in ("train", "val", "test") for key in ("images", "annotations")]
    values = [str(cells / (f"{key.split('.')[1]}.json" if key.endswith("annotations") else "images")) for key in keys]
    files = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    said = door(
        "train", "model=detr", "data=coco", *files, *SMALL_IMAGES, "data.batch_size=4", "trainer.steps=2",
        "trainer.workers=0", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert "3 classes" in said and "205 images" in said
    said = door("evaluate", f"checkpoint={tmp_path}/run/checkpoints/best.pt", "details=true")
    assert "Platelets" in said
    image = next((cells / "images").glob("*.jpg"))
    door("predict", f"checkpoint={tmp_path}/run/checkpoints/best.pt", f"input={image}", f"output={tmp_path / 'out'}")
    assert (tmp_path / f"out/{image.name}.boxes.json").exists()


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm was done",)


def test_damaged_foreign_and_malicious_checkpoints_are_one_sentence(door, trained, tmp_path):
    whole = (trained[0] / "checkpoints/best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": Harm()}))
    torch.save({"model": Harm()}, tmp_path / "harm.pt")
    content = checkpoint.load(trained[0] / "checkpoints/best.pt")
    checkpoint.save(tmp_path / "other.pt", {**content, "model": {}, "average": None})
    for name in ("cut", "flipped", "text", "pickle", "harm", "other", "missing"):
        said = door("evaluate", f"checkpoint={tmp_path}/{name}.pt", code=2)
        assert f"{name}.pt" in said and len(said.strip().splitlines()) == 1, said
    assert not (ROOT / "harm was done").exists()


def test_a_gpu_that_is_not_there_is_said(door, trained):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    said = door("evaluate", f"checkpoint={trained[0]}/checkpoints/best.pt", "trainer.device=cuda", code=2)
    assert "sees no CUDA GPU" in said
