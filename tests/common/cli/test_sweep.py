"""Sweeps in several processes: a failing run does not stop the others, a stopped run saves and is resumed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
# A job that logs its start and does what plan.json says for its seed; it runs in a folder outside the project.
TOY = f"""
import json, os, signal, sys, time
from pathlib import Path
sys.path.append({str(ROOT)!r})
from common.cli import main as cli
from common.errors import Stopped, UserError

def job(config, folder):
    seed = config["seed"]
    plan = json.loads(Path("plan.json").read_text()).get(str(seed), "finish")
    with open("ran.txt", "a") as file:
        print(seed, "resumes" if (folder / "checkpoints").exists() else "starts", file=file)
    if plan == "refuse":
        raise UserError("This seed is unlucky.")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints/step.pt").touch()
    if plan == "fail":
        raise OSError(5, "No luck")  # OSError defines its own pickling
    if plan == "stop":
        raise Stopped(["SIGTERM"], "after step 3")
    if plan == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "wait":
        signals = []
        signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
        (folder / "waits").write_text(str(os.getpid()))
        while not signals:
            time.sleep(0.02)
        time.sleep(seed)  # the first run that has saved must not keep the others from saving
        (folder / "saved").touch()
        raise Stopped(["SIGTERM"], "after step 3")
    (folder / "results.json").write_text(json.dumps({{"val/AP": seed, "goal": "val/AP", "direction": "maximize"}}))

if __name__ == "__main__":
    cli.launch(job, door="train")
"""
LAUNCHERS = [("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), ("hydra/launcher=submitit_local",)]
Sweep = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Start a process that sweeps seeds 0 to 4 of the toy into the folder `x`; `plan` states what each seed does."""
    (tmp_path / "toy.py").write_text(TOY)

    def launch(*launcher: str, plan: dict[int, str]) -> "subprocess.Popen[str]":
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, "toy.py", "-m", "model=vit", "seed=0,1,2,3,4", "sweep_dir=x", *launcher]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **streams)

    return launch


def states(output: str) -> list[str]:
    """The state of each run in the table that a sweep prints at its end."""
    return re.findall(r"^vit-seed_\d-[0-9a-f]{8}\s+(\w+)", output, re.MULTILINE)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["joblib", "submitit"])
def test_a_sweep_finishes_despite_failing_runs_and_tries_them_again(
    sweep: Sweep, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    first = sweep(*launcher, plan={1: "refuse", 2: "fail", 3: "stop"})
    out, err = first.communicate()
    assert first.returncode == 1, err
    assert states(out) == ["done", "refused", "failed", "stopped", "done"]
    reasons = ["This seed is unlucky.", "OSError: [Errno 5] No luck", "Stopped by SIGTERM after step 3."]
    assert all(re.search(rf"x/vit-seed_{seed}-\w+: {re.escape(reasons[seed - 1])}", err) for seed in (1, 2, 3)), err
    assert f"To resume: python toy.py -m model=vit seed=0,1,2,3,4 sweep_dir=x {' '.join(launcher)}\n" in err
    (tmp_path / "ran.txt").unlink()
    second = sweep(*launcher, plan={})
    out, err = second.communicate()
    assert second.returncode == 0 and states(out) == ["done"] * 5, err
    starts = sorted((tmp_path / "ran.txt").read_text().splitlines())
    assert starts == ["1 starts", "2 resumes", "3 resumes"], "runs that are done do not run again"
    files = {name for folder in (tmp_path / "x").glob("vit*") for name in os.listdir(folder)}
    assert files == {"config.yaml", "results.json", "checkpoints", ".lock"}, (
        "launchers write nothing into runs' folders"
    )


def test_a_killed_worker_is_reported(sweep: Sweep) -> None:
    killed = sweep(*LAUNCHERS[0], plan={1: "die"})
    out, err = killed.communicate()
    assert killed.returncode == 1 and "The launcher failed: TerminatedWorkerError: A worker process" in err
    assert states(out)[1] == "open" and "killed.\n" in err and "To resume: " in err
    again = sweep(*LAUNCHERS[0], plan={})
    out, _ = again.communicate()
    assert again.returncode == 0 and states(out) == ["done"] * 5


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_every_run_saves_when_its_sweep_is_stopped_or_killed(
    sweep: Sweep, tmp_path: Path, name: str, code: int
) -> None:
    stopped = sweep(*LAUNCHERS[0], plan={0: "wait", 1: "wait"})
    waiting = await_files(tmp_path, "x/*/waits", 2)
    pids = [int(file.read_text()) for file in waiting]
    os.kill(stopped.pid, getattr(signal, name))
    await_files(tmp_path, "x/*/saved", 2)
    stopped.wait(20)
    assert stopped.returncode == code
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "no process remains"
    assert len([*tmp_path.glob("x/vit*")]) == 2, "no further run began"
    if code > 0:
        err = stopped.communicate()[1]
        assert f"Stopped by {name}" in err and "To resume: python toy.py -m" in err and "Traceback" not in err


def await_files(folder: Path, pattern: str, count: int) -> list[Path]:
    """Wait until `count` files match; returns them."""
    for _ in range(400):
        files = [*folder.glob(pattern)]
        if len(files) == count:
            return files
        time.sleep(0.05)
    raise AssertionError(f"{len(files)} {pattern}")


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=["joblib", "submitit"])
def test_real_runs_finish_beside_one_that_is_refused(
    command: Callable[..., str], tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    line = ["-m", "model=vit", "trainer.steps=2", "model.heads=4,5", "trainer.workers=0", *launcher]
    line += [f"sweep_dir={tmp_path / 'a sweep'}", "data.batch_size=8"]
    output = command("train", *line, cwd=tmp_path, code=2)
    assert "model.heads=5" in output and "1 of the runs in" in output
    (results,) = (tmp_path / "a sweep").glob("*/results.json")
    assert re.fullmatch(r"vit-heads_4-[0-9a-f]{8}", results.parent.name)
    if "joblib" in launcher[0]:  # above, both launchers skip what is done
        written_at = results.stat().st_mtime_ns
        output = command("train", *line, cwd=tmp_path, code=2)
        assert "1 of them already done" in output and results.stat().st_mtime_ns == written_at
