"""The doors as a user calls them: one small run on generated shapes, then everything that can be done with it."""

import json
import os
import pickle
import re
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
    "trainer.precision=fp32",  # ranks sum in another order, so they are compared in fp32
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
    return tmp_path_factory.mktemp("shapes of (all), kinds")  # a path that Hydra's grammar would split


@pytest.fixture(scope="module")
def trained(door, tmp_path_factory, shapes) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, door("train", "model=detr", *TINY, f"data.root={shapes}", f"run_dir={folder}")


def test_a_run_prints_its_results_and_the_folder_with_everything(trained):
    folder, output = trained
    for word in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100"):
        assert f"test/{word} " in output
    assert str(folder) in output and "resume=auto" in output and "parameters" in output and "9 images" in output
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
    assert "\r" not in output, "no progress bar outside a terminal"


def test_the_same_line_again_gives_the_same_results(door, command, trained, tmp_path, shapes):
    """In a process that Python starts, so that the seed of its hashes differs."""
    folder = trained[0]
    command("train", "model=detr", *TINY, f"data.root={shapes}", f"run_dir={tmp_path / 'two'}", "trainer.workers=0")
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()
    door("train", "--config-dir", str(folder), "--config-name", "config", f"run_dir={tmp_path / 'three'}")
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "three/metrics.jsonl").read_bytes()


def test_a_finished_run_is_reported_and_not_overwritten(door, trained, shapes):
    folder = trained[0]
    line = ["model=detr", *TINY, f"data.root={shapes}", f"run_dir={folder}"]
    assert "is finished" in door("train", *line, "resume=auto")
    assert "already holds a run" in door("train", *line, code=2)


def test_evaluation_gives_the_results_of_training_again(door, trained, tmp_path, shapes):
    folder = trained[0]
    output = door(
        "evaluate",
        f"checkpoint={folder}/checkpoints/best.pt",
        "details=true",
        f"output={tmp_path}",
        "trainer.workers=0",
    )
    expected = json.loads((folder / "results.json").read_text())
    tested = {name: value for name, value in expected.items() if name.startswith("test/")}
    assert json.loads(next(line for line in output.splitlines() if line.startswith("{"))) == tested
    assert "triangle" in output and "averaged (EMA)" in output
    assert (tmp_path / "boxes.json").read_bytes() == (folder / "predictions/boxes.json").read_bytes()
    written = json.loads((tmp_path / "results.json").read_text())
    assert {name: value for name, value in written.items() if name.startswith("test/")} == tested
    assert written["files"] == {"data.root": str(shapes)} and written["split"] == "test" and written["samples"] == 9


@pytest.mark.parametrize("name", ["pycocotools", "hotcoco", "faster_coco_eval"])
def test_each_evaluator_gives_the_results_of_training_again(door, trained, name):
    """faster_coco_eval is a former value, which is read as auto."""
    if name == "hotcoco":
        pytest.importorskip(name)
    output = door("evaluate", f"checkpoint={trained[0]}/checkpoints/best.pt", f"task.evaluator={name}")
    expected = json.loads((trained[0] / "results.json").read_text())
    numbers = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert numbers == {key: value for key, value in expected.items() if key.startswith("test/")}


def test_two_processes_evaluate_to_the_same_results(door, trained):
    folder = trained[0]
    output = door("evaluate", f"checkpoint={folder}/checkpoints/best.pt", processes=2)
    numbers = [line for line in output.splitlines() if line.startswith("{")]
    expected = json.loads((folder / "results.json").read_text())
    assert [json.loads(line) for line in numbers] == [{k: v for k, v in expected.items() if k.startswith("test/")}]


def test_two_processes_train_into_one_folder_and_take_the_same_first_steps(command, trained, tmp_path, shapes):
    folder = tmp_path / "two processes"
    output = command("train", "model=detr", *TINY, f"data.root={shapes}", f"run_dir={folder}", processes=2)
    assert output.count("Everything is in") == 1, "one log"
    files = [run / "metrics.jsonl" for run in (trained[0], folder)]
    single, double = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    assert single[0]["train/loss"] == pytest.approx(double[0]["train/loss"], rel=1e-5)


def test_predictions_are_pictures_and_json(door, trained, tmp_path, shapes):
    source = tmp_path / "my pictures, mostly [mine]"
    source.mkdir()
    Image.new("L", (90, 50), 120).save(source / "grey=1.png")
    Image.new("RGBA", (64, 64), (9, 99, 200, 100)).save(source / "clear.png")
    output = door(
        "predict",
        f"checkpoint={trained[0]}/checkpoints/best.pt",
        f"input={source}",
        f"output={tmp_path / 'out'}",
        "threshold=0",
    )
    assert "grey=1.png:" in output and "clear.png:" in output
    answer = json.loads((tmp_path / "out/grey=1.png.boxes.json").read_text())
    assert len(answer["objects"]) == 7 and {"box", "name", "score"} == set(answer["objects"][0])
    assert Image.open(tmp_path / "out/grey=1.png.boxes.jpg").size[0] >= 90


def test_predictions_for_a_video_are_a_video_and_a_line_for_each_frame(door, trained, tmp_path):
    video_files = pytest.importorskip("tests.video_files")
    video_files.write_video(tmp_path / "clip.mp4", [0, 40, 500])
    arguments = [f"checkpoint={trained[0]}/checkpoints/best.pt", f"output={tmp_path / 'out'}", "threshold=0"]
    output = door("predict", *arguments, f"input={tmp_path / 'clip.mp4'}")
    assert re.findall(r"clip\.mp4 frame (\d) at ([0-9.]+) s: ", output) == [
        ("0", "0.000"),
        ("1", "0.040"),
        ("2", "0.500"),
    ]
    answers = [json.loads(line) for line in (tmp_path / "out/clip.mp4.boxes.jsonl").read_text().splitlines()]
    assert [answer["time"] for answer in answers] == [0.0, 0.04, 0.5] and len(answers[2]["objects"]) == 7
    with video_files.av.open(str(tmp_path / "out/clip.mp4.boxes.mp4")) as container:
        assert len(list(container.decode(video=0))) == 3
    (tmp_path / "clip.mp4").write_text("no video")
    assert "is broken or no video" in door("predict", *arguments, f"input={tmp_path / 'clip.mp4'}", code=2)


def test_a_notebook_needs_one_call(trained, tmp_path):
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "photo.png")
    model, task = assembly.load(trained[0] / "checkpoints/best.pt")
    answers = [task.predict(model, batch)[0] for batch in task.read(str(tmp_path / "photo.png"))]
    assert answers[0]["boxes"].shape == (7, 4) and task.categories[0]["name"] == "circle"


def test_fine_tuning_re_initialises_only_tensors_that_do_not_match(door, trained, tmp_path, shapes):
    line = [
        "model=detr",
        *TINY,
        f"data.root={shapes}",
        "trainer.steps=2",
        f"checkpoint={trained[0]}/checkpoints/best.pt",
    ]
    output = door("train", *line, "model.queries=9", f"run_dir={tmp_path / 'queries'}")
    assert "re-initialised: queries.weight\n" in output
    output = door("train", *line, f"run_dir={tmp_path / 'same'}")
    assert "re-initialised" not in output


def test_a_sweep_runs_every_combination_despite_a_failure(door, shapes, tmp_path):
    output = door(
        "train", "-m", "model=detr", *TINY, f"data.root={shapes}", "trainer.steps=1", "model.heads=4,5",
        f"sweep_dir={tmp_path}", code=2,
    )  # fmt: skip
    assert "model.heads=5" in output
    results = [*tmp_path.glob("*/results.json")]
    assert len(results) == 1 and not {*"=, "} & {*results[0].parent.name}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A random ResNet-18 DETR in the official layout, with the official file's other entries, serialised as in 2020."""
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
    """The keys that select coco_mini, a data set that no code names."""
    files = [f"data.{split}.images={folder}/images" for split in ("train", "val", "test")]
    files += [f"data.{split}.annotations={folder}/{name}.json" for split, name in
              (("train", "train"), ("val", "val"), ("test", "val"))]  # fmt: skip
    return ["data=coco", *files, *SMALL_IMAGES]


def test_an_official_file_is_evaluated_with_its_92_logits(door, published, real_data, tmp_path):
    output = door(
        "evaluate", f"checkpoint={published}", *SMALL_R18, *coco_mini(real_data("coco_mini")), f"output={tmp_path}"
    )
    assert "imported" in output and '"test/AP"' in output
    boxes = json.loads((tmp_path / "boxes.json").read_text())
    assert len({box["image_id"] for box in boxes}) == 42
    assert {box["category_id"] for box in boxes} <= set(range(91))
    assert "needs model=NAME" in door("evaluate", f"checkpoint={published}", code=2)
    output = door("evaluate", f"checkpoint={published}", "model=detr_r34", code=2)
    assert "another model" in output and "model=" in output


def test_an_official_file_is_fine_tuned_on_other_classes(door, published, real_data, tmp_path):
    output = door(
        "train", f"checkpoint={published}", *SMALL_R18, *coco_mini(real_data("coco_mini")), "data.batch_size=2",
        "trainer.epochs=null", "trainer.steps=2", "trainer.workers=0", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert "re-initialised: class_head.weight, class_head.bias\n" in output
    assert "without pretrained weights" not in output, "a checkpoint holds the backbone's weights"


def test_real_cells_train_evaluate_and_predict_by_config_keys_only(door, real_data, tmp_path):
    cells = real_data("bccd")
    keys = [f"data.{split}.{key}" for split in ("train", "val", "test") for key in ("images", "annotations")]
    values = [str(cells / (f"{key.split('.')[1]}.json" if key.endswith("annotations") else "images")) for key in keys]
    files = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    output = door(
        "train", "model=detr", "data=coco", *files, *SMALL_IMAGES, "data.batch_size=4", "trainer.steps=2",
        "trainer.workers=0", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert "3 classes" in output and "205 images" in output
    output = door("evaluate", f"checkpoint={tmp_path}/run/checkpoints/best.pt", "details=true")
    assert "Platelets" in output
    image = next((cells / "images").glob("*.jpg"))
    door("predict", f"checkpoint={tmp_path}/run/checkpoints/best.pt", f"input={image}", f"output={tmp_path / 'out'}")
    assert (tmp_path / f"out/{image.name}.boxes.json").exists()


def test_an_official_file_without_its_class_head_is_fine_tuned_and_not_evaluated(door, published, real_data, tmp_path):
    weights = checkpoint.load(published)["model"]
    headless = {f"net.{name}": tensor for name, tensor in weights.items() if not name.startswith("class_embed")}
    torch.save({"state_dict": headless}, tmp_path / "headless.pth")
    line = [f"checkpoint={tmp_path / 'headless.pth'}", *SMALL_R18, *coco_mini(real_data("coco_mini"))]
    output = door(
        "train", *line, "data.batch_size=2", "trainer.epochs=null", "trainer.steps=1", "trainer.workers=0",
        f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert "re-initialised: class_head.weight, class_head.bias\n" in output
    assert "no class head" in door("evaluate", *line, code=2)


def test_images_without_annotations_are_predicted_for_a_server(door, real_data, tmp_path):
    """As COCO's image_info_test-dev2017.json, whose annotations are not published."""
    cells = real_data("bccd")
    info = json.loads((cells / "test.json").read_text())
    (tmp_path / "info.json").write_text(json.dumps({"images": info["images"][:3], "categories": info["categories"]}))
    files = [f"data.{split}.images={cells / 'images'}" for split in ("train", "test")]
    files += [f"data.train.annotations={cells / 'val.json'}", f"data.test.annotations={tmp_path / 'info.json'}"]
    run = tmp_path / "run"
    output = door(
        "train", "model=detr", "data=coco", "data.val_count=0", *files, *SMALL_IMAGES, "data.batch_size=2",
        "trainer.steps=1", "trainer.workers=0", f"run_dir={run}",
    )  # fmt: skip
    assert "no annotations (there will be no numbers)" in output and "no test numbers" in output
    assert not any(key.startswith("test/") for key in json.loads((run / "results.json").read_text()))
    line = [f"checkpoint={run}/checkpoints/step_00000001.pt", "details=true"]
    output = door("evaluate", *line, f"output={tmp_path / 'out'}")
    assert "There are no numbers, because the test data have no annotations.\n" in output
    boxes = json.loads((tmp_path / "out/boxes.json").read_text())
    assert {box["image_id"] for box in boxes} == {image["id"] for image in info["images"][:3]}
    assert (run / "predictions/boxes.json").exists()
    assert "output=FOLDER writes the predictions" in door("evaluate", *line)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harm was done",)


def test_damaged_foreign_and_malicious_checkpoints_are_one_sentence(door, trained, tmp_path):
    whole = (trained[0] / "checkpoints/best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(flipped)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"model": Malicious()}))
    torch.save({"model": Malicious()}, tmp_path / "harm.pt")
    content = checkpoint.load(trained[0] / "checkpoints/best.pt")
    checkpoint.save(tmp_path / "other.pt", {**content, "model": {}, "average": None})
    for name in ("cut", "flipped", "text", "pickle", "harm", "other", "missing"):
        output = door("evaluate", f"checkpoint={tmp_path}/{name}.pt", code=2)
        assert f"{name}.pt" in output and len(output.strip().splitlines()) == 1, output
    assert not (ROOT / "harm was done").exists()


def test_a_missing_gpu_is_one_sentence(door, trained):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    output = door("evaluate", f"checkpoint={trained[0]}/checkpoints/best.pt", "trainer.device=cuda", code=2)
    assert "sees no CUDA GPU" in output
