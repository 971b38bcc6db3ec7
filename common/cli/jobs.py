"""Run a script in a child process and forward signals to it; execute one run of a sweep and record its status."""

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

STATUS_FOLDER = ".notes"  # in a sweep's folder: holds a file for each run that was refused, failed or was stopped
STOP_FILE = ".halt"  # in a sweep's folder: exists while the sweep asks its runs to stop
POLL_SECONDS = 0.5  # time between two checks of the stop file


class ProcessResult(NamedTuple):
    """A process's exit code (-N if signal number N killed it) and the names of the signals forwarded to it."""

    code: int
    signals: list[str]


def run_script(script: Path, arguments: Sequence[str], output: Path) -> ProcessResult:
    """Run a Python script until it exits. Its standard output and standard error are appended to the file `output`.

    Signals to this process are forwarded to the script's process (see `forwarded_signals`). The script's process is
    started in a new session of the operating system. In this process's session, it would receive each Ctrl-C twice,
    once from the terminal and once forwarded, and a second Ctrl-C ends a run without a checkpoint.
    """
    with open(output, "ab") as file:
        command = [sys.executable, str(script), *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        with forwarded_signals(process.send_signal) as received:
            return ProcessResult(process.wait(), received)


@contextlib.contextmanager
def forwarded_signals(send: Callable[[int], object]) -> Iterator[list[str]]:
    """Create a context in which SIGINT, SIGTERM and SIGHUP are passed to `send` instead of the former handlers.

    `send` is called with the number of the signal. The context manager yields a list to which the name of each received
    signal is appended. A signal that the process ignores, such as SIGHUP under nohup, stays ignored. Python can set
    signal handlers only in its main thread, so in any other thread no signal is forwarded.
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
    """The state of a run that is not done, and the reason in a sentence.

    The state is "refused" (a user's mistake), "failed" (any other error), "stopped" (a signal or Ctrl-C), or "open"
    (not begun, still running, or killed).
    """

    state: str
    why: str


NO_STATUS = RunStatus("open", "it has not begun, still runs, or was killed.")


class SweepJob:
    """A callable that a Hydra launcher calls for each run, in the sweep's process or, after pickling, in another."""

    def __init__(
        self,
        job: Job,
        *,
        in_sweep_process: bool,
        stop_file: "StopFile | None" = None,
        working_folder: str | None = None,
    ):
        """Store the arguments.

        `job`: the function that trains, called with (config, run_dir).
        `in_sweep_process`: whether all runs take place in the sweep's own process.
        `stop_file`: the file that asks runs to stop, if they take place in child processes that joblib starts;
            otherwise None.
        `working_folder`: the folder to append to sys.path, so that the packages in `trust` can be imported from it;
            None if the command line has no trust=.
        """
        self.job, self.in_sweep_process, self.stop_file = job, in_sweep_process, stop_file
        self.working_folder = working_folder

    def __call__(self, composed: DictConfig) -> float | None:
        """Run the job in the run's folder; returns the value that the job returns, or None if the run did not finish.

        An error is not raised, but printed and written to the run's status file; if the folder is in use by another
        process, the error is only printed. In the sweep's own process, a signal raises Stopped or KeyboardInterrupt,
        which ends the sweep. In another process, a signal ends only this run, and nothing is raised: after an
        exception, the launcher would kill the other runs while they write checkpoints.
        """
        if self.working_folder and self.working_folder not in sys.path:
            sys.path.append(self.working_folder)
        console.guard()  # a process that a launcher started has unguarded streams
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
        except InUseError as error:  # another process holds the run's folder; if it is a sweep, it writes the status
            print(f"{folder}: {error}", file=sys.stderr, flush=True)
        except UserError as error:
            _write_status(folder, RunStatus("refused", str(error)))
            print(f"{folder}: {error}", file=sys.stderr, flush=True)
        except Exception as error:
            _write_status(folder, RunStatus("failed", f"{type(error).__name__}: {error}".partition("\n")[0]))
            print(f"{folder}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return None


class StopFile(NamedTuple):
    """A request to a sweep's child processes to stop.

    The request is made when the file `path` appears, or when the sweep's process ends. `sweep_pid` is the id of the
    sweep's process.
    """

    path: Path
    sweep_pid: int

    def stop_requested(self) -> bool:
        """Whether this process, a child of the sweep's process, must stop."""
        return self.path.exists() or self.is_orphaned()

    def is_orphaned(self) -> bool:
        """Whether the sweep's process, the parent of this one, has ended."""
        return os.getppid() != self.sweep_pid


StopFileContext = contextlib.AbstractContextManager[tuple[StopFile | None, list[str]]]


@contextlib.contextmanager
def signals_to_stop_file(sweep: Path) -> Iterator[tuple[StopFile, list[str]]]:
    """Create a context in which a signal to the sweep's process creates the stop file, which its child processes poll.

    Ctrl-C in a terminal and `kill` have the same effect: each run writes a checkpoint, and the sweep waits for all
    runs. A second Ctrl-C raises KeyboardInterrupt, which ends the sweep at once. The context manager yields the stop
    file and a list to which the name of each received signal is appended.
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
    """Create a context in which a request by `stop_file` interrupts the run in the same way as SIGTERM.

    Ctrl-C is ignored in this process, because the sweep's process turns it into the stop file. A terminal sends Ctrl-C
    to both processes, and it may arrive here before the run has set its signal handlers.
    """
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(POLL_SECONDS):
            if stop_file.stop_requested():
                interrupt_main(signal.SIGTERM)  # has no effect before the run has set its handler

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
    """Map the folder of each run that has a status file in the sweep's folder `sweep` to the run's status."""
    return {sweep / file.stem: status_of(sweep / file.stem) for file in sorted((sweep / STATUS_FOLDER).glob("*.json"))}


def status_of(folder: Path) -> RunStatus:
    """Return the status of the unfinished run in `folder`; NO_STATUS if it has no readable status file."""
    try:
        return RunStatus(**json.loads(_status_file(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return NO_STATUS


def _write_status(folder: Path, status: RunStatus) -> None:
    file = _status_file(folder)
    with contextlib.suppress(OSError):  # a full disk, for instance, must not end the other runs
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(status._asdict(), ensure_ascii=False))


def _status_file(folder: Path) -> Path:
    return folder.parent / STATUS_FOLDER / f"{folder.name}.json"
