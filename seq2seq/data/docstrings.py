"""The documentation strings of Python's standard library: English text that is present on every computer.

The source files of the library that runs this program are parsed, not imported. Their text depends on Python's version,
so results can be compared only between equal versions.
"""

import ast
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path

from common.errors import UserError
from common.machine.seeds import mix
from common.task import Split

# Modules that Linux distributions package separately, or that newer versions of Python lack; without them, the text
# depends less on the installation. The strings of `encodings` are lists of code tables, not English.
LEFT_OUT = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv"}
TESTS = {"test", "tests"}  # folders that not every installation has
HELD_OUT: tuple[Split, ...] = ("val", "test")  # each gets one of `SHARES` parts of the modules
SHARES = 10


def docstrings(split: Split) -> list[str]:
    """The documentation of each module of `split`, sorted by the modules' names.

    An element holds the documentation strings of a module and of its classes, methods and functions, in the order of
    the file, without indentation and with an empty line between two of them. A string that occurs several times is kept
    only where it occurs first, so no string is in two splits.

    The split is chosen by a hash of the name of the top-level module, without an underscore or `_py` in front. So all
    files of a package are in the same split, as are `_pyio` and `io`.

    Raises UserError if the installation has no source files.
    """
    return list(_all_documents()[split])


def origin() -> str:
    """The name of the text with Python's version, for summaries."""
    return f"the documentation strings of the standard library of Python {python_version()}"


def python_version() -> str:
    """The version of Python whose library is read, such as "3.13.1"."""
    return platform.python_version()


@cache
def _all_documents() -> dict[Split, tuple[str, ...]]:
    folder = Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    documents: dict[Split, list[str]] = {"train": [], "val": [], "test": []}
    for module in sorted(sys.stdlib_module_names - LEFT_OUT, key=_public_name):
        for path in _source_files(folder, module):
            strings = [string for string in dict.fromkeys(_strings(path)) if string not in seen]
            seen.update(strings)
            if strings:
                documents[_split_of(module)].append("\n\n".join(strings))
    if not documents["train"]:
        raise UserError(
            f"{folder} holds no source files of Python's standard library, whose documentation is the default text; "
            "give data.train=FILE, a text file in UTF-8."
        )
    return {split: tuple(parts) for split, parts in documents.items()}


def _public_name(module: str) -> str:
    return module.removeprefix("_py").lstrip("_") or module


def _split_of(module: str) -> Split:
    share = mix("docstrings", _public_name(module)) % SHARES
    return HELD_OUT[share] if share < len(HELD_OUT) else "train"


def _source_files(folder: Path, module: str) -> Iterator[Path]:
    """The source files of a module or package, sorted, without those of tests; none for a module written in C."""
    if (file := folder / f"{module}.py").is_file():
        yield file
    package = folder / module
    for path in sorted(package.rglob("*.py")):
        if not TESTS & {*path.relative_to(package).parts[:-1]}:
            yield path


def _strings(path: Path) -> Iterator[str]:
    """The documentation strings of a source file, in order; none if the file cannot be read or parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as the SyntaxWarning about an escape that Python will refuse
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    yield from _documentation(tree)


def _documentation(node: ast.AST) -> Iterator[str]:
    """The documentation strings of a module or class and of what it defines, also under `if` and `try`."""
    body = getattr(node, "body", [])
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = cleandoc(ast.get_docstring(node, clean=False) or "").strip()
        if text:
            yield text
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not isinstance(body, list):
        return
    for child in [*body, *getattr(node, "handlers", []), *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]:
        yield from _documentation(child)
