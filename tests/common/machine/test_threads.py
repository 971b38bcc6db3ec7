"""OpenMP's settings: made before torch is imported, in every command, unless the user has made them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.machine import threads

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted(f"scripts/{file.stem}" for file in (ROOT / "scripts").glob("*.py") if file.stem != "__init__")
COMMANDS = ("train", "evaluate", "predict", *SCRIPTS)
WITHOUT_TORCH = ("scripts/compare", "scripts/search")  # the second starts train.py
UNSET = ("scripts/benchmark",)  # it compares with other libraries, each in its own defaults

# Runs a command and prints OpenMP's settings at the moment at which torch is first imported.
SPY = """
import os, runpy, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            names = "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT"
            print("seen", *map(os.environ.get, names), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Spy())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def settings_at_import(command: str, arguments: list[str], **settings: str) -> list[str]:
    """The wait policy, the number of threads and the rounds of spinning that torch's OpenMP reads in `command`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    line = [sys.executable, "-c", SPY, str(ROOT / f"{command}.py"), *arguments]
    process = subprocess.run(line, capture_output=True, text=True, env={**environment, **settings}, cwd=ROOT)
    lines = [text.split() for text in process.stdout.splitlines() if text.startswith("seen")]
    assert len(lines) == 1, process.stdout + process.stderr
    return lines[0][1:]


def arguments_of(command: str, folder: Path) -> list[str]:
    file = folder / "weights.pt"
    file.touch()
    if command == "train":
        return ["model=vit", f"run_dir={folder / 'run'}"]
    return [f"checkpoint={file}", f"input={file}"] if command == "predict" else [f"checkpoint={file}"]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in WITHOUT_TORCH + UNSET])
def test_threads_sleep_after_a_short_wait_in_every_command(command: str, tmp_path: Path) -> None:
    policy, _, spins = settings_at_import(command, arguments_of(command, tmp_path))
    assert policy == "passive" and 0 < int(spins) <= 10_000  # 20,000 were too many beside two busy processes


def test_what_a_user_sets_is_used(tmp_path: Path) -> None:
    settings = {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "3"}
    for command in ("train", "scripts/export"):
        assert settings_at_import(command, arguments_of(command, tmp_path), **settings) == ["active", "3", "None"]
    assert threads.missing_settings({"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "2"}) == {"OMP_WAIT_POLICY": "passive"}


def test_a_sweep_passes_the_policy_to_its_runs(tmp_path: Path) -> None:
    arguments = ["-m", "model=vit", "seed=0,1", f"sweep_dir={tmp_path}"]
    assert settings_at_import("train", arguments)[0] == "passive"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, "2"),  # one and a half cores, rounded up
        ({"cpu.max": "10000 100000\n"}, "1"),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "6400000 100000\n"}, None),  # more than the 8 cores of the machine
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, "3"),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_there_are_no_more_threads_than_a_container_may_run(
    files: dict[str, str], cores: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "_cores", lambda: 8)
    assert threads.missing_settings({}).get("OMP_NUM_THREADS") == cores
    assert "OMP_NUM_THREADS" not in threads.missing_settings({"OMP_NUM_THREADS": "5"})
    assert "OMP_NUM_THREADS" not in threads.missing_settings({}, count=False)


@pytest.mark.parametrize(
    ("cores", "limit", "processes", "workers"),
    [
        (8, None, 1, 8),
        (8, None, 2, 4),
        (8, None, 3, 2),
        (2, None, 4, 0),
        (128, None, 1, 16),
        (8, 2.5, 1, 2),
        (8, 0.5, 1, 1),
    ],
)
def test_auto_starts_no_more_workers_than_cores_for_all_processes_together(
    cores: int, limit: float | None, processes: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: cores)
    monkeypatch.setattr(threads, "_processor_share", lambda folder: limit)
    assert threads.worker_count("auto", processes) == workers
    assert threads.worker_count(5, processes) == 5
