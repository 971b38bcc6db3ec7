"""No failure of the console raises: a reader that has gone, a full disk, a terminal or a stream that is closed."""

import io
import os
import pty
import select
import subprocess
import sys
import tty
from pathlib import Path

import pytest

from common.machine import console

ROOT = Path(__file__).parents[3]
PRINT = """
import sys
from common.machine import console
console.guard()
for number in range(5):
    print("line", number, flush=True)
print("not flushed")
failures = {name: type(error).__name__ for name, error in console.failures().items()}
open("result.txt", "w").write(f"{failures} {console.is_read()}")
sys.exit(console.exit_code(0))
"""
LOST = (
    "standard output cannot be written (No space left on device), and the rest of what was printed is lost; make room"
)


def printed_to(folder: Path, shell: str) -> str:
    """What console reports of a process that prints, and the exit code of the shell's command with `program` in it."""
    program = f"{sys.executable} -c '{PRINT}'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = shell.replace("PROGRAM", program)
    completed = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=folder, env=environment, capture_output=True, text=True
    )
    return f"{(folder / 'result.txt').read_text()} {completed.returncode} {completed.stderr}"


def test_a_full_disk_and_a_reader_that_has_gone_are_reported_and_do_not_raise(tmp_path: Path) -> None:
    assert (
        printed_to(tmp_path, "PROGRAM > /dev/full")
        == f"{{'standard output': 'OSError'}} True 2 {LOST}, and repeat the command.\n"
    )
    assert printed_to(tmp_path, "PROGRAM | true") == "{'standard output': 'BrokenPipeError'} False 0 "


def test_a_stream_that_was_closed_before_the_start_does_not_raise(tmp_path: Path) -> None:
    assert printed_to(tmp_path, "PROGRAM >&- 2>&-") == "{} True 0 "
    assert "line" not in (tmp_path / "result.txt").read_text(), "the file has not taken the descriptor of the stream"


CONTROLS = "\x1b[2J\x07\x7f\x9b31m\r\u202egnp.jpg"
ESCAPED = r"\x1b[2J\x07\x7f\x9b31m\r\u202egnp.jpg"


def test_a_terminal_gets_no_control_characters_but_those_of_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    tty.setraw(child)
    with open(child, "w", encoding="utf-8") as terminal, open(parent, "rb") as screen:
        monkeypatch.setattr(sys, "stdout", terminal)
        console.guard()
        print(f"a\tb {CONTROLS}", flush=True)
        sys.stdout.write("\r 10%|\u2588")
        sys.stdout.flush()
        expected = f"a\tb {ESCAPED}\n\r 10%|\u2588"
        assert screen.read(len(expected.encode())).decode() == expected  # a terminal may deliver it in pieces


def test_answers_in_a_file_are_written_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, expected in (("stdout", CONTROLS), ("stderr", ESCAPED)):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as file:
            monkeypatch.setattr(sys, name, file)
            console.guard()
            print(CONTROLS, file=getattr(sys, name), flush=True)
        assert (tmp_path / name).read_bytes().decode() == f"{expected}\n"


def test_a_pipe_that_another_program_made_non_blocking_gets_all_that_is_printed() -> None:
    script = "import os; from common.machine import console; console.guard(); os.set_blocking(1, False); "
    command = [sys.executable, "-c", f"{script} print('x' * 1_000_000, flush=True)"]
    output = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True)
    assert len(output.stdout) == 1_000_001


def test_a_print_of_any_name_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "ascii", "latin-1"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        console.guard()
        print("caf\udce9 你", flush=True)
        assert written.getvalue().startswith(b"caf\\udce9 ")


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> int:
    """A copy of descriptor 2, which is restored after the test."""
    copy = os.dup(2)
    yield copy
    os.dup2(copy, 2)
    os.close(copy)


def test_a_notification_neither_raises_nor_waits(stderr: int) -> None:
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    console.notify("first")
    assert os.read(reader, 100) == b"first"
    os.set_blocking(writer, False)
    while select.select([], [writer], [], 0)[1]:
        os.write(writer, bytes(4096))  # until the pipe is full
    os.set_blocking(writer, True)
    console.notify("second")
    os.close(reader)
    console.notify("third")
    os.close(2)
    console.notify("fourth")
    os.close(writer)
