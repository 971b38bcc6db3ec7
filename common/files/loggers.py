"""Programs that show a run's numbers, config and pictures: TensorBoard, Weights & Biases, trackio and MLflow.

All have the methods of `Logger`. TensorBoard writes into the run's folder; the other programs may wait for a server, so
dispatch.py calls them in threads. Their packages are imported when a run begins.
"""

import importlib.util
import inspect
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.files.lines import as_json, write_atomically
from common.files.records import LOGGERS_FILE, read_record

LoggerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
PROJECT = "triptych"  # in which the programs list the runs, unless the user's environment names another
WAIT_SECONDS = 40  # for the server of Weights & Biases, at the start and at the end
MAX_PARAMETER = 6000  # characters of a value; a limit of MLflow


class Logger(Protocol):
    """A program that shows runs. Its methods may raise anything, which ends its part in the run, but not the run."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show finite numbers by their names, such as train/loss."""

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Show images uint8 (B, 3, H, W)."""

    def close(self, finished: bool) -> None:
        """Write what is buffered; `finished` is False if a signal or an error ended the run."""


class Description(NamedTuple):
    """What a logger learns of a run when it opens."""

    folder: Path
    config: dict[str, Any]
    parameters: dict[str, Any]  # the config by full keys, such as optimizer.lr
    step: int  # of the checkpoint from which the run resumes, or 0

    @property
    def name(self) -> str:
        """The names of the run's folder and of the one above: vit-digits/2026-01-01_12-00-00."""
        return "/".join(filter(None, self.folder.absolute().parts[-2:]))

    def records(self) -> list[dict[str, Any]]:
        """The records in metrics.jsonl, up to the step from which the run resumes."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def identity(self, logger: str) -> dict[str, Any]:
        """What identifies the run in that logger; empty if the logger has not shown it yet."""
        file = self.folder / LOGGERS_FILE
        return read_record(file).get(logger, {}) if file.exists() else {}

    def identify(self, logger: str, **identity: Any) -> None:
        """Store what identifies the run in that logger, for resuming."""
        file = self.folder / LOGGERS_FILE
        stored = read_record(file) if file.exists() else {}
        write_atomically(file, as_json({**stored, logger: identity}, indent=1))


def refuse_missing(names: Sequence[str]) -> None:
    """Raise UserError if the package of a logger is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder, such as the one that wandb makes
            listed = ",".join(names)
            raise UserError(
                f"trainer.log=[{listed}]: {name} is not installed; install it (pip install {name}), or leave it out."
            )


class TensorBoard:
    """TensorBoard's events in the run's folder; on resuming, the steps after the checkpoint are purged."""

    def __init__(self, run: Description):
        self._folder = run.folder
        self._purge_step: int | None = run.step + 1
        self._config = None if run.step else run.config  # still to be shown
        self._writer: Any = None

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar for each number."""
        for name, value in values.items():
            self._open().add_scalar(name, value, step)

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Show the images side by side."""
        self._open().add_images(name, images, step)

    def flush(self) -> None:
        """Write all events to the file."""
        if self._writer is not None:
            self._writer.flush()

    def close(self, finished: bool) -> None:
        """Close the file; a later call opens another."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def reopen(self) -> None:
        """Let the next call open another file, because a writer that failed once fails at every call."""
        self._writer = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            self._purge_step = None
            if self._config is not None:
                self._writer.add_text("config", _as_markdown(self._config), 0)
                self._config = None
        return self._writer


class WandB:
    """Weights & Biases. Each call is a row, whose column `step` is the x-axis of all others.

    The program's own counter of steps only increases, and would drop numbers of a step that was already logged.
    Offline, the program writes blocks of 32 KB, so a file that was not closed (kill -9) lacks the last rows. On
    resuming, such a file is set aside, and the next one gets all its numbers, read from metrics.jsonl.
    """

    def __init__(self, run: Description):
        import wandb

        settings = wandb.setup().settings  # of the user: environment variables and files
        offline = settings.mode in ("offline", "dryrun") or not _has_account(wandb)
        stored = run.identity("wandb")
        identity = stored.get("run", uuid.uuid4().hex[:8])
        run.identify("wandb", run=identity)
        self._module, self._description = wandb, run
        unclosed = stored.get("unclosed") if offline else None
        self.lost_rows = unclosed is not None and _set_aside(run.folder / "wandb" / unclosed)
        self._run = wandb.init(
            project=settings.project or PROJECT,
            name=run.name,
            id=identity,
            resume=None if offline else "allow",  # it has no meaning offline, and a warning says so
            dir=str(run.folder),
            config=run.config,
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=WAIT_SECONDS, finish_timeout=WAIT_SECONDS),
        )
        self._run.define_metric("*", step_metric="step")
        self.location = f"offline; wandb sync {run.folder}/wandb/offline-*" if offline else str(self._run.url)
        records = run.records()
        first = stored["lines"] if self.lost_rows else len(records)
        if offline:
            run.identify("wandb", run=identity, unclosed=Path(self._run.settings.sync_dir).name, lines=first)
        for record in records[first:]:
            self.numbers(record["step"], {name: x for name, x in record.items() if x is not None})

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row."""
        self._run.log({**values, "step": step})

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Add a row with the images."""
        self._run.log({"step": step, name: [self._module.Image(pixels) for pixels in _pixels(images)]})

    def close(self, finished: bool) -> None:
        """Write or upload all rows."""
        self._run.finish(exit_code=0 if finished else 1)
        self._description.identify("wandb", run=self._run.id)


def _set_aside(folder: Path) -> bool:
    """Rename a folder that the program did not close; returns False if it is gone, or was uploaded meanwhile."""
    if not folder.is_dir() or any(folder.glob("*.synced")):
        return False
    folder.rename(folder.with_name(f"unclosed-{folder.name}"))
    return True


def _has_account(wandb: Any) -> bool:
    """Whether the user is logged in; never asks for it, as `wandb.init` does."""
    if "prompt" in inspect.signature(wandb.login).parameters:  # since wandb 0.31
        return bool(wandb.login(prompt=False))
    return wandb.api.api_key is not None


class Trackio:
    """Trackio: a database under the user's home, or the server or Space that the user's environment names."""

    def __init__(self, run: Description):
        import trackio

        name = run.identity("trackio").get("run", f"{run.name.replace('/', '-')}-{uuid.uuid4().hex[:4]}")
        run.identify("trackio", run=name)
        self._module = trackio
        self._run = trackio.init(PROJECT, name=name, config=run.parameters, resume="allow", embed=False)
        self.location = f"run {name} of the project {PROJECT}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Add a row with the images."""
        pictures = {f"{name}/{i}": self._module.Image(pixels) for i, pixels in enumerate(_pixels(images))}
        self._run.log(pictures, step=step)

    def close(self, finished: bool) -> None:
        """Write or send all rows."""
        self._run.finish()


class MLflow:
    """MLflow: the store that MLFLOW_TRACKING_URI names, by default a database in the working folder."""

    def __init__(self, run: Description):
        import mlflow
        from mlflow.entities import Metric
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        stored = run.identity("mlflow")
        self._client = mlflow.MlflowClient(stored.get("store"))
        self._metric = Metric
        if stored:
            self._id = stored["run"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            experiment = mlflow.set_experiment(MLFLOW_EXPERIMENT_NAME.get() or PROJECT)
            self._id = self._client.create_run(experiment.experiment_id, run_name=run.name).info.run_id
            run.identify("mlflow", run=self._id, store=mlflow.get_tracking_uri())
            self._log_parameters(run.parameters)
        self.location = f"run {self._id} in {run.identity('mlflow')['store']}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each number."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Store the images as artifacts."""
        for number, pixels in enumerate(_pixels(images)):
            self._client.log_image(self._id, pixels, key=f"{name}/{number}", step=step)

    def close(self, finished: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:MAX_PARAMETER]) for key, value in parameters.items()]
        for start in range(0, len(entries), 100):  # the most in one call
            self._client.log_batch(self._id, params=entries[start : start + 100])


def _pixels(images: Tensor) -> list[np.ndarray[Any, Any]]:
    """Each image of (B, 3, H, W) as an array (H, W, 3)."""
    return [image.permute(1, 2, 0).cpu().numpy() for image in images]


def _as_markdown(config: Mapping[str, Any]) -> str:
    """A config as a block of code."""
    from common.config.plain_text import config_yaml

    return "".join(f"    {line}\n" for line in config_yaml(dict(config)).splitlines())
