"""Several processes: the same run in any number of them, sharded or not; their evaluations, and how they end."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nursery import Child, free_port, run, start_ranks
from PIL import Image
from teaching import write_teacher

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
TASKS = ("detr", "vit", "seq2seq")
LENGTH = ["trainer.steps=20", "trainer.eval_every=10", "trainer.save_every=4", "trainer.log_every=1"]
LENGTH += ["trainer.precision=fp32"]  # in bf16 a loss that is summed in another order differs by 3e-4
# A low rate: where a true gradient is zero, Adam's steps are rounding noise, which can change DETR's matching.
LENGTH += ["optimizer.lr=1e-4", "schedule.warmup=2", "trainer.timeout=60", "run_dir=run", "resume=auto"]
SMALL = {
    "detr": [
        *("model=detr", "model.width=32", "model.queries=7", "model.dropout=0", "data.train_count=40"),
        *("data.val_count=7", "data.test_count=5", "data.batch_size=5", "trainer.micro_batch=2", "trainer.workers=0"),
    ],
    "masks": [
        *("model=dino", "model.masks=true", "data.stuff=true", "model.width=32", "model.queries=7", "model.dropout=0"),
        *("data.train_count=40", "data.val_count=7", "data.test_count=5", "data.batch_size=5"),
        *("trainer.micro_batch=2", "trainer.workers=0", "task.predict.panoptic_threshold=0.01"),
    ],
    "vit": [
        *("model=vit", "model.width=32", "model.layers=2", "model.heads=2", "data.batch_size=16"),
        *("data.augmentation.mixup=0.8", "trainer.micro_batch=5"),
    ],
    "distilled": [
        *("model=vit", "model.width=32", "model.layers=2", "model.heads=2", "model.distillation_token=true"),
        *("task.distillation.kind=soft", "task.distillation.temperature=2.0", "data.batch_size=16"),
        *("data.augmentation.mixup=0.8", "trainer.micro_batch=5"),
    ],
    "swin": [
        *("model=swin", "model.width=16", "model.heads=[2,2]", "model.window=3", "data.batch_size=16"),
        *("data.augmentation.mixup=0.8", "trainer.micro_batch=5"),
    ],
    "igpt": [
        *("model=igpt", "model.width=32", "model.layers=2", "model.heads=2", "model.feedforward=48", "model.dropout=0"),
        *("task.loss.classification=0.5", "data.batch_size=16", "trainer.micro_batch=5"),
    ],
    "mae": [
        *("model=mae", "model.width=32", "model.layers=2", "model.heads=2", "model.feedforward=48"),
        *("data.batch_size=16", "trainer.micro_batch=5"),
    ],
    "seq2seq": [
        *("model=seq2seq", "data=parallel_text", "model.width=32", "model.heads=2", "model.feedforward=48"),
        *("model.encoder_layers=1", "model.decoder_layers=2", "data.tokenizer.pieces=bytes"),
        *("data.tokenizer.vocabulary=275", "data.batch_size=300", "data.val_count=7", "data.test_count=5"),
        *("data.longest=60", "task.predict.longest_extra=5", "trainer.micro_batch=200", "model.blocks.dropout=0"),
    ],
}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The arguments of a small run of a task without dropout, with its data in a temporary folder."""
    folder = tmp_path_factory.mktemp("data")
    digits = {"0": "null", "1": "eins", "2": "zwei", "3": "drei", "4": "vier"}
    numbers = [np.base_repr(number, 5) for number in range(6, 125)]
    rows = [f"{' '.join(number)}\t{' '.join(digits[digit] for digit in number)}\n" for number in numbers]
    (folder / "train.tsv").write_text("".join(rows), encoding="utf-8")
    shapes = f"data.root={folder / 'shapes'}"
    data = {"detr": shapes, "masks": shapes, "seq2seq": f"data.train.pairs={folder / 'train.tsv'}"}
    data["distilled"] = f"task.distillation.teacher={write_teacher(folder / 'teacher.pt')}"
    return lambda task: [*SMALL[task], *LENGTH, *([data[task]] if task in data else [])]


def losses(folder: Path, name: str = "loss") -> list[float]:
    """The loss of every step, or another number of the training log."""
    records = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [record[f"train/{name}"] for record in records if "train/loss" in record]


def ends(ranks: list[Child], code: int = 0) -> list[str]:
    """The outputs of the ranks, after all have ended with `code`."""
    codes = [rank.end() for rank in ranks]
    outputs = [rank.output() for rank in ranks]
    assert codes == [code] * len(ranks), "\n".join(outputs)[-6000:]
    return outputs


def numbers_of(output: str) -> dict[str, float]:
    """The numbers in the JSON line of evaluate.py."""
    return dict(json.loads(next(line for line in output.splitlines() if line.startswith("{"))))


@pytest.fixture(scope="module")
def alone(line: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the run in one process."""
    folders: dict[str, Path] = {}

    def trained(task: str) -> Path:
        if task not in folders:
            folders[task] = tmp_path_factory.mktemp("alone")
            run(folders[task], *line(task))
        return folders[task]

    return trained


CUTS = [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (3, "fsdp")]


@pytest.mark.parametrize(
    ("task", "world", "strategy"),
    [
        *((task, *cut) for task in TASKS for cut in CUTS),
        *(("masks", 3, "ddp"), ("masks", 2, "fsdp"), ("distilled", 2, "ddp"), ("distilled", 2, "fsdp")),
        *(("swin", 2, "fsdp"), ("igpt", 2, "fsdp"), ("mae", 2, "fsdp")),
    ],
)
def test_any_number_of_ranks_takes_the_same_steps_sharded_or_not(task, world, strategy, line, alone, tmp_path):
    """Batches do not divide evenly, and with three ranks some have fewer micro-batches, or none."""
    outputs = ends(start_ranks(tmp_path, *line(task), f"trainer.strategy={strategy}", world=world))
    assert f"{world} processes" in outputs[0]
    assert losses(tmp_path) == pytest.approx(losses(alone(task)), rel=1e-5) and len(losses(tmp_path)) == 20
    if task == "distilled":
        assert losses(tmp_path, "teacher") == pytest.approx(losses(alone(task), "teacher"), rel=1e-5)
    norms = [losses(folder, "gradient_norm") for folder in (tmp_path, alone(task))]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    numbers, expected = (json.loads((folder / "run/results.json").read_text()) for folder in (tmp_path, alone(task)))
    assert numbers.keys() == expected.keys()


@pytest.mark.parametrize("task", [*TASKS, "distilled"])
def test_ranks_resume_from_each_others_checkpoints_with_average_and_optimizer(task, line, tmp_path):
    """Two sharded ranks, then three unsharded ones, then one process; the result is that of one process, rounded."""
    ema = [*line(task), "trainer.ema_decay=0.9"]
    run(tmp_path / "alone", *ema)
    stop = ("at_step", 9, "after the update", "send", "SIGTERM")
    ends(start_ranks(tmp_path, *ema, "trainer.strategy=fsdp", world=2, faults=[stop]), code=143)
    stop = ("at_step", 13, "after the update", "send", "SIGTERM")
    outputs = ends(start_ranks(tmp_path, *ema, world=3, faults=[None, None, stop]), code=143)
    assert "resuming at 10" in outputs[0]
    assert "resuming at 14" in run(tmp_path, *ema)
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    name = "run/checkpoints/step_00000020.pt"
    result, expected = (torch.load(folder / name, weights_only=True) for folder in (tmp_path, tmp_path / "alone"))
    assert result["optimizer"].keys() == expected["optimizer"].keys() and result["average"]["updates"] == 20
    for name, value in expected["average"]["weights"].items():
        if name.endswith("in_proj.bias"):  # the true gradient of the keys' bias is zero, so Adam's steps are rounding
            result["average"]["weights"][name][32:64] = value[32:64]
        if value.is_floating_point():
            # Adam moves an element whose gradient is about the rounding error by up to the learning rate, 1e-4, in
            # either direction. At most one of 1,000 elements may be such; all others are equal up to 1e-5.
            difference = (result["average"]["weights"][name] - value).abs()
            assert difference.max() <= 1e-4 and (difference > 1e-5).sum() <= difference.numel() / 1000, name
    outputs = ends(start_ranks(tmp_path / "new", *ema, "trainer.strategy=fsdp", "trainer.steps=2",
                         f"checkpoint={tmp_path / 'run/checkpoints/step_00000020.pt'}", world=2))  # fmt: skip
    assert "step_00000020.pt" in outputs[0]


@pytest.mark.parametrize("task", [*TASKS, "masks"])
def test_any_number_of_ranks_evaluates_to_the_same_digits(task, alone, tmp_path):
    """Sets that do not divide evenly, in batches of one and of many, and fewer batches than ranks."""
    checkpoint = f"checkpoint={alone(task) / 'run/checkpoints/best.pt'}"
    for micro_batch in (1, 10_000):
        arguments = [checkpoint, f"trainer.micro_batch={micro_batch}", "trainer.precision=bf16"]
        expected = numbers_of(run(tmp_path / f"1-{micro_batch}", *arguments, door="evaluate"))
        for world in (2, 3):
            outputs = ends(start_ranks(tmp_path / f"{world}-{micro_batch}", *arguments, world=world, door="evaluate"))
            assert numbers_of(outputs[0]) == expected


@pytest.fixture(scope="module")
def few_objects(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a detection set in which only one of five images has objects."""
    folder = tmp_path_factory.mktemp("few")
    rng = np.random.default_rng(0)
    images = [{"id": number, "file_name": f"{number}.png", "width": 40, "height": 32} for number in range(5)]
    for image in images:
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), np.uint8)).save(folder / str(image["file_name"]))
    boxes = [{"id": 1, "image_id": 2, "category_id": 1, "bbox": [4, 4, 12, 9], "area": 108, "iscrowd": 0}]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "all.json").write_text(json.dumps(content))
    return [f"data.{split}.{key}={folder / name}" for split in ("train", "val", "test")
            for key, name in (("images", "."), ("annotations", "all.json"))]  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_with_no_targets_neither_hangs_nor_changes_the_step(strategy, few_objects, tmp_path):
    small = [argument for argument in SMALL["detr"] if "count" not in argument]
    augmentation = ["data.augmentation.eval_size=64", "data.augmentation.sizes=[64]", "data.augmentation.kind=flip"]
    arguments = [*small, "data=coco", *few_objects, *augmentation, *LENGTH, "trainer.steps=6"]
    run(tmp_path / "alone", *arguments)
    ends(start_ranks(tmp_path, *arguments, f"trainer.strategy={strategy}", world=3))
    assert losses(tmp_path) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)


# A model with a step that depends on the split into micro-batches.

NORMED = """
from torch import Tensor, nn


class Normed(nn.Module):
    \"\"\"A convolution with live BatchNorm, pooled, to the classes.\"\"\"

    def __init__(self, *, classes: int, channels: int, image_size: tuple[int, int]):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(2))
        self.head = nn.Linear(32, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers(images).flatten(1))
"""
NORMED_YAML = """
# @package _global_
defaults:
  - override /data: digits
  - override /optimizer: adamw_vit_small
  - override /schedule: cosine
  - override /trainer: small_vit

model: {_target_: normed.model.Normed}

task:
  _target_: vit.tasks.classification.Classification
  loss: {smoothing: 0.1}
  predict: {top: 5, attention: none, layer: -1, neighbours: 0}
"""


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run of a user's model in `world` processes, with the model's package."""
    folders: dict[tuple[Any, ...], Path] = {}

    def trained(world: int, *arguments: str, faults: Any = (), code: int = 0, folder: Path | None = None) -> Path:
        key = (world, *arguments)
        if folder is None and key in folders:
            return folders[key]
        folder = folder or folders.setdefault(key, tmp_path_factory.mktemp("normed"))
        for name, text in {"normed/model.py": NORMED, "configs/model/normed.yaml": NORMED_YAML}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text.lstrip("\n"))
        line = ["--config-dir", "configs", "model=normed", "trust=[normed]", "trainer.micro_batch=5", *LENGTH]
        line += ["data.batch_size=16", "trainer.ema_decay=0", "optimizer.lr=1e-2", *arguments]
        outputs = ends(start_ranks(folder, *line, world=world, faults=faults), code)
        notice = "per micro-batch: BatchNorm (1 layer): a step depends on trainer.micro_batch and on the number of"
        assert notice in outputs[0]
        return folder

    return trained


@pytest.mark.parametrize("arguments", [(), ("trainer.strategy=fsdp",), ("trainer.ema_decay=0.9",)])
def test_live_batchnorm_evaluates_to_the_same_digits_in_training_and_from_its_file(arguments, normed, tmp_path):
    """In as many processes as in training and in other numbers; each rank has running statistics of its own samples."""
    for world in (2, 3):
        folder = normed(world, *arguments)
        results = json.loads((folder / "run/results.json").read_text())
        expected = {split: {k: v for k, v in results.items() if k.startswith(f"{split}/")} for split in ("val", "test")}
        assert len(expected["test"]) > 1 and len(expected["val"]) == 1
        line = [f"checkpoint={folder / 'run/checkpoints/best.pt'}", "trust=[normed]", "trainer.micro_batch=5"]
        for split, ranks in (("test", 1), ("test", 2), ("test", 3), ("val", 1), ("val", 2)):
            shutil.copytree(folder / "normed", tmp_path / f"{world}-{split}-{ranks}/normed")
            children = start_ranks(tmp_path / f"{world}-{split}-{ranks}", *line, f"split={split}", world=ranks,
                                door="evaluate")  # fmt: skip
            numbers = numbers_of(ends(children)[0])
            assert {name: numbers[name] for name in expected[split]} == expected[split]


def test_live_batchnorm_resumes_to_the_same_end_in_several_processes(normed, tmp_path):
    uninterrupted = normed(2)
    stop = ("at_step", 9, "after the update", "send", "SIGTERM")
    normed(2, folder=tmp_path, faults=[None, stop], code=143)
    normed(2, folder=tmp_path)
    metrics, expected = ((folder / "run/metrics.jsonl").read_text() for folder in (tmp_path, uninterrupted))
    assert metrics == expected
    result, expected = (torch.load(folder / "run/checkpoints/step_00000020.pt", weights_only=True)["model"]
                        for folder in (tmp_path, uninterrupted))  # fmt: skip
    assert all(torch.equal(result[name], value) for name, value in expected.items())


# How processes end.


def test_a_rank_that_fails_ends_the_others_within_seconds(line, tmp_path):
    start = time.monotonic()
    fault = ("at_step", 9, "before the update", "fail")
    ranks = start_ranks(tmp_path, *line("vit"), world=2, faults=[None, fault])
    assert [rank.end(60) for rank in ranks] == [1, 1]
    assert "ZeroDivisionError: a defect on purpose" in ranks[1].output() and re.search(
        r"Connection (closed|reset) by peer", ranks[0].output()
    )
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(line, tmp_path):
    fault = ("at_step", 9, "before the update", "hang")
    ranks = start_ranks(tmp_path, *line("vit"), "trainer.timeout=3", world=2, faults=[None, fault])
    with ranks[1]:
        ranks[0].wait_for("step 9 of")
        start = time.monotonic()
        assert ranks[0].end(60) == 1 and time.monotonic() - start < 20
        assert "Timed out" in ranks[0].output()


def torchrun(folder: Path, *arguments: str, options: tuple[str, ...], **environment: str) -> subprocess.Popen[str]:
    """Start train.py under torchrun, as a user does."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=variables, **pipes)


def test_torchrun_shows_the_traceback_of_the_rank_that_failed(line, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import faults\n"
        "    faults.at_step(3, 'before the update', 'fail')\n"
    )
    process = torchrun(tmp_path, *line("vit"), options=("--nproc-per-node", "2"), PYTHONPATH=str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    cause = output.partition("Root Cause")[2]
    assert "rank      : 1" in cause and "ZeroDivisionError: a defect on purpose" in cause, output[-4000:]


def test_two_nodes_of_one_machine_train_one_run(line, alone, tmp_path):
    endpoint = f"localhost:{free_port()}"
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
    nodes = [torchrun(tmp_path, *line("vit"), options=options) for _ in range(2)]
    outputs = [node.communicate(timeout=180)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-6000:]
    assert sum("Everything is in" in output for output in outputs) == 1, "one log"
    assert losses(tmp_path) == pytest.approx(losses(alone("vit")), rel=1e-5)
