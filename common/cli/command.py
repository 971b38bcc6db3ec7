"""The console command `triptych`, which runs train.py, evaluate.py, predict.py and scripts/ from any folder.

An installed wheel needs this command (`triptych train model=vit`), because these files lie among the installed
packages.
"""

import ast
import importlib.util
import sys
from pathlib import Path

from common.config.check import did_you_mean
from common.config.compose import CONFIGS
from common.machine import console

ROOT = CONFIGS.parent  # the folder of the doors, in a clone and in an installed wheel
DOORS = ("train", "evaluate", "predict")
PREFIX = "triptych "  # of sys.argv[0] after `main` has replaced it


def main() -> None:
    """Run the door or script that the first argument names, as the main module, with the other arguments."""
    console.guard()
    files = commands()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_usage(files), end="")
        sys.exit(console.exit_code(0))
    if name not in files:
        sys.exit(_refuse(name, files))
    sys.argv = [PREFIX + name, *sys.argv[2:]]
    spec = importlib.util.spec_from_file_location("__main__", files[name])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = module  # spawned worker processes look for it
    spec.loader.exec_module(module)


def commands() -> dict[str, Path]:
    """The file of each command: the doors, and the scripts, with hyphens for underscores in their names."""
    scripts = sorted(file for file in (ROOT / "scripts").glob("*.py") if file.stem not in ("__init__", "readme_figure"))
    return {file.stem.replace("_", "-"): file for file in (*(ROOT / f"{door}.py" for door in DOORS), *scripts)}


def own_name(door: str | None = None) -> list[str]:
    """The words of the command that started this process, without arguments: ["python", FILE] or ["triptych", NAME].

    FILE is the path as typed, or `door`.py if `door` is given.
    """
    return sys.argv[0].split() if sys.argv[0].startswith(PREFIX) else ["python", f"{door}.py" if door else sys.argv[0]]


def to_run(file: str) -> str:
    """How the user starts another door or script: "triptych train" if this command was, else "python train.py"."""
    is_triptych = sys.argv[0].startswith(PREFIX)
    return PREFIX + Path(file).stem.replace("_", "-") if is_triptych else f"python {file}"


def _usage(files: dict[str, Path]) -> str:
    width = max(map(len, files))
    lines = [f"  {name:{width}}  {_summary(file)}\n" for name, file in files.items()]
    return f"usage: triptych COMMAND ...\n\n{''.join(lines)}\ntriptych COMMAND --help prints the arguments.\n"


def _summary(file: Path) -> str:
    """The first sentence of a file's docstring, read without running the file."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition(": `")[0].rstrip(".")


def _refuse(name: str, files: dict[str, Path]) -> int:
    print(f"triptych {name}: there is no such command{did_you_mean(name, files)}", file=sys.stderr)
    return 2
