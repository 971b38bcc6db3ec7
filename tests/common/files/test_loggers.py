"""Weights & Biases, trackio and MLflow hold the numbers of metrics.jsonl, also of a run that was killed and resumed.

What they hold is read back by their own readers from their files on this machine.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import UserError
from common.files.loggers import refuse_missing

ROOT = Path(__file__).parents[3]
Numbers = list[tuple[int, str, float]]
# Logs steps first+1 ... last into the folder "run", as a trainer does that resumes from step `first`.
RUN = """
import os, signal, sys
from pathlib import Path
import torch
from common.files.log import Log

logger, first, last, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
picture = torch.zeros(2, 3, 8, 6, dtype=torch.uint8)
with Log(Path("runs/toy/run"), True) as log:
    log.truncate_after(first, evaluated=False)
    log.open_loggers([logger], {"seed": 0, "model": {"_target_": "a.B", "widths": [1, 2]}, "task": None})
    log.flush()
    for step in range(max(first, 1), last + 1):
        numbers = {"train/loss": 1 / step, "train/lr": 0.1, "train/undefined": float("nan")}
        if step > first:
            log.numbers(step, numbers, {"samples_per_s": 100.0})
        if step % 3 == 0:
            log.numbers(step, {"val/AP": step / 7, "val/AP50": -1.0})
            log.pictures("val", picture, step)
    if end == "kill":
        import time
        time.sleep(2)  # the loggers write in threads and processes of their own
        os.kill(os.getpid(), signal.SIGKILL)
"""
WANDB = """
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

for file in sorted(folder.glob("runs/toy/run/wandb/offline-run-*/*.wandb")):
    store = DataStore()
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        numbers += [[row["step"], k, v] for k, v in row.items() if k.startswith(("train/", "val/AP"))]
"""
MLFLOW = """
import mlflow

identity = json.loads((folder / "runs/toy/run/loggers.json").read_text())["mlflow"]
client = mlflow.MlflowClient(identity["store"])
run = client.get_run(identity["run"])
assert run.data.params["model.widths"] == "[1, 2]" and run.info.status == "FINISHED"
assert len([*client.list_artifacts(run.info.run_id, "images")]) == 2 * 2 * 3, "two images of three evaluations, twice"
for name in run.data.metrics:
    if not name.startswith("timing/"):
        numbers += [[m.step, name, m.value] for m in client.get_metric_history(run.info.run_id, name)]
"""
TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage

name = json.loads((folder / "runs/toy/run/loggers.json").read_text())["trackio"]["run"]
for row in SQLiteStorage.get_logs("triptych", name):
    numbers += [[row["step"], k, v] for k, v in row.items() if isinstance(v, float) and not k.startswith("timing/")]
"""
READERS = {"wandb": WANDB, "mlflow": MLFLOW, "trackio": TRACKIO}
PACKAGES = {"wandb": "wandb.sdk.internal.datastore", "mlflow": "mlflow", "trackio": "trackio.sqlite_storage"}


def run_python(script: str, *arguments: str, folder: Path, code: int = 0) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
    }
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    command = [sys.executable, "-c", script, *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == code, process.stdout + process.stderr
    assert "Warning: " not in process.stdout, process.stdout
    return process.stdout


def numbers_of(logger: str, folder: Path) -> Numbers:
    head = "import json\nfrom pathlib import Path\nfolder, numbers = Path(), []\n"
    script = f"{head}{READERS[logger]}\nprint(json.dumps(numbers))"
    return sorted(map(tuple, json.loads(run_python(script, folder=folder).splitlines()[-1])))


def numbers_of_metrics(folder: Path) -> Numbers:
    records = [json.loads(line) for line in (folder / "runs/toy/run/metrics.jsonl").read_text().splitlines()]
    return sorted(
        (record["step"], name, value)
        for record in records
        for name, value in record.items()
        if name != "step" and value is not None
    )


@pytest.mark.slow
@pytest.mark.parametrize("logger", READERS)
def test_a_logger_holds_the_same_numbers_as_metrics_also_after_a_kill(logger: str, tmp_path: Path) -> None:
    """The run is killed after step 8, resumes from step 6, whose evaluation is repeated, and ends with step 10."""
    missing = importlib.util.find_spec(PACKAGES[logger].partition(".")[0]) is None
    if missing or importlib.util.find_spec(PACKAGES[logger]) is None:
        pytest.skip(f"{PACKAGES[logger]} is not installed")
    run_python(RUN, logger, "0", "8", "kill", folder=tmp_path, code=-signal.SIGKILL)
    run_python(RUN, logger, "6", "10", "finish", folder=tmp_path)
    expected = numbers_of_metrics(tmp_path)
    assert len(expected) == 2 * 10 + 2 * 3
    assert numbers_of(logger, tmp_path) == expected


def test_a_logger_that_is_not_installed_is_refused_before_the_first_step(
    inside: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    message = inside("train", "model=vit", "run_dir=run", "trainer.log=[tensorboard,wandb]", code=2)
    assert message == (
        "trainer.log=[tensorboard,wandb]: wandb is not installed; install it (pip install wandb), or leave it out."
    )
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_name_of_a_logger_is_not_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"^trainer\.log=\[trackio\]: trackio is not installed"):
        refuse_missing(["trackio"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[wanb]", "trainer.log[0]=wanb: expected tensorboard, wandb, trackio or mlflow; did you mean wandb?"),
        ("[tensorboard,x]", "trainer.log[1]=x: expected tensorboard, wandb, trackio or mlflow."),
        ("wandb", "trainer.log=wandb: expected a list (each tensorboard, wandb, trackio or mlflow)."),
    ],
)
def test_an_unknown_logger_is_refused_with_the_nearest(inside: Callable[..., str], value: str, message: str) -> None:
    assert inside("train", "model=vit", f"trainer.log={value}", code=2) == message
