"""Run a training script in a process of its own, with signals forwarded; and run one of the runs of a sweep."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from omegaconf import DictConfig

from common.config.compose import plain_config
from common.config.migrations import update_names
from common.errors import Stopped, UserError
from common.files import run_folder
from common.files.lines import write_atomically
from common.files.lock import InUseError
from common.files.run_folder import Job
from common.machine import console

STATUS_FOLDER = ".notes"  # in a sweep's folder: a file for each run that is not done, with the reason
STOP_FILE = ".halt"  # in a sweep's folder while its runs are asked to stop
POLL_SECONDS = 0.5  # between two checks of the stop file


class ProcessResult(NamedTuple):
    """A process's exit code (-N if signal number N killed it) and the names of the signals forwarded to it."""

    code: int
    signals: list[str]


def run_script(script: Path, arguments: Sequence[str], output: Path) -> ProcessResult:
    """Run a Python script until it exits and append what it prints to `output`.

    The process gets its own session. Otherwise Ctrl-C would reach it twice, from the terminal and forwarded, and the
    second Ctrl-C ends a run without a checkpoint.
    """
    with open(output, "ab") as file:
        command = [sys.executable, str(script), *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        with forwarded_signals(process.send_signal) as received:
            return ProcessResult(process.wait(), received)


@contextlib.contextmanager
def forwarded_signals(send: Callable[[int], object]) -> Iterator[list[str]]:
    """Pass SIGINT, SIGTERM and SIGHUP to `send` inside the context; yields the growing list of their names.

    Signals that the process ignores (nohup) stay ignored. Outside Python's main thread, which alone can set handlers,
    no signal is forwarded.
    """
    received: list[str] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        send(number)

    numbers = {getattr(signal, name, signal.SIGTERM) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
    numbers = {number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    in_main_thread = threading.current_thread() is threading.main_thread()
    former_handlers = {number: signal.signal(number, forward) for number in numbers if in_main_thread}
    try:
        yield received
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)


class RunStatus(NamedTuple):
    """The state of a run that is not done, and the reason.

    The state is refused (a user's mistake), failed, stopped, or open (not begun, running or killed).
    """

    state: str
    why: str


NO_STATUS = RunStatus("open", "it has not begun, still runs, or was killed.")


class SweepJob:
    """The function that a launcher calls for each run, in the sweep's process or, pickled, in another one."""

    def __init__(
        self,
        job: Job,
        *,
        in_sweep_process: bool,
        stop_file: "StopFile | None" = None,
        working_folder: str | None = None,
    ):
        """Store the job and where its runs take place.

        `in_sweep_process`: all runs take place in the sweep's own process. `stop_file`: the file that asks runs in
        child processes to stop. `working_folder`: the folder of a package that the user trusts; None without such a
        package.
        """
        self.job, self.in_sweep_process, self.stop_file = job, in_sweep_process, stop_file
        self.working_folder = working_folder

    def __call__(self, composed: DictConfig) -> float | None:
        """Run the job in the run's folder; a failure is written to the run's status file instead of raised.

        In the sweep's own process, a signal ends the sweep. In another process, it ends only this run, and no exception
        is raised: the launcher would kill the other runs while they write checkpoints.
        """
        if self.working_folder and self.working_folder not in sys.path:
            sys.path.append(self.working_folder)
        console.guard()  # of a process that a launcher started
        config = plain_config(composed)
        update_names(config)
        folder = Path(config["run_dir"])
        if self.in_sweep_process:
            return self._run(config, folder)
        if self.stop_file and self.stop_file.stop_requested():
            return None
        try:
            with _stopped_by(self.stop_file) if self.stop_file else contextlib.nullcontext():
                return self._run(config, folder)
        except (Stopped, KeyboardInterrupt) as stop:
            _write_status(folder, RunStatus("stopped", str(stop) or "Stopped by Ctrl-C."))
            return None
        finally:
            if self.stop_file and self.stop_file.is_orphaned():
                os._exit(0)  # otherwise joblib's worker waits five minutes for another run

    def _run(self, config: dict[str, Any], folder: Path) -> float | None:
        try:
            return run_folder.run_in(self.job, config, folder)
        except InUseError as error:  # by another sweep, which writes the run's status
            print(f"{folder}: {error}", file=sys.stderr, flush=True)
        except UserError as error:
            _write_status(folder, RunStatus("refused", str(error)))
            print(f"{folder}: {error}", file=sys.stderr, flush=True)
        except Exception as error:
            _write_status(folder, RunStatus("failed", f"{type(error).__name__}: {error}".partition("\n")[0]))
            print(f"{folder}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return None


class StopFile(NamedTuple):
    """Tells a sweep's child processes to stop, when the file exists or when the sweep's process is gone."""

    path: Path
    sweep_pid: int

    def stop_requested(self) -> bool:
        """Whether this process, a child of the sweep's, must stop."""
        return self.path.exists() or self.is_orphaned()

    def is_orphaned(self) -> bool:
        """Whether the sweep's process, the parent of this one, is gone."""
        return os.getppid() != self.sweep_pid


StopFileContext = contextlib.AbstractContextManager[tuple[StopFile | None, list[str]]]


@contextlib.contextmanager
def signals_to_stop_file(sweep: Path) -> Iterator[tuple[StopFile, list[str]]]:
    """Turn signals to a sweep into a file that its child processes poll; yields the file and the names of signals.

    Ctrl-C in a terminal and `kill` then have the same effect: each run writes a checkpoint, and the sweep waits for all
    of them. A second Ctrl-C stops everything at once.
    """
    stop_file = StopFile(sweep / STOP_FILE, os.getpid())
    stop_file.path.unlink(missing_ok=True)  # left by a sweep that was killed

    def request_stop(number: int) -> None:
        if received.count("SIGINT") > 1:
            raise KeyboardInterrupt
        try:
            stop_file.path.touch()
        except OSError as error:
            console.notify(
                f"\n{stop_file.path} cannot be written ({error.strerror}); press Ctrl-C again to stop at once.\n"
            )
            return
        console.notify("\nStopping: each run finishes its step and saves; press Ctrl-C again to stop at once.\n")

    try:
        with forwarded_signals(request_stop) as received:
            yield stop_file, received
    finally:
        stop_file.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _stopped_by(stop_file: StopFile) -> Iterator[None]:
    """Once `stop_file` requests a stop, interrupt the run inside the context as SIGTERM would.

    A terminal sends Ctrl-C to this process, too, perhaps before the run has set its handlers. Ctrl-C is therefore
    ignored here; the sweep's process turns it into the stop file.
    """
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_SECONDS):
            if stop_file.stop_requested():
                interrupt_main(signal.SIGTERM)  # does nothing until the run has set its handler

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        finished.set()


def clear_status(folder: Path) -> None:
    """Delete the status of the run in `folder` before the run is tried again."""
    _status_file(folder).unlink(missing_ok=True)


def statuses_in(sweep: Path) -> dict[Path, RunStatus]:
    """The statuses of a sweep's runs: folder of the run -> status."""
    return {sweep / file.stem: status_of(sweep / file.stem) for file in sorted((sweep / STATUS_FOLDER).glob("*.json"))}


def status_of(folder: Path) -> RunStatus:
    """The status of an unfinished run in `folder`; NO_STATUS if there is no readable status file."""
    try:
        return RunStatus(**json.loads(_status_file(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return NO_STATUS


def _write_status(folder: Path, status: RunStatus) -> None:
    file = _status_file(folder)
    with contextlib.suppress(OSError):  # a full disk; the reason is printed, too, and the other runs go on
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(status._asdict(), ensure_ascii=False))


def _status_file(folder: Path) -> Path:
    return folder.parent / STATUS_FOLDER / f"{folder.name}.json"
