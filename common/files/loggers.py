"""Loggers, which show a run's numbers, config and pictures: TensorBoard, Weights & Biases, trackio and MLflow.

Each logger's class has the methods of `Logger`. TensorBoard writes into the run's folder. The other programs may wait
for a server, so dispatch.py calls them in threads. A logger's package is imported only when a run uses it.
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
# The project in Weights & Biases and trackio, and the experiment in MLflow. The user's settings of Weights & Biases and
# of MLflow can name another.
PROJECT = "triptych"
WAIT_SECONDS = 40  # how long Weights & Biases waits for its server, at the start and at the end
MAX_PARAMETER = 6000  # maximum number of characters of a parameter's value in MLflow


class Logger(Protocol):
    """A program that shows runs. If one of its methods raises an exception, the run continues without this logger.

    TensorBoard differs in one case: after an OSError, it is tried again.
    """

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Show the finite numbers `values` of `step`, by their names, such as train/loss."""

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Show the uint8 images (B, 3, H, W) of `step` under `name`."""

    def close(self, finished: bool) -> None:
        """Write all buffered data and end the logger; `finished` is False if a signal or an error ended the run."""


class Description(NamedTuple):
    """The information about a run with which a logger is opened."""

    folder: Path
    config: dict[str, Any]
    parameters: dict[str, Any]  # the config as a flat dict of full keys, such as optimizer.lr
    step: int  # of the checkpoint from which the run resumes; 0 for a new run

    @property
    def name(self) -> str:
        """The name of the parent folder and that of the run's folder: vit-digits/2026-01-01_12-00-00, for example."""
        return "/".join(filter(None, self.folder.absolute().parts[-2:]))

    def records(self) -> list[dict[str, Any]]:
        """The records in metrics.jsonl; when loggers are opened, these end at the step from which the run resumes."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def identity(self, logger: str) -> dict[str, Any]:
        """The values that `identify` has stored for `logger`; empty if there are none yet."""
        file = self.folder / LOGGERS_FILE
        return read_record(file).get(logger, {}) if file.exists() else {}

    def identify(self, logger: str, **identity: Any) -> None:
        """Store the values by which `logger` identifies the run, so that a resumed run continues in the same place."""
        file = self.folder / LOGGERS_FILE
        stored = read_record(file) if file.exists() else {}
        write_atomically(file, as_json({**stored, logger: identity}, indent=1))


def refuse_missing(names: Sequence[str]) -> None:
    """Raise UserError if the package of one of the loggers `names` is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder that is no package, such as wandb's output wandb/, has none
            listed = ",".join(names)
            raise UserError(
                f"trainer.log=[{listed}]: {name} is not installed; install it (pip install {name}), or leave it out."
            )


class TensorBoard:
    """TensorBoard's events in the run's folder; on resuming, events after the checkpoint are purged."""

    def __init__(self, run: Description):
        self._folder = run.folder
        self._purge_step: int | None = run.step + 1
        self._config = None if run.step else run.config  # shown when the file is first opened
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
        """Close the file; a later call opens a new one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def reopen(self) -> None:
        """Let the next call open a new file, because a writer that failed once fails at every call."""
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
    """Weights & Biases. Each call adds a row to a table, whose column `step` is the x-axis of all other columns.

    wandb's own counter of steps is not used: it only increases, so rows of steps that were already logged would be
    dropped.

    Offline, wandb writes its file in blocks of 32 KB. A file that was not closed (after kill -9) therefore lacks the
    last rows. When the run resumes, the folder of this file is renamed, and its numbers are read from metrics.jsonl and
    written to a new file.
    """

    def __init__(self, run: Description):
        import wandb

        settings = wandb.setup().settings  # the user's, from environment variables and files
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
            resume=None if offline else "allow",  # offline, wandb ignores it with a warning
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
    """Rename wandb's `folder` of an offline run that was not closed.

    Returns False, without renaming, if the folder no longer exists or its content was uploaded.
    """
    if not folder.is_dir() or any(folder.glob("*.synced")):
        return False
    folder.rename(folder.with_name(f"unclosed-{folder.name}"))
    return True


def _has_account(wandb: Any) -> bool:
    """Whether the user is logged in; unlike `wandb.init`, this never asks the user to log in."""
    if "prompt" in inspect.signature(wandb.login).parameters:  # since wandb 0.31
        return bool(wandb.login(prompt=False))
    return wandb.api.api_key is not None


class Trackio:
    """Trackio, which stores runs in a database, by default under the user's home.

    The user's environment variables can name another folder, a server, or a Space of Hugging Face instead.
    """

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
    """MLflow, which stores runs where MLFLOW_TRACKING_URI says, by default in a database in the working folder.

    A resumed run continues in the store where it began.
    """

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
        """Set the run's status to FINISHED, or to KILLED if a signal or an error ended the run."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:MAX_PARAMETER]) for key, value in parameters.items()]
        for start in range(0, len(entries), 100):  # MLflow's limit for one call
            self._client.log_batch(self._id, params=entries[start : start + 100])


def _pixels(images: Tensor) -> list[np.ndarray[Any, Any]]:
    """Convert images (B, 3, H, W) to a list of B arrays (H, W, 3)."""
    return [image.permute(1, 2, 0).cpu().numpy() for image in images]


def _as_markdown(config: Mapping[str, Any]) -> str:
    """Format a config as YAML, in a code block of Markdown."""
    from common.config.plain_text import config_yaml

    return "".join(f"    {line}\n" for line in config_yaml(dict(config)).splitlines())
