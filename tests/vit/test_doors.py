"""The doors with the classifier: a small run on digits, then evaluation, prediction, fine-tuning and bad input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common.files import checkpoint
from common.train import assembly

Door = Callable[..., str]
SMALL = ["model.width=32", "model.layers=2", "model.heads=2", "schedule.warmup=1", "trainer.log_every=2"]
RUN = ["model=vit", *SMALL, "data.batch_size=16", "trainer.steps=8", "trainer.eval_every=3"]
RANDOM = [  # all random augmentation and regularisation
    *("data.augmentation.mixup=0.8", "data.augmentation.cutmix=1", "data.augmentation.erase=0.3"),
    *("data.augmentation.policy=rand", "data.augmentation.repeats=2", "data.augmentation.flip=0.5"),
    *("model.blocks.dropout=0.1", "model.blocks.drop_path=0.1", "optimizer.layer_decay=0.8"),
]
COLOURS = {"red fox": (200, 30, 30), "grün": (30, 200, 30), "ü, b=c (d)": (30, 30, 200)}
PHOTO_KEYS = ["data=imagefolder", "data.image_size=8", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"]
pytestmark = pytest.mark.slow


def draw_photos(root: Path, count: int = 4) -> None:
    """Write noisy images of unequal size in three classes, each with its colour."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(9, 30, 2)
                pixels = np.array(colour) + rng.integers(-30, 30, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{number}.png")


def numbers_of(output: str) -> dict[str, float]:
    """The numbers in the JSON line of evaluate.py."""
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def trained(door: Door, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, door("train", *RUN, *RANDOM, f"run_dir={folder}")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("my photos [all], of=mine")
    draw_photos(root)
    return root


# Training and resuming.


def test_a_run_prints_its_numbers_and_writes_its_files(trained: tuple[Path, str]) -> None:
    folder, output = trained
    for words in ("test/top1 ", "test/top5 ", "test/loss ", "10 classes, images of 8 x 8", "resume=auto", str(folder)):
        assert words in output, words
    for name in ("config.yaml", "metrics.jsonl", "train.log", "results.json", "checkpoints/best.pt"):
        assert (folder / name).exists(), name
    assert {file.name for file in (folder / "predictions").iterdir()} == {"predictions.csv", "confusion.png"}
    keys = {key for line in (folder / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {"train/loss", "train/lr", "val/top1", "val/top5", "val/loss", "test/top1", "test/loss"} <= keys


def test_the_same_command_with_workers_gives_the_same_bytes(
    door: Door, trained: tuple[Path, str], tmp_path: Path
) -> None:
    door("train", *RUN, *RANDOM, f"run_dir={tmp_path / 'two'}", "trainer.workers=2")
    assert (trained[0] / "metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()


def test_a_killed_run_resumes_to_the_same_bytes(door: Door, trained: tuple[Path, str], tmp_path: Path) -> None:
    """Killed after step 6 of 8: the last checkpoint is missing, and a line of the log is incomplete."""
    folder = tmp_path / "killed"
    shutil.copytree(trained[0], folder)
    (folder / "results.json").unlink()
    (folder / "checkpoints/step_00000008.pt").unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:-2]) + lines[-2][:20])
    output = door("train", *RUN, *RANDOM, f"run_dir={folder}", "resume=auto")
    assert "resuming at 6" in output and "from the run's own last checkpoint" in output
    assert (folder / "metrics.jsonl").read_bytes() == (trained[0] / "metrics.jsonl").read_bytes()
    assert (folder / "results.json").read_bytes() == (trained[0] / "results.json").read_bytes()


def test_two_processes_train_and_evaluate_to_the_same_numbers(door: Door, inside: Door, tmp_path: Path) -> None:
    """Without dropout, which depends on the rank."""
    line = [
        *RUN,
        *RANDOM,
        "trainer.steps=3",
        "model.blocks.dropout=0",
        "model.blocks.drop_path=0",
        "trainer.device=cpu",
        "trainer.precision=fp32",  # in bf16 a sum that is split differently is a hundredth off
    ]
    inside("train", *line, f"run_dir={tmp_path / '1'}")
    output = door("train", *line, f"run_dir={tmp_path / '2'}", processes=2)
    assert "2 processes" in output and output.count("Everything is in") == 1, "one log"
    single, double = (
        [json.loads(x) for x in (tmp_path / f"{n}/metrics.jsonl").read_text().splitlines()] for n in (1, 2)
    )
    for a, b in zip(single, double, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    tables = [(tmp_path / f"{n}/predictions/predictions.csv").read_text().splitlines() for n in (1, 2)]
    assert [line.split(",")[:2] for line in tables[0]] == [line.split(",")[:2] for line in tables[1]]
    assert len(tables[0]) == 401, "every sample once"


def test_a_sweep_trains_each_seed_in_a_folder_of_its_own(inside: Door, tmp_path: Path) -> None:
    line = ["model=vit", *SMALL, "trainer.steps=1", "data.image_size=[4,8]", "trainer.micro_batch=null"]
    inside("train", "-m", *line, "seed=0,1", f"sweep_dir={tmp_path / 'sweep'}")
    results = sorted((tmp_path / "sweep").glob("*/results.json"))
    assert [file.parent.name.rpartition("-")[0] for file in results] == ["vit-seed_0", "vit-seed_1"]
    assert results[0].read_bytes() != results[1].read_bytes()


# Evaluation and prediction.


def test_evaluation_reproduces_the_numbers_of_training_and_neighbours_add_knn_top1(
    door: Door, trained: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = trained
    file = f"checkpoint={folder}/checkpoints/best.pt"
    output = door("evaluate", file, "details=true", f"output={tmp_path / 'out'}", "task.predict.neighbours=5")
    expected = json.loads((folder / "results.json").read_text())
    numbers = numbers_of(output)
    assert 0.2 < numbers.pop("test/knn_top1") <= 1, "neighbours are often of the same class even after a few steps"
    assert numbers == {name: value for name, value in expected.items() if name.startswith("test/")}
    assert "averaged (EMA)" in output and "taken_for" in output
    for name in ("predictions.csv", "confusion.png"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / "predictions" / name).read_bytes(), name
    table = (tmp_path / "out/predictions.csv").read_text().splitlines()
    right = sum(line.split(",")[1] == line.split(",")[2] for line in table[1:])
    assert right / 400 == numbers["test/top1"]


@pytest.mark.parametrize("size", ["12", "[8,12]", "2"])
def test_images_are_evaluated_at_other_sizes(inside: Door, trained: tuple[Path, str], size: str) -> None:
    numbers = numbers_of(inside("evaluate", f"checkpoint={trained[0]}/checkpoints/best.pt", f"data.image_size={size}"))
    assert numbers.keys() == {"test/top1", "test/top5", "test/loss"} and 0 < numbers["test/loss"] < 5


def test_a_size_that_patches_do_not_fill_is_refused_with_sizes_that_fit(
    inside: Door, trained: tuple[Path, str]
) -> None:
    message = inside("evaluate", f"checkpoint={trained[0]}/checkpoints/best.pt", "data.image_size=[8,11]", code=2)
    assert (
        message.startswith("Images of 8 x 11 pixels") and "such as 8 x 10 or 8 x 12; change data.image_size" in message
    )
    message = inside("train", "model=vit_b16", "data=digits", code=2)
    assert message.startswith("Images of 8 x 8 pixels") and "such as 16 x 16" in message


def test_prediction_prints_lines_and_writes_json_and_pictures_of_attention(
    door: Door, trained: tuple[Path, str], tmp_path: Path
) -> None:
    source, out = tmp_path / "my pictures, mostly [mine]", tmp_path / "out"
    source.mkdir()
    Image.new("L", (90, 50), 120).save(source / "grey=1.png")
    Image.new("RGBA", (8, 8), (9, 99, 200, 100)).save(source / "clear.png")
    (source / "notes.txt").write_text("no image")
    file = f"checkpoint={trained[0]}/checkpoints/best.pt"
    output = door("predict", file, f"input={source}", f"output={out}", "attention=rollout", "layer=1", "top=3")
    assert "grey=1.png: " in output and "clear.png: " in output and "notes" not in output
    content = json.loads((out / "clear.png.classes.json").read_text())
    assert len(content["classes"]) == 3 and content["file"] == str(source / "clear.png")
    names = {f"{name}.{ending}" for name in ("grey=1.png", "clear.png") for ending in ("classes.json", "attention.png")}
    assert {file.name for file in out.iterdir()} == names
    for name in ("grey=1.png", "clear.png"):
        with Image.open(out / f"{name}.attention.png") as picture:
            assert min(picture.size) > 100


def test_a_notebook_loads_a_checkpoint_in_one_call(trained: tuple[Path, str], tmp_path: Path) -> None:
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "photo.png")
    keys = ["task.predict.attention=maps", "task.predict.layer=0", "data.image_size=[8,12]"]
    model, task = assembly.load(trained[0] / "checkpoints/best.pt", *keys)
    ((answer,),) = [task.predict(model, batch) for batch in task.read(str(tmp_path / "photo.png"))]
    assert answer["maps"].shape == (2, 4, 6) and answer["name"] in "0123456789"


def test_mistakes_in_prediction_are_one_sentence(inside: Door, trained: tuple[Path, str], tmp_path: Path) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    line = [f"checkpoint={trained[0]}/checkpoints/best.pt", f"input={tmp_path / 'a.png'}"]
    assert "this model has 2 layers" in inside("predict", *line, "attention=maps", "layer=2", code=2)
    assert "did you mean attention?" in inside("predict", *line, "atention=maps", code=2)
    assert "expected none, maps, rollout, words or bias" in inside("predict", *line, "attention=all", code=2)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    assert "broken.png is broken" in inside("predict", line[0], f"input={tmp_path / 'broken.png'}", code=2)


# A user's images.


def test_fine_tuning_on_photos_re_initialises_the_head_and_predicting_needs_no_training_photos(
    door: Door, inside: Door, trained: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    """From grey digits to colour photos neither the patch embedding nor the head fits; all other tensors do."""
    copied = tmp_path / "photos"
    shutil.copytree(photos, copied)
    file = f"checkpoint={trained[0]}/checkpoints/best.pt"
    line = ["model=vit", *SMALL, *PHOTO_KEYS, "data.batch_size=4", "trainer.steps=4", "optimizer.layer_decay=0.9"]
    output = door("train", *line, f"data.root={copied}", file, f"run_dir={tmp_path / 'run'}", "trainer.workers=2")
    assert "; re-initialised: patches.weight, head.weight, head.bias\n" in output and "unused" not in output
    assert "3 classes" in output and f"train: 12 images of {copied / 'train'}" in output
    best = f"checkpoint={tmp_path / 'run/checkpoints/best.pt'}"
    numbers = numbers_of(inside("evaluate", best, "details=true"))
    assert numbers.keys() == {"test/top1", "test/loss"}, "no top-5 of three classes"
    assert numbers["test/top1"] == json.loads((tmp_path / "run/results.json").read_text())["test/top1"]
    renamed = tmp_path / "by path (moved), x=y"
    copied.rename(renamed)
    output = inside("predict", best, f"input={renamed / 'test/red fox/0.png'}", f"output={tmp_path / 'out'}")
    assert "0.png: " in output and all(name in output for name in COLOURS)
    moved = [f"data.{split}={renamed / split}" for split in ("train", "val", "test")]
    assert numbers_of(inside("evaluate", best, "data.root=null", *moved)) == numbers


def test_the_head_is_loaded_when_the_classes_are_the_same(
    inside: Door, trained: tuple[Path, str], tmp_path: Path
) -> None:
    line = [*RUN, "trainer.steps=1", f"checkpoint={trained[0]}/checkpoints/best.pt", "model.blocks.qk_norm=true"]
    output = inside("train", *line, f"run_dir={tmp_path / 'run'}")
    first_line = output.partition("\n")[0]
    assert "re-initialised: encoder.blocks.0.attention.q_norm.weight" in first_line and ", head." not in first_line


def test_a_run_without_val_and_test_names_its_last_checkpoint(inside: Door, photos: Path, tmp_path: Path) -> None:
    line = ["model=vit", *SMALL, *PHOTO_KEYS, "data.val_count=0", "trainer.steps=1", "trainer.workers=0"]
    output = inside("train", *line, f"data.train={photos / 'train'}", f"run_dir={tmp_path / 'run'}")
    assert "best.pt" not in output and "step_00000001.pt" in output
    output = inside("evaluate", f"checkpoint={tmp_path}/run/checkpoints/step_00000001.pt", code=2)
    assert output.startswith("split=test: the data set has no such split")


def test_sixty_photos_in_class_folders_train_by_data_root_alone(inside: Door, tmp_path: Path) -> None:
    """The batch is larger than the set; evaluating repeats the numbers of the run."""
    draw_photos(tmp_path / "photos", count=20)
    for name in ("val", "test"):
        shutil.rmtree(tmp_path / "photos" / name)
    root = tmp_path / "photos/train"
    line = ["model=vit_photo", f"data.root={root}", "trainer.steps=2"]
    output = inside("train", *line, f"run_dir={tmp_path / 'run'}")
    for split, count in (("train", 48), ("val", 6), ("test", 6)):
        assert f"data      {split}: {count} images of {root}" in output
        assert f"{split}: by class: grün {count // 3}, red fox {count // 3}, ü, b=c (d) {count // 3}\n" in output
    best = f"checkpoint={tmp_path / 'run/checkpoints/best.pt'}"
    numbers = json.loads((tmp_path / "run/results.json").read_text())
    assert numbers_of(inside("evaluate", best))["test/top1"] == numbers["test/top1"]


def test_a_run_of_vit_photo_resumes_bit_for_bit(inside: Door, photos: Path, tmp_path: Path) -> None:
    """Its optimizer is Muon with AdamW."""
    line = ["model=vit_photo", "data.image_size=16", "data.batch_size=4", f"data.root={photos}", "trainer.steps=4"]
    line += ["trainer.save_every=2", "trainer.eval_every=4"]
    inside("train", *line, f"run_dir={tmp_path / 'whole'}")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("results.json", "checkpoints/best.pt", "checkpoints/step_00000004.pt"):
        (tmp_path / "cut" / name).unlink()
    output = inside("train", *line, f"run_dir={tmp_path / 'cut'}", "resume=auto")
    assert "resuming at 2" in output
    whole, cut = (checkpoint.load(tmp_path / run / "checkpoints/step_00000004.pt") for run in ("whole", "cut"))
    for part in ("model", "average"):
        torch.testing.assert_close(cut[part], whole[part], rtol=0, atol=0)
    matrix = "encoder.blocks.0.feed_forward.expand.weight"
    assert torch.equal(*(run["optimizer"][matrix]["momentum_buffer"] for run in (whole, cut)))


def test_a_run_keeps_the_cut_with_which_an_earlier_version_began_it(inside: Door, tmp_path: Path) -> None:
    """Its config.yaml has the former defaults: a number of images of val, and no test."""
    draw_photos(tmp_path / "photos", count=20)
    for name in ("val", "test"):
        shutil.rmtree(tmp_path / "photos" / name)
    run = ["model=vit", *SMALL, *PHOTO_KEYS, f"data.root={tmp_path / 'photos'}", f"run_dir={tmp_path / 'run'}"]
    run += ["trainer.workers=0", "trainer.steps=2", "trainer.eval_every=1"]
    inside("train", *run, "data.val_count=7", "data.test_share=0")
    (tmp_path / "run/results.json").unlink()
    output = inside("train", *run, "resume=auto")
    assert "resuming at 2" in output and "train: 53 images" in output and "val: 7 images" in output
    assert "test: " not in output


# Bad input.


def test_data_and_models_of_different_wings_are_refused(door: Door) -> None:
    """In processes of their own, for the exit code; it is fast, since nothing is imported."""
    for line in (["model=vit", "data=coco"], ["model=detr", "data=digits"]):
        message = door("train", *line, code=2)
        assert "do not fit together" in message and message.count("\n") == 1


def test_a_folder_without_classes_is_refused(inside: Door, tmp_path: Path) -> None:
    (tmp_path / "data/train").mkdir(parents=True)
    message = inside("train", "model=vit", *PHOTO_KEYS, f"data.root={tmp_path / 'data'}", code=2)
    assert message.startswith(f"The folder {tmp_path / 'data/train'} holds no class; expected")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(inside: Door, photos: Path, tmp_path: Path, workers: int) -> None:
    shutil.copytree(photos, tmp_path / "data")
    broken = tmp_path / "data/train/grün/2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    line = ["model=vit", *SMALL, *PHOTO_KEYS, "data.batch_size=12", "trainer.steps=2", f"trainer.workers={workers}"]
    message = inside("train", *line, f"data.root={tmp_path / 'data'}", code=2)
    assert message.startswith(f"The image {broken} is broken or no image")


def test_a_label_that_is_no_class_is_refused(
    inside: Door, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos, tmp_path / "data")
    (tmp_path / "data/val/grün").rename(tmp_path / "data/val/gruen")
    line = ["model=vit", *SMALL, "trainer.steps=2"]
    message = inside("train", *line, *PHOTO_KEYS, f"data.root={tmp_path / 'data'}", "trainer.workers=0", code=2)
    assert message.startswith(f"{tmp_path / 'data/val/gruen'} is no class: the classes are the folders of")
    monkeypatch.setattr("vit.data.digits.Digits.names", tuple("012345678"))
    message = inside("train", *line, code=2)
    assert "its label is 9, and the classes are numbered from 0 to 8" in message


@pytest.fixture(scope="module")
def detector(door: Door, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a detector with the same shapes in its encoder as the classifier."""
    folder = tmp_path_factory.mktemp("detr")
    shape = ["model.width=32", "model.heads=2", "model.feedforward=128", "trainer.steps=1", "schedule.warmup=0"]
    counts = ["data.train_count=4", "data.val_count=1", "data.test_count=1", "data.batch_size=2"]
    door("train", "model=detr", *shape, *counts, f"data.root={folder / 'shapes'}", f"run_dir={folder / 'run'}")
    return folder / "run/checkpoints/best.pt"


def test_a_checkpoint_of_another_architecture_is_refused(
    inside: Door, detector: Path, trained: tuple[Path, str], tmp_path: Path
) -> None:
    line = ["model=vit", "data=digits", *SMALL, f"checkpoint={detector}"]
    for name, more in {"train": ["trainer.steps=1"], "evaluate": [], "predict": ["input=x"]}.items():
        message = inside(name, *line, *more, code=2)
        assert "was trained for detr.tasks.detection.Detection and this run is vit.tasks" in message, name
    message = inside("evaluate", "model=detr", "data=shapes", f"checkpoint={trained[0]}/checkpoints/best.pt", code=2)
    assert "was trained for vit.tasks.classification.Classification" in message
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    remedies = {"train": "no weight matrix that matches the model", "evaluate": "name the model that the file holds"}
    for name, remedy in remedies.items():
        message = inside(name, "model=vit", f"checkpoint={tmp_path / 'resnet18.pth'}", code=2)
        assert remedy in message and "resnet18.pth" in message


def test_a_checkpoint_of_another_width_is_refused_as_initial_weights(inside: Door, trained: tuple[Path, str]) -> None:
    """Only a bias of the head would fit, so that the run would in fact train from scratch."""
    file = f"checkpoint={trained[0]}/checkpoints/best.pt"
    assert "no weight matrix that matches" in inside("train", *RUN, "model.width=24", file, code=2)
    assert "weights of another model" in inside("evaluate", file, "model.width=24", code=2)
    assert "weights of another model" in inside("evaluate", file, "model.layers=3", code=2)


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (Path("harm was done"),)


def test_an_npz_with_pickled_objects_is_refused_and_executes_nothing(inside: Door, tmp_path: Path) -> None:
    harm = np.empty(1, dtype=object)
    harm[0] = Harm()
    np.savez(tmp_path / "vit.npz", **{"embedding/kernel": harm, "cls": np.zeros(3)})
    for name in ("train", "evaluate"):
        message = inside(name, "model=vit", f"checkpoint={tmp_path / 'vit.npz'}", code=2)
        assert "vit.npz holds pickled objects (embedding/kernel)" in message
    assert not (tmp_path / "harm was done").exists()


def test_values_out_of_range_are_refused(inside: Door) -> None:
    for key, words in {
        "data.mean=[0.1,0.2]": "expected a list of 1",
        "data.std=[0]": "data.std[0]=0: expected a number above 0",
        "data.image_size=[8,8,8]": "expected a whole number from 1 up to 65535 or a list of 2",
        "data.val_count=1500": "nothing to train on",
        "model.heads=5": "must be divisible by model.heads=5",
        "data.augmentation.magnitude=31": "magnitude up to 30",
        "data.augmentation.scale=[1.0,0.5]": "the smaller limit first",
        "data.augmentation.policy=trivia": "did you mean trivial?",
    }.items():
        assert words in inside("train", "model=vit", "trainer.steps=1", key, code=2), key


def test_a_resumed_run_keeps_the_precision_that_auto_resolved_to(
    inside: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*RUN, *RANDOM, "trainer.device=cpu", f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr("common.machine.device._cpu_has_bf16", lambda: True)
    assert ", bf16" in inside("train", *line)
    (tmp_path / "run/results.json").unlink()
    max((tmp_path / "run/checkpoints").glob("step_*.pt")).unlink()
    monkeypatch.setattr("common.machine.device._cpu_has_bf16", lambda: False)
    output = inside("train", *line, "resume=auto")
    assert "resuming at" in output and ", bf16" in output
    assert "precision: bf16" in (tmp_path / "run/config.yaml").read_text()
    assert '"test/top1"' in inside("evaluate", f"checkpoint={tmp_path / 'run/checkpoints/best.pt'}")
    assert checkpoint.load(tmp_path / "run/checkpoints/best.pt")["config"]["trainer"]["precision"] == "bf16"
