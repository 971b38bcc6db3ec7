"""Ctrl-C ends a command in one line at any time, and what the system refuses ends a script in one sentence."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common.cli import start

ROOT = Path(__file__).parents[3]

# Runs a file, or the command triptych, and interrupts it at the import of a module.
INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            raise KeyboardInterrupt
_, file, module, *arguments = sys.argv
sys.meta_path.insert(0, Interrupt())
sys.argv = [file, *arguments]
if file == "triptych":
    from common.cli.start import triptych
    triptych()
else:
    runpy.run_path(file, run_name="__main__")
"""


@pytest.mark.parametrize("module", ["common.cli.main", "hydra", "omegaconf", "common.config.check"])
@pytest.mark.parametrize("file", ["train.py", "evaluate.py", "predict.py", "triptych"])
def test_ctrl_c_while_a_command_is_being_imported_is_one_line(file: str, module: str) -> None:
    words = [file, module, "train"] if file == "triptych" else [str(ROOT / file), module]
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words, "model=vit"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "Stopped by Ctrl-C.\n")


def end_of(main: Callable[[], int]) -> int:
    """The exit code of a script whose work is `main`."""
    with pytest.raises(SystemExit) as end:
        start.script(main)
    return int(str(end.value.code))


def test_a_script_ends_with_the_code_of_its_main_and_after_ctrl_c_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert [end_of(lambda: 0), end_of(lambda: 1)] == [0, 1] and capsys.readouterr().err == ""
    assert end_of(interrupted) == 130 and capsys.readouterr().err == "Stopped by Ctrl-C.\n"


def test_what_the_system_refuses_to_a_script_is_one_sentence_and_a_defect_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_long() -> int:
        return Path("n" * 300).stat().st_size

    def missing() -> int:
        return Path("none").stat().st_size

    assert end_of(too_long) == 2
    assert "longer than the file system takes" in (err := capsys.readouterr().err) and err.count("\n") == 1
    with pytest.raises(FileNotFoundError):
        start.script(missing)


@pytest.mark.parametrize("script", ["export.py", "verify_import.py", "compare.py", "average_checkpoints.py"])
def test_a_folder_without_permission_is_one_sentence_in_scripts(
    script: str, tmp_path: Path, without_privileges: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is about the file that is read, and not about the output."""
    (tmp_path / "locked").mkdir(mode=0o000)
    file = tmp_path / "locked/x.pt"
    arguments = {"compare.py": [str(file)], "average_checkpoints.py": [str(file), str(file), "--output=x.pt"]}
    module = __import__(f"scripts.{script.removesuffix('.py')}", fromlist=["main"])
    with without_privileges():  # type: ignore[attr-defined]
        assert end_of(lambda: module.main(arguments.get(script, [f"checkpoint={file}"]))) == 2
    err = capsys.readouterr().err
    assert "locked" in err and "Permission denied" in err and err.count("\n") == 1
