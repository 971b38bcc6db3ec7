"""Processes of runs: start them, hand signals on, wait; and a run of a sweep, wherever its launcher puts it."""

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
from common.files.run_folder import Job

STATUS_FOLDER = ".notes"  # in the sweep's folder: why a run of it is not done
STOP_FILE = ".halt"  # in the sweep's folder while its runs are to stop
POLL_SECONDS = 0.5  # between a run's looks at it


class ProcessResult(NamedTuple):
    """How a process ended: its exit code (minus the number of a signal that killed it), and the signals handed on."""

    code: int
    signals: list[str]


def run_script(script: Path, arguments: Sequence[str], output: Path) -> ProcessResult:
    """Run a Python script to its end, with what it prints appended to `output`.

    It is in a session of its own, since a terminal would send it Ctrl-C, too, and the second one stops at once.
    """
    with open(output, "ab") as file:
        command = [sys.executable, str(script), *arguments]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        with forwarded_signals(process.send_signal) as received:
            return ProcessResult(process.wait(), received)


@contextlib.contextmanager
def forwarded_signals(send: Callable[[int], object]) -> Iterator[list[str]]:
    """While inside, signals that ask for an end go to `send`; yields the list of their names.

    Ignored signals stay ignored (nohup), and only Python's main thread may take them over.
    """
    received: list[str] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        send(number)

    numbers = {getattr(signal, name, signal.SIGTERM) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
    numbers = {number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, hand_on) for number in numbers if main}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunStatus(NamedTuple):
    """What became of a run that is not done: refused (a mistake of the user), failed, stopped, or open; and why."""

    state: str
    why: str


NO_STATUS = RunStatus("open", "it has not begun, still runs, or was killed.")


class SweepJob:
    """What a launcher calls for each run, here or in another process, to which it travels pickled."""

    def __init__(self, job: Job, *, here: bool, halt: "StopFile | None" = None):
        """`here`: runs follow one another in the sweep's own process; `halt`: they are children of it."""
        self.job, self.here, self.halt = job, here, halt

    def __call__(self, composed: DictConfig) -> float | None:
        """Run the job in its folder; what goes wrong is written beside it, so that the others go on.

        In the sweep's own process a stop ends the sweep. In another it ends this run alone: raised there, it would make
        the launcher kill the others while they save.
        """
        config = plain_config(composed)
        update_names(config)
        folder = Path(config["run_dir"])
        if self.here:
            return self._run(config, folder)
        if self.halt and self.halt.stop_requested():
            return None
        try:
            with _stopped_by(self.halt) if self.halt else contextlib.nullcontext():
                return self._run(config, folder)
        except (Stopped, KeyboardInterrupt) as stop:
            _write_status(folder, RunStatus("stopped", str(stop) or "Stopped by Ctrl-C."))
            return None
        finally:
            if self.halt and self.halt.is_orphaned():
                os._exit(0)  # else joblib's worker waits for five minutes for more to do

    def _run(self, config: dict[str, Any], folder: Path) -> float | None:
        try:
            return run_folder.run_in(self.job, config, folder)
        except UserError as error:
            _write_status(folder, RunStatus("refused", str(error)))
            print(f"{folder}: {error}", file=sys.stderr, flush=True)
        except Exception as error:
            _write_status(folder, RunStatus("failed", f"{type(error).__name__}: {error}".partition("\n")[0]))
            print(f"{folder}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return None


class StopFile(NamedTuple):
    """What stops the children of a sweep's process: a file, or the end of that process."""

    path: Path
    sweep: int  # the process

    def stop_requested(self) -> bool:
        """Asked by a child: whether to stop."""
        return self.path.exists() or self.is_orphaned()

    def is_orphaned(self) -> bool:
        """Asked by a child: whether the sweep's process is gone."""
        return os.getppid() != self.sweep


StopFileContext = contextlib.AbstractContextManager[tuple[StopFile | None, list[str]]]


@contextlib.contextmanager
def signals_to_stop_file(sweep: Path) -> Iterator[tuple[StopFile, list[str]]]:
    """Signals to a sweep whose runs go on in processes of its own become a file that they look for.

    A terminal's Ctrl-C and `kill` then end alike: each run saves, and is waited for. A second Ctrl-C ends all at once.
    """
    halt = StopFile(sweep / STOP_FILE, os.getpid())
    halt.path.unlink(missing_ok=True)  # of a stop long ago

    def stop(number: int) -> None:
        if received.count("SIGINT") > 1:
            raise KeyboardInterrupt
        halt.path.touch()
        os.write(2, b"\nStopping: each run ends its step and saves; Ctrl-C once more stops at once.\n")

    try:
        with forwarded_signals(stop) as received:
            yield halt, received
    finally:
        halt.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _stopped_by(halt: StopFile) -> Iterator[None]:
    """While inside, `halt` asks this run to stop as SIGTERM would.

    Ctrl-C reaches this process as well, perhaps before the run takes signals down: it is left to the sweep.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            if halt.stop_requested():
                interrupt_main(signal.SIGTERM)  # does nothing while nobody takes the signal down

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def clear_status(folder: Path) -> None:
    """Take away the note on the run in `folder`, which is tried again."""
    _status_file(folder).unlink(missing_ok=True)


def statuses_in(sweep: Path) -> dict[Path, RunStatus]:
    """The notes on the runs of a sweep that are not done, by the runs' folders."""
    return {sweep / file.stem: status_of(sweep / file.stem) for file in sorted((sweep / STATUS_FOLDER).glob("*.json"))}


def status_of(folder: Path) -> RunStatus:
    """The note on the run in `folder`, which is not done."""
    try:
        return RunStatus(**json.loads(_status_file(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return NO_STATUS


def _write_status(folder: Path, note: RunStatus) -> None:
    file = _status_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(note._asdict(), ensure_ascii=False), encoding="utf-8")


def _status_file(folder: Path) -> Path:
    return folder.parent / STATUS_FOLDER / f"{folder.name}.json"
