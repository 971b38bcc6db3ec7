"""Signals are recorded and agreed on, and earlier handlers are restored and called."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from common.errors import Stopped
from common.machine.signals import SECOND_CTRL_C_DELAY, SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    yield
    assert handlers == {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_only_recorded(name: str) -> None:
    with StopSignals() as stop:
        assert not stop.requested()
        send(name)
        send("SIGTERM")
        assert stop.requested() and stop.received == list(dict.fromkeys([name, "SIGTERM"]))


@pytest.mark.parametrize(("names", "code"), [(["SIGINT"], 130), (["SIGTERM"], 143), (["SIGINT", "SIGUSR1"], 143)])
def test_the_exit_code_tells_ctrl_c_from_the_others(names: list[str], code: int) -> None:
    with StopSignals() as stop:
        for name in names:
            send(name)
        error = stop.stopped_error("after step 3 of 9")
    assert error.code == code and str(error) == f"Stopped by {' and '.join(names)} after step 3 of 9."


def test_a_second_ctrl_c_interrupts_at_once_and_a_second_sigterm_does_not() -> None:
    with StopSignals() as stop:
        send("SIGTERM")
        send("SIGTERM")
        send("SIGINT")
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
    assert stop.received == ["SIGTERM", "SIGINT"]


def test_a_forked_worker_records_nothing() -> None:
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            for name in SIGNALS:
                send(name)
            send("SIGINT")  # a second one does not interrupt either
            os._exit(len(stop.received))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not stop.received


def test_the_context_ends_at_once_while_a_forked_worker_lives() -> None:
    start = time.monotonic()
    with StopSignals(grace=60):
        worker = os.fork()
        if worker == 0:
            time.sleep(20)
            os._exit(0)
    seconds = time.monotonic() - start
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert seconds < 10


def test_ctrl_c_in_a_forked_worker_is_not_counted_in_its_parent() -> None:
    """A terminal sends Ctrl-C to both."""
    with StopSignals() as stop:
        child = os.fork()
        if child == 0:
            for _ in range(3):
                send("SIGINT")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        send("SIGINT")
        time.sleep(SECOND_CTRL_C_DELAY + 0.5)  # in which a second one would end this process
        assert stop.received == ["SIGINT"]


def test_the_earlier_wakeup_descriptor_is_restored_and_no_thread_is_left() -> None:
    threads = threading.active_count()
    with StopSignals(grace=60.0):
        send("SIGTERM")
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_ignored_signals_stay_ignored() -> None:
    earlier_handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopSignals() as stop:
            send("SIGHUP")
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, earlier_handler)


def test_an_earlier_handler_is_called_after_the_stop_and_not_before() -> None:
    """submitit's handler puts the job back into the queue and raises SystemExit."""
    calls: list[int] = []

    def requeue(number: int, frame: object) -> None:
        calls.append(number)
        raise SystemExit(-1)

    earlier_handler = signal.signal(signal.SIGUSR2, requeue)
    try:
        with StopSignals():
            send("SIGUSR2")  # a run that finishes: no handler is called
        assert not calls
        with pytest.raises(SystemExit), StopSignals() as stop:
            send("SIGUSR2")
            assert not calls
            raise stop.stopped_error("after step 3 of 9")
        assert calls == [signal.SIGUSR2]
        with pytest.raises(Stopped), StopSignals() as stop:
            send("SIGTERM")
            raise stop.stopped_error("after step 3 of 9")
        assert calls == [signal.SIGUSR2], "only for the signal received"
    finally:
        signal.signal(signal.SIGUSR2, earlier_handler)
