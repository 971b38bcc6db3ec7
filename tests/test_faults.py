"""What ends a run, or spoils its files, costs at most the steps since the last checkpoint, and never a result."""

import json
import os
import pickle
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nursery import Child, flipped, run, start_ranks, wait
from PIL import Image

from common.files import checkpoint

pytestmark = pytest.mark.slow
TASKS = ("detr", "vit", "seq2seq")
PLACES = ("before the update", "after the update", "in an evaluation", "in a save")
LENGTH = ["trainer.steps=20", "trainer.eval_every=6", "trainer.save_every=4", "trainer.log_every=3"]
LENGTH += ["trainer.ema_decay=0.9", "schedule.warmup=2", "trainer.timeout=20"]
SMALL = {
    "detr": [
        *("model=detr", "model.width=32", "model.queries=7", "data.train_count=40", "data.val_count=7"),
        *("data.test_count=9", "data.batch_size=4", "trainer.micro_batch=3", "trainer.workers=1", "model.dropout=0.1"),
    ],
    "vit": [
        *("model=vit", "data=imagefolder", "model.width=32", "model.layers=2", "model.heads=2", "data.image_size=8"),
        *("data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.augmentation.mixup=0.8", "data.batch_size=8"),
        *("trainer.micro_batch=5", "trainer.workers=2", "model.blocks.dropout=0.1"),
    ],
    "seq2seq": [
        *("model=seq2seq", "data=parallel_text", "model.width=32", "model.heads=2", "model.feedforward=48"),
        *("model.encoder_layers=1", "model.decoder_layers=1", "data.tokenizer.pieces=bytes"),
        *("data.tokenizer.vocabulary=275", "data.batch_size=300", "data.val_count=7", "data.test_count=9"),
        *("data.longest=60", "task.predict.longest_extra=5", "trainer.micro_batch=200", "trainer.workers=0"),
        "model.blocks.dropout=0.1",
    ],
}


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """A small run's command line; its data lie in a folder of the test."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        for kind, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
            (folder / "photos" / split / f"kind {kind}").mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + draw.integers(-30, 30, (12, 10 + kind, 3))
                file = folder / "photos" / split / f"kind {kind}" / f"{number}.png"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    digits = {"0": "null", "1": "eins", "2": "zwei", "3": "drei", "4": "vier"}
    numbers = [np.base_repr(number, 5) for number in range(6, 125)]
    rows = [f"{' '.join(number)}\t{' '.join(digits[digit] for digit in number)}\n" for number in numbers]
    (folder / "train.tsv").write_text("".join(rows), encoding="utf-8")
    places = {
        "detr": [f"data.root={folder / 'shapes'}"],
        "vit": [f"data.root={folder / 'photos'}"],
        "seq2seq": [f"data.train.pairs={folder / 'train.tsv'}"],
    }
    return lambda task: [*SMALL[task], *LENGTH, *places[task]]


@pytest.fixture(scope="module")
def whole(line: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an unbroken run of this line; each is trained once."""
    runs: dict[str, Path] = {}

    def trained(task: str, *more: str) -> Path:
        key = " ".join((task, *more))
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            run(folder, *line(task), *more, "run_dir=run")
            runs[key] = folder / "run"
        return runs[key]

    return trained


def photos(line: Any) -> Path:
    """The folder of the images to classify."""
    return Path(next(word for word in line("vit") if word.startswith("data.root=")).partition("=")[2])


def go_on(folder: Path, *arguments: str, **options: Any) -> str:
    """The same line again, to its end."""
    return run(folder, *arguments, "run_dir=run", "resume=auto", **options)


def killed(folder: Path, *arguments: str, fault: Any) -> None:
    """The same line with a fault that kills it."""
    run(folder, *arguments, "run_dir=run", "resume=auto", code=-signal.SIGKILL, fault=fault)


def same(one: Any, other: Any) -> bool:
    """Whether two contents are equal in every bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_end(one: Path, other: Path, length: int = 20) -> None:
    """Every tensor of the last checkpoint and of the best, every line of the metrics, and the results."""
    for name in (f"step_{length:08d}.pt", "best.pt"):
        a, b = ({**checkpoint.load(run / "checkpoints" / name), "config": None} for run in (one, other))
        different = [key for key in a if not same(a[key], b[key])]
        assert not different, f"{name} differs in {different}"
    assert (one / "metrics.jsonl").read_text() == (other / "metrics.jsonl").read_text()
    assert json.loads((one / "results.json").read_text()) == json.loads((other / "results.json").read_text())


def deaths(seed: int, count: int = 10) -> list[tuple[int, str]]:
    """Random steps in their order, with the places in turn; two in one step are fine."""
    draw = random.Random(seed)
    steps = sorted(draw.randrange(20) for _ in range(count))
    return [(step, PLACES[number % len(PLACES)]) for number, step in enumerate(steps)]


# Kills.


@pytest.mark.parametrize("task", TASKS)
def test_a_run_killed_at_ten_random_steps_ends_where_the_unbroken_one_ends(task, line, whole, tmp_path):
    for step, place in deaths(seed=TASKS.index(task)):
        killed(tmp_path, *line(task), fault=("at", step, place, "send", "SIGKILL"))
    go_on(tmp_path, *line(task))
    assert_same_end(whole(task), tmp_path / "run")
    assert "is finished" in go_on(tmp_path, *line(task)), "and the same line once more says so"


@pytest.mark.parametrize("task", TASKS)
def test_two_runs_of_one_seed_are_equal_in_every_bit_with_any_number_of_workers(task, line, whole, tmp_path):
    workers = {"detr": 0, "vit": 1, "seq2seq": 2}[task]  # other numbers than those of the whole run
    run(tmp_path, *line(task), "run_dir=run", f"trainer.workers={workers}")
    assert_same_end(whole(task), tmp_path / "run")


@pytest.mark.parametrize("task", TASKS)
def test_only_deterministic_algorithms_are_enough_for_a_run(task, line, tmp_path):
    """Each step, evaluation and save; on the CPU they also give the same bits as the others."""
    fault = ("at", 9, "after the update", "send", "SIGKILL")
    more = ["trainer.deterministic=true", "trainer.steps=12"]
    killed(tmp_path, *line(task), *more, fault=fault)
    go_on(tmp_path, *line(task), *more)
    run(tmp_path / "plain", *line(task), "trainer.steps=12", "run_dir=run")
    assert_same_end(tmp_path / "plain/run", tmp_path / "run", length=12)


def test_the_scale_of_fp16_goes_on_too(line, whole, tmp_path):
    fp16 = ["trainer.precision=fp16", "optimizer.lr=1e-3"]
    killed(tmp_path, *line("vit"), *fp16, fault=("at", 9, "after the update", "send", "SIGKILL"))
    go_on(tmp_path, *line("vit"), *fp16)
    assert_same_end(whole("vit", *fp16), tmp_path / "run")


def test_a_kill_at_any_moment_leaves_what_can_be_gone_on_from(line, whole, tmp_path):
    """By the clock, not at a place: also while it starts, reads, logs and ends."""
    draw, wholly = random.Random(0), whole("seq2seq")
    for _ in range(8):
        with Child(tmp_path, *line("seq2seq"), "run_dir=run", "resume=auto") as child:
            child.process.join(draw.uniform(0.1, 1.6))
            child.signal(signal.SIGKILL)
    go_on(tmp_path, *line("seq2seq"))
    assert_same_end(wholly, tmp_path / "run")


def test_a_kill_during_a_save_always_leaves_a_whole_checkpoint(tmp_path):
    from nursery import CONTEXT, save_for_ever

    draw = random.Random(0)
    for kill in range(20):
        process = CONTEXT.Process(target=save_for_ever, args=(tmp_path,))
        process.start()
        begun = {path.name for path in tmp_path.glob("*.pt")}
        wait(lambda begun=begun: {path.name for path in tmp_path.glob("*.pt")} - begun != set(), 30, lambda: "a save")
        process.join(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        files = sorted(tmp_path.glob("step_*.pt"))
        assert len(files) >= 1
        contents = [checkpoint.load(file) for file in files]
        assert all(float(content["weights"].sum()) == content["step"] * 300_000 for content in contents), kill


# Damage.

DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "zeroed": lambda data: data[: len(data) // 3] + bytes(4096) + data[len(data) // 3 + 4096 :],
    "flipped": flipped,
    "empty": lambda data: b"",
    "text": lambda data: b"version 1, not a checkpoint\n",
}


@pytest.fixture(scope="module")
def stopped(line: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT's run that was killed after step 13, with checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("stopped")
    killed(folder, *line("vit"), fault=("at", 13, "after the update", "send", "SIGKILL"))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(damage, line, whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "run/checkpoints/step_00000012.pt"
    data = newest.read_bytes()
    newest.unlink()  # best.pt may be another name of it
    newest.write_bytes(DAMAGE[damage](data))
    said = go_on(tmp_path, *line("vit"))
    assert "step_00000012.pt" in said and "Resuming from step_00000008.pt instead." in said
    assert_same_end(whole("vit"), tmp_path / "run")


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm was done",)


def test_a_malicious_checkpoint_is_refused_and_nothing_is_executed(line, whole, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    torch.save({"model": Harm(), "format": "triptych-1", "step": 12}, tmp_path / "run/checkpoints/step_00000012.pt")
    (tmp_path / "run/checkpoints/step_00000016.pt").write_bytes(pickle.dumps(Harm()))
    said = go_on(tmp_path, *line("vit"))
    assert "could run code; nothing was executed" in said and "Resuming from step_00000008.pt instead." in said
    assert not list(tmp_path.rglob("harm was done"))
    assert_same_end(whole("vit"), tmp_path / "run")


def test_a_run_whose_checkpoints_are_all_damaged_or_gone_never_starts_afresh(line, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    files = sorted((tmp_path / "run/checkpoints").glob("step_*.pt"))
    for file in files:
        file.unlink()
        file.write_bytes(b"")
    said = go_on(tmp_path, *line("vit"), code=2)
    assert "no checkpoint in" in said and all(f"{file.name} is empty" in said for file in files)
    for file in files:
        file.unlink()
    assert "holds no checkpoint, although some were written" in go_on(tmp_path, *line("vit"), code=2)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(line, whole, tmp_path):
    said = go_on(tmp_path, *line("vit"), fault=("full_disk", 2, 3))  # of steps 6 and 8
    assert "The checkpoint of step 6 was not written (No space left on device)" in said
    assert "The checkpoint of step 8 was not written" in said and "step 12 was not" not in said
    one, other = (folder / "metrics.jsonl" for folder in (tmp_path / "run", whole("vit")))
    trained = [[line for line in file.open() if '"test/' not in line] for file in (one, other)]
    assert trained[0] == trained[1], "training itself is the same; the best may be another, which has a file"


def test_a_disk_that_stays_full_ends_in_a_sentence_and_room_brings_the_result(line, whole, tmp_path):
    said = go_on(tmp_path, *line("vit"), fault=("full_disk", 3, 99), code=2)
    assert "the last checkpoint could not be written to" in said and "make room" in said
    assert not (tmp_path / "run/results.json").exists()
    go_on(tmp_path, *line("vit"))
    assert_same_end(whole("vit"), tmp_path / "run")


# Signals.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_says_how_to_go_on_and_leaves_no_worker(name, place, line, whole, tmp_path):
    fault = ("at", 9, place, "send", name)
    said = run(tmp_path, *line("vit"), "run_dir=run", "resume=auto", fault=fault, code=130 if name == "SIGINT" else 143)
    assert f"Stopped by {name}" in said and "To go on: python train.py model=vit" in said
    assert "Traceback" not in said
    assert "resuming at" in go_on(tmp_path, *line("vit"))
    assert_same_end(whole("vit"), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("stop_*")), (
        "the stop's own file is gone with the next checkpoint"
    )


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_what_slurm_and_a_closed_terminal_send_does_the_same(name, line, tmp_path):
    fault = ("at", 9, "before the update", "send", name)
    said = run(tmp_path, *line("seq2seq"), "run_dir=run", "resume=auto", fault=fault, code=143)
    assert f"Stopped by {name} after step 10 of 20, with a checkpoint." in said
    assert (tmp_path / "run/checkpoints/stop_00000010.pt").exists()
    assert "resuming at 10" in go_on(tmp_path, *line("seq2seq"))


def test_a_second_ctrl_c_stops_at_once(line, tmp_path):
    fault = ("at", 9, "before the update", "send", "SIGINT", 2)
    said = run(tmp_path, *line("vit"), "run_dir=run", fault=fault, code=130)
    assert "once more stops at once" in said and "Stopped by Ctrl-C." in said and "Traceback" not in said
    assert not list((tmp_path / "run/checkpoints").glob("stop_*"))


def test_a_signal_from_outside_reaches_a_run_that_waits_for_its_workers(line, tmp_path):
    with Child(tmp_path, *line("vit"), "trainer.steps=100000", "run_dir=run") as child:
        child.wait_for("step 3 of")
        child.signal(signal.SIGTERM)
        assert child.end() == 143


def test_a_signal_to_one_rank_of_two_stops_both_with_one_checkpoint(line, tmp_path):
    more = ["trainer.workers=0", "run_dir=run", "resume=auto"]
    fault = ("at", 9, "before the update", "send", "SIGTERM")
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2, faults=[None, fault])
    assert [rank.end() for rank in ranks] == [143, 143]
    assert "Stopped by SIGTERM after step 10 of 20" in ranks[0].output() and "torchrun" in ranks[0].output()
    assert "Stopped" not in ranks[1].output()
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2)
    assert [rank.end() for rank in ranks] == [0, 0] and "resuming at 10" in ranks[0].output()
    ranks = start_ranks(tmp_path / "whole", *line("vit"), *more, world=2)
    assert [rank.end() for rank in ranks] == [0, 0]
    assert_same_end(tmp_path / "whole/run", tmp_path / "run")


# Numbers that are none, and data.


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_both_before_the_update(kind, line, tmp_path):
    more = ["trainer.workers=0", "run_dir=run", "resume=auto"]
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2, faults=[None, ("no_loss_at", 9, kind)])
    assert [rank.end() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "Step 9 was not taken, because its loss or gradient is not finite" in rank.output()
        assert "kind 0" in rank.output() or "photos" in rank.output(), "samples are named"
    newest = checkpoint.load(tmp_path / "run/checkpoints/step_00000008.pt")
    assert all(value.isfinite().all() for value in newest["model"].values())
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2)
    assert [rank.end() for rank in ranks] == [0, 0], "without the fault the same line goes on"


def test_a_worker_that_raises_names_the_sample_and_its_file(line, tmp_path):
    said = run(tmp_path, *line("vit"), "run_dir=run", fault=("in_sample", 1, "fail"), code=1)
    assert "a defect on purpose" in said and "sample 1 of train" in said and "kind 0/1.png" in said


def test_a_worker_that_is_killed_names_the_sample_and_its_file(line, tmp_path):
    said = run(tmp_path, *line("vit"), "run_dir=run", fault=("in_sample", 1, "send", "SIGKILL"), code=2)
    assert "kind 0/1.png" in said and "Traceback" not in said


def test_a_corrupt_image_is_one_sentence_with_its_name(line, tmp_path):
    shutil.copytree(photos(line), tmp_path / "photos")
    broken = tmp_path / "photos/train/kind 1/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    said = run(tmp_path, *line("vit"), f"data.root={tmp_path / 'photos'}", "run_dir=run", code=2)
    assert "kind 1/3.png" in said and "Traceback" not in said


def test_a_set_smaller_than_the_batch_the_ranks_and_the_workers_is_trained_on(line, tmp_path):
    source = photos(line)
    for split in ("train", "val", "test"):
        for kind in ("kind 0", "kind 1"):
            (tmp_path / "photos" / split / kind).mkdir(parents=True)
            if split == "train" or kind == "kind 0":
                shutil.copy(source / split / kind / "0.png", tmp_path / "photos" / split / kind)
    shutil.copy(source / "val/kind 1/0.png", tmp_path / "photos/val/kind 1")
    shutil.copy(source / "test/kind 1/0.png", tmp_path / "photos/test/kind 1")
    more = [f"data.root={tmp_path / 'photos'}", "data.augmentation.mixup=0", "run_dir=run", "trainer.steps=5"]
    ranks = start_ranks(tmp_path / "three", *line("vit"), *more, world=3)
    assert [rank.end() for rank in ranks] == [0, 0, 0], ranks[0].output()
    run(tmp_path / "one", *line("vit"), *more)
    one, three = (json.loads((tmp_path / name / "run/results.json").read_text()) for name in ("one", "three"))
    assert one.keys() == three.keys()


# The same run under other conditions.


def test_a_run_goes_on_with_other_numbers_of_ranks_and_workers_and_compiled(line, whole, tmp_path):
    """Without dropout all of that leaves the numbers where they are, within rounding."""
    plain = [*line("vit"), "model.blocks.dropout=0", "trainer.ema_decay=0"]
    run(tmp_path / "whole", *plain, "run_dir=run")
    more = ["run_dir=run", "resume=auto"]
    killed(tmp_path, *plain, fault=("at", 9, "after the update", "send", "SIGKILL"))
    fault = ("at", 13, "after the update", "send", "SIGKILL")
    ranks = start_ranks(tmp_path, *plain, *more, "trainer.workers=1", world=2, faults=[fault, fault])
    assert [rank.end() for rank in ranks] == [-9, -9]
    assert "resuming at 8" in ranks[0].output()
    said = go_on(tmp_path, *plain, "trainer.workers=0", "trainer.compile=true")
    assert "resuming at 12" in said
    a, b = (
        [record for record in map(json.loads, (folder / "run/metrics.jsonl").open()) if "train/loss" in record]
        for folder in (tmp_path / "whole", tmp_path)
    )
    assert len(a) == len(b) == 7
    for one, other in zip(a, b, strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)


def test_a_changed_config_is_refused_with_the_list_and_allowed_by_name(line, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    changed = [*line("vit"), "optimizer.lr=7e-4", "data.batch_size=9"]
    said = go_on(tmp_path, *changed, code=2)
    assert "optimizer.lr was" in said and "data.batch_size was 8 and is 9" in said and "allow_changes" in said
    said = go_on(tmp_path, *changed, "allow_changes=[optimizer.lr,data.batch_size]")
    assert "an uninterrupted run would differ" in said and "resuming at 12" in said


def test_a_second_process_in_a_runs_folder_is_refused_and_harms_nothing(line, tmp_path):
    with Child(tmp_path / "first", *line("vit"), "trainer.steps=100000", f"run_dir={tmp_path / 'run'}") as first:
        first.wait_for("step 3 of")
        said = run(tmp_path / "second", *line("vit"), f"run_dir={tmp_path / 'run'}", "resume=auto", code=2)
        assert f"is in use by process {first.pid} on" in said
        first.signal(signal.SIGKILL)
        first.process.join()
    said = run(tmp_path / "second", *line("vit"), "trainer.steps=100000", f"run_dir={tmp_path / 'run'}", "resume=auto",
               fault=("at", 9, "after the update", "send", "SIGTERM"), code=143)  # fmt: skip
    assert "Stopped by SIGTERM" in said, "free as soon as the first one is gone"
