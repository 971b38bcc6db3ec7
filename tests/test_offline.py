"""With local data nothing uses the network: the doors run in processes that refuse and log every connection."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
Command = Callable[..., str]
ReadLog = Callable[[str], list[str]]
# Python runs sitecustomize.py when it starts. An audit hook sees each use of Python's sockets and cannot be removed. It
# logs what it refuses, since a library may catch the error and continue without the network.
GUARD = r"""
import os, socket, sys

def log(name, line):
    with open(os.path.join(os.path.dirname(__file__), name), "a") as file:
        file.write(line + "\n")

def guard(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a path: a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    if host in (None, "127.0.0.1", "::1", "localhost", socket.gethostname()):
        return
    log("attempts", f"{event} {host} by {sys.orig_argv}")
    raise PermissionError(f"the test refuses {event}")

sys.addaudithook(guard)
log("guarded", " ".join(sys.orig_argv))
"""
CONNECTIONS = """
import socket
for attempt in (
    lambda: socket.socket().connect(("192.0.2.1", 80)),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 80)),
    lambda: socket.create_connection(("example.org", 80)),
    lambda: socket.gethostbyname("example.org"),
):
    try:
        attempt()
    except PermissionError as error:
        print(error)
"""
# Runs several doors in one process; each argument is the command line of one.
DOORS = """
import importlib, json, sys
from common.cli import start

for name, *arguments in map(json.loads, sys.argv[1:]):
    module = importlib.import_module(name)
    try:
        start.door(getattr(module, name), name, getattr(module, "stored_config", None), arguments)
    except SystemExit as end:
        assert not end.code, name
"""
LENGTH = ["trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=2", "trainer.workers=1", "schedule.warmup=1"]
TINY = {
    "detr": [
        *("model.width=32", "model.queries=7", "data.batch_size=4"),
        *("data.train_count=20", "data.val_count=5", "data.test_count=5"),
    ],
    "vit": ["model.width=32", "model.layers=2", "model.heads=2", "data.batch_size=16"],
    "seq2seq": [
        *("model.width=32", "model.heads=2", "model.feedforward=48", "model.encoder_layers=1"),
        *("model.decoder_layers=2", "data.tokenizer.vocabulary=400", "data.batch_size=600", "task.predict.beam=1"),
        *("data.train_count=2000", "data.val_count=20", "data.test_count=20", "task.predict.longest_extra=2"),
    ],
}
pytestmark = pytest.mark.slow


@pytest.fixture
def read_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ReadLog:
    """Guards every process that starts from now on; reads the log of `guarded` commands or of refused `attempts`."""
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(GUARD)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return lambda name: (folder / name).read_text().splitlines() if (folder / name).exists() else []


def test_the_guard_refuses_and_logs_every_kind_of_connection(read_log: ReadLog) -> None:
    output = subprocess.run([sys.executable, "-c", CONNECTIONS], capture_output=True, text=True, check=True).stdout
    events = ["socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"]
    assert output.splitlines() == [f"the test refuses {event}" for event in events]
    assert [line.split()[0] for line in read_log("attempts")] == events


@pytest.mark.parametrize("model", TINY)
def test_training_evaluating_and_predicting_need_no_network(model: str, read_log: ReadLog, tmp_path: Path) -> None:
    root = [f"data.root={tmp_path / 'shapes'}"] if model == "detr" else []
    best = f"checkpoint={tmp_path}/run/checkpoints/best.pt"
    (tmp_path / "text.txt").write_text("one day\n")
    Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "photo.png")
    input_file = tmp_path / ("text.txt" if model == "seq2seq" else "photo.png")
    lines = [
        ["train", f"model={model}", *TINY[model], *LENGTH, *root, f"run_dir={tmp_path / 'run'}"],
        ["evaluate", best, f"output={tmp_path / 'results'}"],
        ["predict", best, f"input={input_file}", f"output={tmp_path / 'out'}"],
    ]
    doors = [sys.executable, "-c", DOORS, *map(json.dumps, lines)]
    process = subprocess.run(doors, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "results/results.json").exists(), "evaluated"
    assert model == "seq2seq" or "photo.png" in process.stdout, "predicted"
    assert read_log("guarded") and not read_log("attempts")


def test_loggers_without_an_account_or_a_server_use_no_network(
    command: Command, read_log: ReadLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "mlflow"):
        pytest.importorskip(package)
    monkeypatch.setenv("HOME", str(tmp_path))  # where wandb looks for an account
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    loggers = "trainer.log=[tensorboard,wandb,mlflow]"
    output = command("train", "model=vit", *TINY["vit"], *LENGTH, f"run_dir={tmp_path / 'run'}", loggers, cwd=tmp_path)
    assert "wandb     offline; wandb sync" in output and "Warning" not in output
    assert not read_log("attempts")


def test_two_processes_connect_only_to_each_other(command: Command, read_log: ReadLog, tmp_path: Path) -> None:
    command("train", "model=vit", *TINY["vit"], *LENGTH, f"run_dir={tmp_path / 'run'}", processes=2)
    assert sum("train.py" in line for line in read_log("guarded")) == 3, "torchrun and two ranks"
    assert not read_log("attempts")
