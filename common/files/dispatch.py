"""Send a run's numbers and pictures to its loggers.

No logger can stop the run or delay it for long.
"""

import math
import queue
import sys
import threading
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from common.files.loggers import Description, Logger, LoggerName, MLflow, TensorBoard, Trackio, WandB

CLASSES: dict[str, Callable[[Description], Logger]] = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}
START_SECONDS = 60  # the longest wait for a logger to start; its import alone may take some seconds
PUT_SECONDS = 10  # the longest wait for a place in the queue of a logger's calls
END_SECONDS = 60  # the longest wait for a logger to close
MAX_WAITING = 100  # maximum number of calls that wait in the queue of a logger

Sent = Mapping[tuple[int, str], float | None]  # (step, name) -> the number sent; None if it must not be sent again


class LoggerFailure(Exception):
    """A logger in a thread does not work; the message says why.

    The class is not derived from OSError, because `Dispatch` tries a logger again after an OSError.
    """


class Threaded:
    """A logger whose calls are made in order by a thread, while the run goes on."""

    def __init__(self, logger: Callable[[Description], Logger], run: Description, sent: Sent):
        """Construct `logger(run)` in the thread; raises LoggerFailure if that fails or takes too long.

        `sent` holds the numbers that an earlier start of the run sent to the logger for steps after the checkpoint from
        which the run now resumes. The run will log these steps again.
        """
        self.location = ""  # where the user can look at the run
        self._sent = sent
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._calls: queue.Queue[Callable[[Logger], None] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, args=(logger, run), daemon=True)
        self._thread.start()
        in_time = self._started.wait(START_SECONDS)
        self._raise_error()
        if not in_time:
            raise LoggerFailure(f"it did not start within {START_SECONDS} seconds")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers that the logger does not have yet, or has with another value."""
        unknown = math.nan  # which no number equals
        new = {name: x for name, x in values.items() if self._sent.get((step, name), unknown) not in (x, None)}
        if new:
            self._put(lambda logger: logger.numbers(step, new))

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Send images, unless the logger already has numbers of `step` under `name`, such as val/AP under val."""
        if not any(sent == step and number.startswith(f"{name}/") for sent, number in self._sent):
            self._put(lambda logger: logger.picture(step, name, images))

    def flush(self) -> None:
        """Do nothing: the thread makes all calls as soon as it can."""

    def reopen(self) -> None:
        """Do nothing: a logger in a thread is not tried again after a failure."""

    def close(self, finished: bool) -> None:
        """Wait until the logger has made all calls and is closed; raises LoggerFailure if that fails or takes too long.

        `finished` is False if a signal or an error ended the run.
        """
        self._put(lambda logger: logger.close(finished))
        self._put(None)
        self._thread.join(END_SECONDS)
        self._raise_error()
        if self._thread.is_alive():
            raise LoggerFailure(f"it did not end within {END_SECONDS} seconds")

    def _put(self, call: Callable[[Logger], None] | None) -> None:
        self._raise_error()
        try:
            self._calls.put(call, timeout=PUT_SECONDS)
        except queue.Full:
            raise LoggerFailure(f"{MAX_WAITING} calls are waiting") from None

    def _work(self, open_logger: Callable[[Description], Logger], run: Description) -> None:
        try:
            logger = open_logger(run)
            self.location = getattr(logger, "location", "")
            if getattr(logger, "lost_rows", False):
                self._sent = {}
            self._started.set()
            while (call := self._calls.get()) is not None:
                call(logger)
        except BaseException as error:  # libraries may also raise SystemExit
            self._error = error
            self._started.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise LoggerFailure(_describe(self._error))


class Dispatch:
    """The loggers of a run. If a logger fails, a warning names it, and the run goes on without this logger."""

    def __init__(self, warn: Callable[[str], None]):
        """Start without loggers. `warn` is a function that prints and logs a sentence."""
        self._warn = warn
        self._loggers: dict[str, TensorBoard | Threaded] = {}
        self._paused: set[str] = set()  # loggers whose file could not be written; `flush` resumes them

    def open(self, names: Sequence[LoggerName], run: Description, sent: Sent) -> dict[str, str]:
        """Open the loggers `names`. `sent` is explained in `Threaded`.

        Returns a dict from each opened logger, except TensorBoard, to the place where the user can look at the run.
        TensorBoard has no such place, because it reads the run's own folder.
        """
        for name in dict.fromkeys(names):
            try:
                if name == "tensorboard":
                    self._loggers[name] = TensorBoard(run)
                else:
                    self._loggers[name] = Threaded(CLASSES[name], run, sent if run.identity(name) else {})
            except Exception as error:
                self._leave_out(name, "at its start", error)
        return {name: logger.location for name, logger in self._loggers.items() if isinstance(logger, Threaded)}

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Send the finite numbers among `values` to all loggers."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._call_all(f"at step {step}", lambda logger: logger.numbers(step, finite))

    def picture(self, step: int, name: str, images: Tensor) -> None:
        """Send images uint8 (B, 3, H, W) to all loggers."""
        self._call_all(f"at step {step}", lambda logger: logger.picture(step, name, images))

    def flush(self) -> None:
        """Write TensorBoard's events to the disk, and use loggers again that were paused after a failed write."""
        self._paused.clear()
        self._call_all("at a checkpoint", lambda logger: logger.flush())

    def close(self, finished: bool) -> None:
        """Close all loggers; `finished` is False if a signal or an error ended the run.

        Only TensorBoard can be used afterwards; it then opens a new file.
        """
        self._paused.clear()
        self._call_all("at its end", lambda logger: logger.close(finished))
        self._loggers = {name: logger for name, logger in self._loggers.items() if name == "tensorboard"}

    def _call_all(self, when: str, call: Callable[[TensorBoard | Threaded], None]) -> None:
        for name in [name for name in self._loggers if name not in self._paused]:
            try:
                call(self._loggers[name])
            except OSError as error:  # only TensorBoard raises it; `Threaded` raises LoggerFailure instead
                self._paused.add(name)
                self._loggers[name].reopen()
                reason = f"{name}'s events cannot be written ({error.strerror}) and are dropped."
                # `warn` is not used, because it writes to train.log, for which the disk may have no room either.
                print(f"Warning: {reason}", file=sys.stderr, flush=True)
            except Exception as error:
                del self._loggers[name]
                self._leave_out(name, when, error)

    def _leave_out(self, name: str, when: str, error: Exception) -> None:
        reason = error if isinstance(error, LoggerFailure) else _describe(error)
        self._warn(f"{name} failed {when} ({reason}); the run goes on without it, and metrics.jsonl holds all numbers.")


def _describe(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
