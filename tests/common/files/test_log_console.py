"""No result is lost when standard output is a closed pipe, or a file on a full disk."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
from pathlib import Path
from common.files.log import Log
from common.machine import console

console.guard()
with Log(Path(sys.argv[1]), True) as log:
    for i in range(5):
        log.info(f"line {i}")
"""


def assert_all_logged(file: Path, reason: str, message: str) -> None:
    """Standard error and the log say once that standard output is lost, and the log has all lines."""
    warning = f"Warning: standard output cannot be written ({reason}); the run goes on, and logs to"
    assert message == f"{warning} {file}.\n"
    lines = [line.partition("  ")[2] for line in file.read_text().splitlines()]
    assert lines == ["line 0", f"{warning} this file.", *(f"line {i}" for i in range(1, 5))]


def test_a_log_goes_on_without_its_reader(tmp_path: Path) -> None:
    """As in `train.py ... | head -1`."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        message = process.stderr.read().decode()
        assert process.wait() == 0
    assert_all_logged(tmp_path / "train.log", "Broken pipe", message)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_goes_on_when_the_disk_behind_its_console_is_full(tmp_path: Path) -> None:
    """As in `train.py ... > log.txt`."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with open("/dev/full", "w") as full:
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, check=True)
    assert_all_logged(tmp_path / "train.log", "No space left on device", process.stderr.decode())
