"""Searches: parsing of the search space, failing trials, stops and kills, and resuming."""

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from common.errors import UserError
from scripts import search

ROOT = Path(__file__).parents[2]
# A train.py whose result depends only on the config; plan.json makes a named trial refuse its values or wait.
FAKE_TRAIN = f"""
import json, math, os, signal, sys, time
from pathlib import Path
sys.path.append({str(ROOT)!r})
from common.cli import main as cli
from common.errors import Stopped, UserError

def job(config, folder):
    if (folder / "results.json").exists():
        return
    plan = json.loads(Path("plan.json").read_text()).get(folder.name) if Path("plan.json").exists() else None
    if plan == "refuse":
        raise UserError("These values are refused.")
    if plan == "wait" and not (folder / "checkpoints").exists():
        received = []
        signal.signal(signal.SIGINT, lambda *_: received.append(1))
        (folder / "checkpoints").mkdir()
        (folder / "waits").touch()
        while not received and not Path("leave").exists():
            time.sleep(0.02)
        time.sleep(0.2)
        if received:
            (folder / "saved").write_text(str(os.getsid(0)))
            raise Stopped(["SIGINT"], "after step 3")
    value = -abs(math.log10(config["optimizer"]["lr"]) + 3) - config["model"]["layers"]
    (folder / "results.json").write_text(json.dumps({{"val/top1": value}}))

if __name__ == "__main__":
    cli.launch(job, door="train")
"""
TASK_WITH_OWN_GOAL = """
from common.task import Goal
from vit.tasks.classification import Classification, DistillationOptions, LossOptions, PredictOptions


class ByLoss(Classification):
    def __init__(self, *, data: object, loss: LossOptions, predict: PredictOptions, distillation: DistillationOptions):
        super().__init__(data=data, loss=loss, predict=predict, distillation=distillation)
        self.goal = Goal("loss", higher_is_better=False)
"""
LINE = ["model=vit", "optimizer.lr=1e-4..1e-2", "model.layers=1..3", "optimizer.name=adamw,adam", "seed=3"]
SHORT = ["model=vit", "optimizer.lr=1e-4..1e-2", "seed=3"]  # two configs to compose instead of six


@pytest.fixture(autouse=True)
def fake_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(search, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Start a search in a separate process, with the fake train.py."""
    code = "import sys; from pathlib import Path; from scripts import search; search.ROOT = Path.cwd(); "
    command = [sys.executable, "-c", code + "sys.exit(search.main())", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def trial_values(folder: str) -> list[dict[str, object]]:
    """The values of each trial of a study."""
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{folder}/study.db")
    return [trial.params for trial in study.trials]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# The search space.


def test_ranges_are_integer_linear_or_logarithmic() -> None:
    arguments = ["model.layers=2..6", "optimizer.lr=1e-4..1e-2", "optimizer.weight_decay=0.1..0.9", "seed=-0..20"]
    assert [search._range(word) for word in arguments] == [
        ("model.layers", IntDistribution(2, 6)),
        ("optimizer.lr", FloatDistribution(1e-4, 1e-2, log=True)),
        ("optimizer.weight_decay", FloatDistribution(0.1, 0.9, log=False)),
        ("seed", IntDistribution(0, 20)),
    ]
    assert search._range("a=0.0..5") == ("a", FloatDistribution(0, 5, log=False)), "there is no logarithm of 0"
    assert search._range("a=.5...7") == ("a", FloatDistribution(0.5, 0.7))
    assert [search._range(word) for word in ("data.root=../x", "seed=1", "a=b..c", "--trials")] == [None] * 4


def test_other_arguments_go_to_every_trial() -> None:
    line = ["model=vit", "optimizer.lr=1e-4..1e-2", "checkpoint=a b, c", "optimizer.betas=[0.9,0.9],[0.8,0.9]"]
    plan = search.plan(line)
    assert plan.fixed == ["model=vit", "checkpoint=a b, c"] and (plan.goal, plan.direction) == ("val/top1", "maximize")
    assert plan.space["optimizer.betas"] == CategoricalDistribution(["[0.9,0.9]", "[0.8,0.9]"])
    values = {"optimizer.lr": 0.001, "optimizer.betas": "[0.8,0.9]"}
    assert plan.arguments(values) == [*plan.fixed, "optimizer.lr=0.001", "optimizer.betas=[0.8,0.9]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=vit"], "There is nothing to search"),
        (["optimizer.lr=1..2"], "train.py needs model=NAME"),
        (["model=vit", "optimizer.lrr=1..2"], "optimizer.lrr is not a key of this config; did you mean"),
        (["model=vit", "optimizer.lr=-1..2"], "optimizer.lr=-1: expected a number above 0."),
        (["model=vit", "model.layers=1..2.5"], "model.layers=1.0: expected a whole number"),
        (["model=vit", "optimizer.lr=2..1"], "optimizer.lr=2..1: expected a range from a smaller number to a larger"),
        (["model=vit", "optimizer.name=adam,adamm"], "optimizer.name=adamm: expected"),
        (["model=vit", "seed=interval(0,1)"], "seed=interval(0,1): expected values or a range"),
        (["model=vit", "seed=1..2", "run_dir=x"], "run_dir= cannot be set for a search"),
        (["model=vit", "seed=1..2", "-m"], "-m, --help and --cfg are for train.py"),
        (["model=vit,detr", "seed=1..2"], "These trials have different goals (val/AP, val/top1)"),
    ],
)
def test_a_mistake_is_one_sentence_before_the_first_trial(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search.main([*arguments, "--trials", "3", "--study", "s"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message) and err.count("\n") == 1 and not Path("s").exists()


@pytest.mark.parametrize("trials", ["-1", "0"])
def test_a_search_has_at_least_one_trial(trials: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main([*LINE, "--trials", trials, "--study", "s"]) == 2
    assert capsys.readouterr().err == f"--trials {trials}: expected a whole number from 1.\n" and not Path("s").exists()


def test_the_goal_is_that_of_the_constructed_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's task chooses its goal in its constructor."""
    Path("chooses.py").write_text(TASK_WITH_OWN_GOAL)
    monkeypatch.syspath_prepend(str(Path.cwd()))
    line = ["model=vit", "task._target_=chooses.ByLoss", "trust=[chooses]"]
    plan = search.plan([*line, "seed=1..2"])
    assert (plan.goal, plan.direction) == ("val/loss", "minimize")
    with pytest.raises(UserError, match=r"different goals \(val/loss, val/top1\)"):
        search.plan([*line[:1], *line[2:], "task._target_=chooses.ByLoss,vit.tasks.classification.Classification"])


@pytest.mark.slow
def test_a_run_records_the_goal_of_its_own_task(inside: Callable[..., str]) -> None:
    Path("chooses.py").write_text(TASK_WITH_OWN_GOAL)
    line = ["model=vit", "task._target_=chooses.ByLoss", "trust=[chooses]", "trainer.steps=2", "trainer.eval_every=1"]
    line += ["schedule.warmup=1", "trainer.workers=0", "trainer.device=cpu", "trainer.ema_decay=0", "run_dir=run"]
    inside("train", *line)
    results = json.loads(Path("run/results.json").read_text())
    evaluations = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in evaluations if "val/loss" in line]
    assert (results["goal"], results["direction"]) == ("val/loss", "minimize") and len({*losses}) == 2
    assert results["val/loss"] == min(losses)


# A search.


@pytest.mark.slow
def test_a_search_finds_the_best_and_prints_how_to_repeat_it(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_text('{"trial_0002": "refuse"}')
    line = [*LINE, "--study", "a =search", "--trials"]
    assert search.main([*line, "4"]) == 0
    out = capsys.readouterr().out
    assert "trial_0002 (3 of 4): optimizer.lr=" in out and "  failed: These values are refused.\n" in out
    done = {path.parent: json.loads(path.read_text())["val/top1"] for path in Path("a =search").glob("*/results.json")}
    best = max(done, key=lambda folder: done[folder])
    assert len(done) == 3 and f"4 trials, 1 of them failed; the best is {best.name}:" in out
    again = shlex.split(out.partition("again     python ")[2].partition("\n")[0])
    subprocess.run([sys.executable, *again, "run_dir=again"], check=True)
    assert json.loads(Path("again/results.json").read_text())["val/top1"] == done[best]
    before = trial_values("a =search")
    assert search.main([*line, "5"]) == 0, "a larger number extends the search"
    assert capsys.readouterr().out.count("trial_000") == 2 and trial_values("a =search")[:4] == before
    assert search.main([*line, "5", "trainer.workers=0"]) == 0, (
        "keys that do not change the results do not make another search"
    )
    assert search.main([*line, "5", "data.batch_size=9"]) == 2
    assert "a =search holds another search: fixed was ['model=vit', 'seed=3'] and is" in capsys.readouterr().err


def test_a_search_whose_first_trials_all_fail_stops_early(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_text(json.dumps({f"trial_000{n}": "refuse" for n in range(9)}))
    assert search.main([*LINE, "--study", "s", "--trials", "9"]) == 2
    out, err = capsys.readouterr()
    assert out.count("failed: These values") == 3 and err.startswith("3 trials failed, and none has succeeded")


def test_failures_after_a_success_do_not_stop_a_resumed_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main([*LINE, "--study", "s", "--trials", "1"]) == 0
    Path("plan.json").write_text(json.dumps({f"trial_000{n}": "refuse" for n in range(1, 4)}))
    assert search.main([*LINE, "--study", "s", "--trials", "4"]) == 0
    assert "4 trials, 3 of them failed" in capsys.readouterr().out


def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # less than the tables of the study
    try:
        assert search.main([*LINE, "--study", "s", "--trials", "1"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    assert err.startswith("s/study.db cannot be read or written (") and err.count("\n") == 1


@pytest.mark.slow
def test_two_searches_in_one_folder_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_text('{"trial_0000": "wait"}')
    first = start(*SHORT, "--study", "s", "--trials", "1")
    wait_for(Path("s/trial_0000/waits").exists)
    assert search.main([*SHORT, "--study", "s", "--trials", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"s is in use by process {first.pid}")
    Path("leave").touch()
    assert first.wait(30) == 0


@pytest.mark.slow
def test_ctrl_c_saves_the_trial_once_and_the_printed_command_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_text('{"trial_0001": "wait"}')
    first = start(*SHORT, "--study", "s", "--trials", "3")
    wait_for(Path("s/trial_0001/waits").exists)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    _, err = first.communicate(timeout=30)
    assert first.returncode == 130 and "Traceback" not in err
    assert int(Path("s/trial_0001/saved").read_text()) != first.pid, (
        "in the search's session Ctrl-C would reach it twice"
    )
    again = shlex.split(err.partition("To resume: python scripts/search.py ")[2])
    assert search.main(again) == 0
    assert re.findall(r"^trial_\d+", capsys.readouterr().out, re.MULTILINE) == ["trial_0001", "trial_0002"]
    Path("plan.json").unlink()
    assert search.main([*SHORT, "--study", "unbroken", "--trials", "3"]) == 0  # without an interruption
    assert trial_values("unbroken") == trial_values("s"), "both searches try the same values"


@pytest.mark.slow
def test_a_resumed_search_waits_for_the_run_that_a_killed_one_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_text('{"trial_0000": "wait"}')
    first = start(*SHORT, "--study", "s", "--trials", "2")
    wait_for(Path("s/trial_0000/waits").exists)
    first.kill()
    first.wait()

    def leave() -> None:
        wait_for(lambda: "is in use by" in Path("s/trial_0000.txt").read_text())
        Path("leave").touch()

    watcher = threading.Thread(target=leave)
    watcher.start()
    assert search.main([*SHORT, "--study", "s", "--trials", "2"]) == 0
    watcher.join()
    out = capsys.readouterr().out
    assert "waiting for its end" in out and "2 trials, 0 of them failed" in out


@pytest.mark.slow
def test_a_real_search_killed_in_a_run_ends_as_an_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the search that is killed needs a process of its own. That later trials agree, too, is tested above."""
    monkeypatch.setattr(search, "ROOT", ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    line = ["model=vit", "optimizer.lr=1e-4..1e-2", "trainer.steps=40", "trainer.eval_every=20", "trainer.save_every=5"]
    line += ["trainer.workers=0", "data.batch_size=8", "--trials", "1", "--study"]
    command = [sys.executable, str(ROOT / "scripts/search.py"), *line]
    killed = subprocess.Popen([*command, "killed"], start_new_session=True)
    wait_for(lambda: [*Path("killed/trial_0000/checkpoints").glob("step_*")])
    killed.kill()
    run = int(Path("killed/trial_0000/.lock").read_text().split()[1])
    os.kill(run, signal.SIGKILL)
    killed.wait()
    assert not Path("killed/trial_0000/results.json").exists()
    for name in ("killed", "unbroken"):
        assert search.main([*line, name]) == 0
    assert trial_values("killed") == trial_values("unbroken")
    numbers = [json.loads(Path(name, "trial_0000/results.json").read_text()) for name in ("killed", "unbroken")]
    assert numbers[0] == numbers[1]


def test_a_folder_name_that_optuna_cannot_store_is_refused() -> None:
    with pytest.raises(UserError, match="Optuna accepts no folder with"):
        search._open_study(Path("a?b"), search.plan(LINE), 0)


def test_the_database_is_in_the_folder_of_the_search_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = search.plan(LINE)  # composes six configs
    for name in ("s%41", "a b", "größer", "100%"):
        Path(name).mkdir()
        search._open_study(Path(name), plan, 0)
        search._open_study(tmp_path / name, plan, 0)
        assert [file.name for file in Path(name).iterdir()] == ["study.db"]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 4
    with pytest.raises(UserError, match="Optuna accepts no folder with"):
        search._open_study(Path("caf\udce9"), plan, 0)


def test_several_paths_are_a_choice() -> None:
    space = search.plan(["model=vit", "checkpoint=runs/a.pth,b.pth"]).space
    assert space == {"checkpoint": search.CategoricalDistribution(["'runs/a.pth'", "'b.pth'"])}


def test_without_optuna_it_is_one_sentence_that_says_how_to_install_it() -> None:
    code = "import runpy, sys; sys.modules['optuna'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    script = Path(__file__).parents[2] / "scripts/search.py"
    process = subprocess.run([sys.executable, "-c", code, str(script)], capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == "Optuna is not installed; install it (pip install optuna).\n"
