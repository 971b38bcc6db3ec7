"""The console command `triptych`, which runs train.py, evaluate.py, predict.py and the scripts from any folder.

After installation from a wheel, these files are in site-packages. With the command, the user does not need their paths:
`triptych train model=vit` runs train.py.
"""

import ast
import importlib.util
import sys
from pathlib import Path

from common.config.check import did_you_mean
from common.config.compose import CONFIGS
from common.machine import console

ROOT = CONFIGS.parent  # the folder of the doors: the clone's root, or site-packages
DOORS = ("train", "evaluate", "predict")
PREFIX = "triptych "  # `main` sets sys.argv[0] to this plus the command's name


def main() -> None:
    """Run the door or script that the first argument names, as `__main__`, and pass it the other arguments.

    Without arguments, or with --help, the list of commands is printed. An unknown command ends with exit code 2.
    """
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
    sys.modules["__main__"] = module  # multiprocessing looks it up to start a spawned process
    spec.loader.exec_module(module)


def commands() -> dict[str, Path]:
    """Map the name of each command to its file. The commands are the doors and the files in scripts/.

    A command has the name of its file without .py, with hyphens instead of underscores. readme_figure.py is not a
    command.
    """
    scripts = sorted(file for file in (ROOT / "scripts").glob("*.py") if file.stem not in ("__init__", "readme_figure"))
    return {file.stem.replace("_", "-"): file for file in (*(ROOT / f"{door}.py" for door in DOORS), *scripts)}


def own_name(door: str | None = None) -> list[str]:
    """Return the words of the command that started this process, without its arguments.

    They are ["python", FILE] or ["triptych", NAME]. FILE is the path as typed, or `door`.py if `door` is given.
    """
    return sys.argv[0].split() if sys.argv[0].startswith(PREFIX) else ["python", f"{door}.py" if door else sys.argv[0]]


def to_run(file: str) -> str:
    """Return the command that runs the door or script `file`, a path such as "train.py".

    The command is "triptych train" if the command `triptych` started this process, and "python train.py" otherwise.
    """
    is_triptych = sys.argv[0].startswith(PREFIX)
    return PREFIX + Path(file).stem.replace("_", "-") if is_triptych else f"python {file}"


def _usage(files: dict[str, Path]) -> str:
    width = max(map(len, files))
    lines = [f"  {name:{width}}  {_summary(file)}\n" for name, file in files.items()]
    return f"usage: triptych COMMAND ...\n\n{''.join(lines)}\ntriptych COMMAND --help prints the arguments.\n"


def _summary(file: Path) -> str:
    """Return the first line of a file's docstring, without the example in backticks that may follow a colon.

    The file is parsed, but not executed.
    """
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].partition(": `")[0].rstrip(".")


def _refuse(name: str, files: dict[str, Path]) -> int:
    print(f"triptych {name}: there is no such command{did_you_mean(name, files)}", file=sys.stderr)
    return 2
