"""Whatever ends a run or damages its files costs at most the steps since the last checkpoint, and never a result."""

import json
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import MOMENTS
from nursery import Child, flip_bit, run, start_ranks, wait
from PIL import Image

from common.files import checkpoint

pytestmark = pytest.mark.slow
TASKS = ("detr", "vit", "seq2seq")
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
    """The arguments of a small run of a task, with its data in a temporary folder."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        for kind, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
            (folder / "photos" / split / f"kind {kind}").mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + rng.integers(-30, 30, (12, 10 + kind, 3))
                file = folder / "photos" / split / f"kind {kind}" / f"{number}.png"
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    digits = {"0": "null", "1": "eins", "2": "zwei", "3": "drei", "4": "vier"}
    numbers = [np.base_repr(number, 5) for number in range(6, 125)]
    rows = [f"{' '.join(number)}\t{' '.join(digits[digit] for digit in number)}\n" for number in numbers]
    (folder / "train.tsv").write_text("".join(rows), encoding="utf-8")
    data = {
        "detr": [f"data.root={folder / 'shapes'}"],
        "vit": [f"data.root={folder / 'photos'}"],
        "seq2seq": [f"data.train.pairs={folder / 'train.tsv'}"],
    }
    return lambda task: [*SMALL[task], *LENGTH, *data[task]]


@pytest.fixture(scope="module")
def uninterrupted(line: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an uninterrupted run with these arguments; each is trained once."""
    runs: dict[str, Path] = {}

    def trained(task: str, *more: str) -> Path:
        key = " ".join((task, *more))
        if key not in runs:
            folder = tmp_path_factory.mktemp("uninterrupted")
            run(folder, *line(task), *more, "run_dir=run")
            runs[key] = folder / "run"
        return runs[key]

    return trained


@pytest.mark.parametrize("moment", ["in an evaluation", "in a save"])
def test_a_run_that_patience_ends_ends_at_the_same_step_after_a_kill(
    moment: str, line: Any, uninterrupted: Any, tmp_path: Path
) -> None:
    """With a learning rate near 0 val never improves: of the evaluations at 6, 12 and 18, the third ends the run."""
    more = ["trainer.patience=2", "trainer.steps=60", "optimizer.lr=1e-12"]
    expected = uninterrupted("vit", *more)
    assert "(trainer.patience=2)" in (expected / "train.log").read_text()
    kill_by(tmp_path, *line("vit"), *more, fault=("at_step", 17, moment, "send", "SIGKILL"))
    resume(tmp_path, *line("vit"), *more)
    assert_same_end(expected, tmp_path / "run", length=18)


def photos(line: Any) -> Path:
    """The folder of the images to classify."""
    return Path(next(argument for argument in line("vit") if argument.startswith("data.root=")).partition("=")[2])


def resume(folder: Path, *arguments: str, **options: Any) -> str:
    """Run the command with resume=auto to its end; returns its output."""
    return run(folder, *arguments, "run_dir=run", "resume=auto", **options)


def kill_by(folder: Path, *arguments: str, fault: Any) -> None:
    """Run the same command with a fault that kills it."""
    run(folder, *arguments, "run_dir=run", "resume=auto", code=-signal.SIGKILL, fault=fault)


def same(a: Any, b: Any) -> bool:
    """Whether two contents of checkpoints are equal in every bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_end(expected: Path, result: Path, length: int = 20) -> None:
    """Two runs agree in every tensor of the last and the best checkpoint, every line of metrics, and the results."""
    for name in (f"step_{length:08d}.pt", "best.pt"):
        a, b = ({**checkpoint.load(run / "checkpoints" / name), "config": None} for run in (expected, result))
        different = [key for key in a if not same(a[key], b[key])]
        assert not different, f"{name} differs in {different}"
    assert (expected / "metrics.jsonl").read_text() == (result / "metrics.jsonl").read_text()
    assert json.loads((expected / "results.json").read_text()) == json.loads((result / "results.json").read_text())


def random_kills(seed: int, count: int = 10) -> list[tuple[int, str]]:
    """Random steps in ascending order, with the moments in turn; a step may occur twice."""
    rng = random.Random(seed)
    steps = sorted(rng.randrange(20) for _ in range(count))
    return [(step, MOMENTS[number % len(MOMENTS)]) for number, step in enumerate(steps)]


# Kills.


@pytest.mark.parametrize("task", TASKS)
def test_a_run_killed_at_ten_random_steps_ends_as_the_uninterrupted_one(task, line, uninterrupted, tmp_path):
    for step, moment in random_kills(seed=TASKS.index(task)):
        kill_by(tmp_path, *line(task), fault=("at_step", step, moment, "send", "SIGKILL"))
    resume(tmp_path, *line(task))
    assert_same_end(uninterrupted(task), tmp_path / "run")
    assert "is finished" in resume(tmp_path, *line(task)), "and the same command once more says so"


@pytest.mark.parametrize("task", TASKS)
def test_two_runs_of_one_seed_are_equal_in_every_bit_with_any_number_of_workers(task, line, uninterrupted, tmp_path):
    workers = {"detr": 0, "vit": 1, "seq2seq": 2}[task]  # other numbers than in the uninterrupted run
    run(tmp_path, *line(task), "run_dir=run", f"trainer.workers={workers}")
    assert_same_end(uninterrupted(task), tmp_path / "run")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_needs_only_deterministic_algorithms(task, line, tmp_path):
    """In steps, evaluations and saves; on the CPU they also give the same bits as the default ones."""
    fault = ("at_step", 9, "after the update", "send", "SIGKILL")
    more = ["trainer.deterministic=true", "trainer.steps=12"]
    kill_by(tmp_path, *line(task), *more, fault=fault)
    resume(tmp_path, *line(task), *more)
    run(tmp_path / "default", *line(task), "trainer.steps=12", "run_dir=run")
    assert_same_end(tmp_path / "default/run", tmp_path / "run", length=12)


def test_the_loss_scale_of_fp16_is_resumed(line, uninterrupted, tmp_path):
    fp16 = ["trainer.precision=fp16", "optimizer.lr=1e-3"]
    kill_by(tmp_path, *line("vit"), *fp16, fault=("at_step", 9, "after the update", "send", "SIGKILL"))
    resume(tmp_path, *line("vit"), *fp16)
    assert_same_end(uninterrupted("vit", *fp16), tmp_path / "run")


def test_a_run_killed_at_any_moment_can_be_resumed(line, uninterrupted, tmp_path):
    """At random times: also while it starts, reads, logs and ends."""
    rng, expected = random.Random(0), uninterrupted("seq2seq")
    for _ in range(8):
        with Child(tmp_path, *line("seq2seq"), "run_dir=run", "resume=auto") as child:
            child.process.join(rng.uniform(0.1, 1.6))
            child.signal(signal.SIGKILL)
    resume(tmp_path, *line("seq2seq"))
    assert_same_end(expected, tmp_path / "run")


def test_a_kill_during_a_save_always_leaves_an_undamaged_checkpoint(tmp_path):
    from nursery import CONTEXT, save_endlessly

    rng = random.Random(0)
    for kill in range(20):
        process = CONTEXT.Process(target=save_endlessly, args=(tmp_path,))
        process.start()
        old = {path.name for path in tmp_path.glob("*.pt")}
        wait(lambda old=old: {path.name for path in tmp_path.glob("*.pt")} - old != set(), 30, lambda: "a save")
        process.join(rng.uniform(0, 0.05))
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
    "flipped": flip_bit,
    "empty": lambda data: b"",
    "text": lambda data: b"version 1, not a checkpoint\n",
}


@pytest.fixture(scope="module")
def stopped(line: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a ViT's run that was killed after step 13, with checkpoints of steps 8 and 12."""
    folder = tmp_path_factory.mktemp("stopped")
    kill_by(folder, *line("vit"), fault=("at_step", 13, "after the update", "send", "SIGKILL"))
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_previous_one(
    damage, line, uninterrupted, stopped, tmp_path
):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "run/checkpoints/step_00000012.pt"
    data = newest.read_bytes()
    newest.unlink()  # best.pt may be a link to it
    newest.write_bytes(DAMAGE[damage](data))
    output = resume(tmp_path, *line("vit"))
    assert "step_00000012.pt" in output and "Resuming from step_00000008.pt instead." in output
    assert_same_end(uninterrupted("vit"), tmp_path / "run")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_malicious_checkpoint_is_refused_and_nothing_is_executed(line, uninterrupted, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    torch.save(
        {"model": Malicious(), "format": "triptych-1", "step": 12}, tmp_path / "run/checkpoints/step_00000012.pt"
    )
    (tmp_path / "run/checkpoints/step_00000016.pt").write_bytes(pickle.dumps(Malicious()))
    output = resume(tmp_path, *line("vit"))
    assert "could run code; nothing was executed" in output and "Resuming from step_00000008.pt instead." in output
    assert not list(tmp_path.rglob("executed"))
    assert_same_end(uninterrupted("vit"), tmp_path / "run")


def test_a_run_with_all_checkpoints_damaged_or_gone_never_restarts(line, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    files = sorted((tmp_path / "run/checkpoints").glob("step_*.pt"))
    for file in files:
        file.unlink()
        file.write_bytes(b"")
    output = resume(tmp_path, *line("vit"), code=2)
    assert "no checkpoint in" in output and all(f"{file.name} is empty" in output for file in files)
    for file in files:
        file.unlink()
    assert "holds no checkpoint, although some were written" in resume(tmp_path, *line("vit"), code=2)


def test_a_full_disk_costs_checkpoints_and_not_the_run(line, uninterrupted, tmp_path):
    output = resume(tmp_path, *line("vit"), fault=("full_disk", 2, 3))  # of steps 6 and 8
    assert "The checkpoint of step 6 was not written (No space left on device)" in output
    assert "The checkpoint of step 8 was not written" in output and "step 12 was not" not in output
    files = [folder / "metrics.jsonl" for folder in (tmp_path / "run", uninterrupted("vit"))]
    result, expected = ([line for line in file.open() if '"test/' not in line] for file in files)
    assert result == expected, "training is the same; the tested checkpoint, the best that was written, may differ"


@pytest.mark.parametrize("first", [1, 3])  # with 1, no checkpoint is ever written, but log lines are
def test_a_disk_that_stays_full_is_one_sentence_and_with_room_the_run_resumes(first, line, uninterrupted, tmp_path):
    output = resume(tmp_path, *line("vit"), fault=("full_disk", first, 99), code=2)
    assert "the last checkpoint could not be written to" in output and "make room" in output
    assert not (tmp_path / "run/results.json").exists()
    resume(tmp_path, *line("vit"))
    assert_same_end(uninterrupted("vit"), tmp_path / "run")


@pytest.mark.parametrize(
    ("first", "file"),
    [
        *((1, "run/config.yaml"), (5, "run/task.json"), (6, "run/train.log")),  # at the start
        *((300, "run/train.log"), (435, "run/checkpoints"), (1000, None)),  # 500 writes are a whole run
    ],
)
def test_a_disk_full_from_any_write_on_is_one_sentence_that_names_the_file(first, file, line, uninterrupted, tmp_path):
    output = run(tmp_path, *line("vit"), "run_dir=run", fault=("full_disk_at_write", first), code=2 if file else 0)
    assert "Traceback" not in output
    if file:
        assert f"{file} " in output.splitlines()[-1] or f"({file}: No space left on device)" in output.splitlines()[-1]
        assert "repeat the command with run_dir=run resume=auto." in output.splitlines()[-1]
        resume(tmp_path, *line("vit"))
    assert_same_end(uninterrupted("vit"), tmp_path / "run")


def test_sigterm_on_a_full_disk_stops_the_run_without_a_traceback(line, uninterrupted, tmp_path):
    output = run(tmp_path, *line("vit"), "run_dir=run", fault=("full_disk_at_step", 9, "SIGTERM"), code=143)
    assert "Stopped by SIGTERM after step 10 of 20, without a checkpoint of that step." in output
    assert "Traceback" not in output and "To resume" in output
    resume(tmp_path, *line("vit"))
    assert_same_end(uninterrupted("vit"), tmp_path / "run")


# Signals.


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_prints_how_to_resume_and_leaves_no_worker(name, moment, line, uninterrupted, tmp_path):
    fault = ("at_step", 9, moment, "send", name)
    output = run(
        tmp_path, *line("vit"), "run_dir=run", "resume=auto", fault=fault, code=130 if name == "SIGINT" else 143
    )
    assert f"Stopped by {name}" in output and "To resume: python train.py model=vit" in output
    assert "Traceback" not in output
    assert "resuming at" in resume(tmp_path, *line("vit"))
    assert_same_end(uninterrupted("vit"), tmp_path / "run")
    assert not list((tmp_path / "run/checkpoints").glob("stop_*")), "the next checkpoint removes the stop's file"


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_the_signals_of_slurm_and_a_closed_terminal_do_the_same(name, line, tmp_path):
    fault = ("at_step", 9, "before the update", "send", name)
    output = run(tmp_path, *line("seq2seq"), "run_dir=run", "resume=auto", fault=fault, code=143)
    assert f"Stopped by {name} after step 10 of 20, with a checkpoint." in output
    assert (tmp_path / "run/checkpoints/stop_00000010.pt").exists()
    assert "resuming at 10" in resume(tmp_path, *line("seq2seq"))


def test_a_second_ctrl_c_stops_at_once(line, tmp_path):
    fault = ("at_step", 9, "before the update", "send", "SIGINT", 2)
    output = run(tmp_path, *line("vit"), "run_dir=run", fault=fault, code=130)
    assert "once more stops at once" in output and "Stopped by Ctrl-C." in output and "Traceback" not in output
    assert not list((tmp_path / "run/checkpoints").glob("stop_*"))


@pytest.mark.parametrize(("names", "code"), [(["SIGINT", "SIGINT"], 130), (["SIGTERM"], 143), (["SIGTERM"] * 2, 143)])
def test_signals_end_a_process_in_the_middle_of_one_long_operation(names, code, line, tmp_path):
    fault = ("at_step", 3, "before the update", "block")
    with Child(tmp_path, *line("vit"), "trainer.grace=2", "run_dir=run", fault=fault) as child:
        child.wait_for("blocked")
        for name in names:
            child.signal(getattr(signal, name))
            time.sleep(0.1)
        assert child.end(30) == code
        assert "the process ends without a checkpoint of this step." in child.output()
    resume(tmp_path, *line("vit"))  # the folder is not left locked


def test_a_signal_from_outside_reaches_a_run_that_waits_for_its_workers(line, tmp_path):
    with Child(tmp_path, *line("vit"), "trainer.steps=100000", "run_dir=run") as child:
        child.wait_for("step 3 of")
        child.signal(signal.SIGTERM)
        assert child.end() == 143


def test_a_signal_to_one_rank_of_two_stops_both_with_one_checkpoint(line, tmp_path):
    more = ["trainer.workers=0", "run_dir=run", "resume=auto"]
    fault = ("at_step", 9, "before the update", "send", "SIGTERM")
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2, faults=[None, fault])
    assert [rank.end() for rank in ranks] == [143, 143]
    assert "Stopped by SIGTERM after step 10 of 20" in ranks[0].output() and "torchrun" in ranks[0].output()
    assert "Stopped" not in ranks[1].output()
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2)
    assert [rank.end() for rank in ranks] == [0, 0] and "resuming at 10" in ranks[0].output()
    ranks = start_ranks(tmp_path / "uninterrupted", *line("vit"), *more, world=2)
    assert [rank.end() for rank in ranks] == [0, 0]
    assert_same_end(tmp_path / "uninterrupted/run", tmp_path / "run")


# Consoles that cannot be written.

CLOSED_TERMINALS = ("terminal", "terminal of 0 columns", "stdout in a pipe, terminal")


@pytest.mark.parametrize("kind", ["pipe", *CLOSED_TERMINALS])
def test_ctrl_c_into_a_pipe_and_a_closed_terminal_cost_no_step(kind, line, uninterrupted, tmp_path):
    """Ctrl-C ends the reader of the pipe as well; a terminal that is closed sends SIGHUP."""
    fault = ("lose_console", kind, 9, *(["SIGINT"] if kind == "pipe" else []))
    code, name = (130, "SIGINT") if kind == "pipe" else (143, "SIGHUP")
    run(tmp_path, *line("vit"), "run_dir=run", "resume=auto", fault=fault, code=code)
    last_line = (tmp_path / "run/train.log").read_text().splitlines()[-1]
    assert f"Stopped by {name} after step 10 of 20, with a checkpoint." in last_line
    assert (tmp_path / "run/checkpoints/stop_00000010.pt").exists()
    assert "resuming at 10" in resume(tmp_path, *line("vit"))
    assert_same_end(uninterrupted("vit"), tmp_path / "run")


def test_ctrl_c_twice_stops_at_once_when_standard_error_cannot_be_written(line, tmp_path):
    run(tmp_path, *line("vit"), "run_dir=run", fault=("lose_console", "pipe", 9, "SIGINT", "SIGINT"), code=130)
    assert not list((tmp_path / "run/checkpoints").glob("stop_*"))


@pytest.mark.parametrize("kind", ["pipe", "stdout in a pipe", "full", "closed"])
def test_a_run_goes_on_without_a_console_and_says_so_in_train_log(kind, line, uninterrupted, tmp_path):
    """Such as `| head -3`, `> FILE_ON_A_FULL_DISK` and `>&-`."""
    fault = ("unwritable_stdout", kind) if kind in ("full", "closed") else ("lose_console", kind, 9)
    output = run(tmp_path, *line("vit"), "run_dir=run", fault=fault)
    assert_same_end(uninterrupted("vit"), tmp_path / "run")
    reason = {"full": "No space left on device", "closed": None}.get(kind, "Broken pipe")
    sentence = f"standard output cannot be written ({reason}); the run goes on, and logs to"
    log = (tmp_path / "run/train.log").read_text()
    assert log.count(sentence) == (0 if kind == "closed" else 1), "a stream that the user closed is not missed"
    assert sentence in output or kind in ("pipe", "closed")


def test_numbers_that_cannot_be_printed_are_written_to_output_and_the_exit_code_is_not_0(line, uninterrupted, tmp_path):
    command = [f"checkpoint={uninterrupted('vit') / 'checkpoints/best.pt'}", "output=answers"]
    output = run(tmp_path, *command, door="evaluate", fault=("unwritable_stdout", "full"), code=2)
    assert "standard output cannot be written (No space left on device)" in output and "Traceback" not in output
    assert (tmp_path / "answers/results.json").exists()


# Losses that are not finite, and data.


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_not_finite_on_one_rank_stops_both_before_the_update(kind, line, tmp_path):
    more = ["trainer.workers=0", "run_dir=run", "resume=auto"]
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2, faults=[None, ("non_finite_at", 9, kind)])
    assert [rank.end() for rank in ranks] == [2, 2]
    for rank in ranks:
        assert "Step 9 was not taken, because its loss or gradient is not finite" in rank.output()
        assert "kind 0" in rank.output() or "photos" in rank.output(), "samples are named"
    newest = checkpoint.load(tmp_path / "run/checkpoints/step_00000008.pt")
    assert all(value.isfinite().all() for value in newest["model"].values())
    ranks = start_ranks(tmp_path, *line("vit"), *more, world=2)
    assert [rank.end() for rank in ranks] == [0, 0], "without the fault the same command resumes"


def test_a_worker_that_raises_names_the_sample_and_its_file(line, tmp_path):
    output = run(tmp_path, *line("vit"), "run_dir=run", fault=("in_sample", 1, "fail"), code=1)
    assert "a defect on purpose" in output and "sample 1 of train" in output and "kind 0/1.png" in output


def test_a_worker_that_is_killed_names_the_sample_and_its_file(line, tmp_path):
    output = run(tmp_path, *line("vit"), "run_dir=run", fault=("in_sample", 1, "send", "SIGKILL"), code=2)
    assert "kind 0/1.png" in output and "Traceback" not in output


def test_a_corrupt_image_is_one_sentence_with_its_name(line, tmp_path):
    shutil.copytree(photos(line), tmp_path / "photos")
    broken = tmp_path / "photos/train/kind 1/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    output = run(tmp_path, *line("vit"), f"data.root={tmp_path / 'photos'}", "run_dir=run", code=2)
    assert "kind 1/3.png" in output and "Traceback" not in output


def test_a_set_smaller_than_the_batch_the_ranks_or_the_workers_can_be_trained_on(line, tmp_path):
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
    single, three = (json.loads((tmp_path / name / "run/results.json").read_text()) for name in ("one", "three"))
    assert single.keys() == three.keys()


# Resuming under other conditions.


def test_a_run_resumes_with_other_numbers_of_ranks_and_workers_and_compiled(line, tmp_path):
    """Without dropout the losses are the same within rounding."""
    arguments = [*line("vit"), "model.blocks.dropout=0", "trainer.ema_decay=0"]
    run(tmp_path / "uninterrupted", *arguments, "run_dir=run")
    more = ["run_dir=run", "resume=auto"]
    kill_by(tmp_path, *arguments, fault=("at_step", 9, "after the update", "send", "SIGKILL"))
    fault = ("at_step", 13, "after the update", "send", "SIGKILL")
    ranks = start_ranks(tmp_path, *arguments, *more, "trainer.workers=1", world=2, faults=[fault, fault])
    assert [rank.end() for rank in ranks] == [-9, -9]
    assert "resuming at 8" in ranks[0].output()
    output = resume(tmp_path, *arguments, "trainer.workers=0", "trainer.compile=true")
    assert "resuming at 12" in output
    losses, expected = (
        [
            record["train/loss"]
            for record in map(json.loads, (folder / "run/metrics.jsonl").open())
            if "train/loss" in record
        ]
        for folder in (tmp_path, tmp_path / "uninterrupted")
    )
    assert len(losses) == len(expected) == 7 and losses == pytest.approx(expected, rel=1e-4)


def test_a_changed_config_is_refused_with_a_list_and_allowed_by_name(line, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    changed = [*line("vit"), "optimizer.lr=7e-4", "data.batch_size=9"]
    output = resume(tmp_path, *changed, code=2)
    assert "optimizer.lr was" in output and "data.batch_size was 8 and is 9" in output and "allow_changes" in output
    output = resume(tmp_path, *changed, "allow_changes=[optimizer.lr,data.batch_size]")
    assert "an uninterrupted run would differ" in output and "resuming at 12" in output


def test_a_second_process_in_a_runs_folder_is_refused_and_changes_nothing(line, tmp_path):
    with Child(tmp_path / "first", *line("vit"), "trainer.steps=100000", f"run_dir={tmp_path / 'run'}") as first:
        first.wait_for("step 3 of")
        output = run(tmp_path / "second", *line("vit"), f"run_dir={tmp_path / 'run'}", "resume=auto", code=2)
        assert f"is in use by process {first.pid} on" in output
        first.signal(signal.SIGKILL)
        first.process.join()
    stop = ("at_step", 9, "after the update", "send", "SIGTERM")
    arguments = ["trainer.steps=100000", f"run_dir={tmp_path / 'run'}", "resume=auto"]
    output = run(tmp_path / "second", *line("vit"), *arguments, fault=stop, code=143)
    assert "Stopped by SIGTERM" in output, "the folder is free as soon as the first process is gone"
