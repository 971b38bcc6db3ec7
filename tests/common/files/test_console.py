"""A reader that leaves, or a full disk behind the console, takes no result with it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys
from pathlib import Path
from common.files.log import Log

with Log(Path(sys.argv[1]), True) as log:
    for i in range(5):
        log.info(f"line {i}")
"""


def test_a_log_goes_on_without_its_reader(tmp_path: Path) -> None:
    """As in `train.py ... | head -1`."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition("  ")[2] for line in lines] == [f"line {i}" for i in range(5)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_goes_on_when_the_disk_behind_its_console_is_full(tmp_path: Path) -> None:
    """As in `train.py ... > log.txt`; that the text was lost is Python's own message at exit."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with open("/dev/full", "w") as full:
        subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.partition("  ")[2] for line in lines] == [f"line {i}" for i in range(5)]
