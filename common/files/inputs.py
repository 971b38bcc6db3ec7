"""The files that a user's input names: a file, a folder with all folders in it, a pattern such as photos/*.jpg, or "-".

A path that exists takes precedence over its reading as a pattern.
"""

import glob
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from common.data.images import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from common.data.opening import open_regular
from common.errors import UserError
from common.files.names import answer_name

Sample = TypeVar("Sample")

STANDARD_INPUT, STANDARD_INPUT_NAME = "-", "stdin"  # as an input, and in the names of its answers
# The endings of the pictures that predict.py writes, and of the JSON files beside them.
ANSWER_PICTURES = {".boxes.jpg": ".boxes.json", ".boxes.mp4": ".boxes.jsonl", ".attention.png": ".classes.json"}


class InputFile(NamedTuple):
    """A file of a user's input, and the name of its answer."""

    path: Path
    name: str  # the path relative to the folder of the input, with "/" between its parts
    content: bytes | None = None  # of standard input, which has no path


def read_each(
    input: str, read: Callable[[InputFile], Iterable[Sample]], unanswered: list[str], suffixes: Collection[str] = ()
) -> Iterator[Sample]:
    """Yield from `read(file)` for each image that `input` names, and for each file that ends with one of `suffixes`.

    If `input` is one file, its UserError is raised. Otherwise the message is appended to `unanswered`, and reading
    continues with the next file. Raises UserError if `input` names no file.
    """
    is_one = input == STANDARD_INPUT or os.path.isfile(input)
    files = [_standard_input()] if input == STANDARD_INPUT else find(input, suffixes, unanswered)
    for file in files:
        try:
            yield from read(file)
        except UserError as error:
            if is_one:
                raise
            unanswered.append(str(error))


def find(input: str, suffixes: Collection[str], unreadable: list[str]) -> list[InputFile]:
    """The files that a path or a pattern names, sorted; raises UserError if there are none.

    In a folder, and among the matches of a pattern, they are those with an ending of an image or of `suffixes`, except
    pictures that predict.py has written. `unreadable` gets a sentence for each folder in it that cannot be read.
    """
    path = Path(input)
    if path.is_file():
        return [InputFile(path, path.name)]
    if not path.is_dir() and not is_pattern(input):
        raise UserError(f"{path} is neither an image nor a folder of images, nor a pattern; give the path of one.")
    base, paths = (path, [path]) if path.is_dir() else (_folder_of(path), matches(input))
    problems: list[str] = []
    endings = {*IMAGE_SUFFIXES, *UNSUPPORTED_SUFFIXES, *suffixes}
    every = {file for path in paths for file in _files(path, problems) if file.suffix.lower() in endings}
    files = _without_answers(sorted(every))
    if not files and problems:
        raise UserError(problems[0])
    if not files:
        what = f"The folder {input} holds" if path.is_dir() else f"Among {len(paths)} matches of input={input} there is"
        own = f" but {len(every)} that predict.py wrote" if every else f" ({', '.join(sorted(endings))})"
        raise UserError(f"{what} no image{own}; give another {'folder' if path.is_dir() else 'pattern'}.")
    unreadable += problems
    return [InputFile(file, _name(file, base)) for file in files]


def is_pattern(input: str) -> bool:
    """Whether `input` is no existing path and contains *, ? or [...], and so stands for the paths that match it."""
    return glob.has_magic(input) and not os.path.lexists(input)


def matches(pattern: str) -> list[Path]:
    """The paths that match a pattern, sorted, without hidden ones; ** stands for folders at any depth."""
    return sorted({os.path.normpath(path): Path(path) for path in glob.glob(pattern, recursive=True)}.values())


def reading_note(input: str) -> str | None:
    """A note on an existing path that, as a pattern, would match others; None for any other input."""
    if not glob.has_magic(input) or not os.path.lexists(input):
        return None
    others = [path for path in matches(input) if path != Path(input)]
    kind = "folder" if os.path.isdir(input) else "file"
    reading = f"input={input} is the {kind} of this name, and no pattern for {len(others)} other paths"
    return f"{reading} (the first is {others[0]})." if others else None


def _standard_input() -> InputFile:
    """An image from standard input; raises UserError if there is none."""
    content, state = b"", "empty"
    if sys.stdin is None or sys.stdin.isatty():
        state = "closed" if sys.stdin is None else "a terminal"
    else:
        content = sys.stdin.buffer.read()
    if not content:
        raise UserError(f"input=- reads an image from standard input, which is {state}; give a pipe, or a file.")
    return InputFile(Path(STANDARD_INPUT), STANDARD_INPUT_NAME, content)


def _folder_of(pattern: Path) -> Path:
    """The folder that a pattern names before its first part with *, ? or [."""
    first = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    return Path(*pattern.parts[:first])


def _name(file: Path, folder: Path) -> str:
    """The path of `file` relative to `folder`, or its last part if it is not in `folder`."""
    relative = Path(os.path.relpath(file, folder))
    return file.name if ".." in relative.parts else relative.as_posix()


def _files(path: Path, problems: list[str]) -> Iterator[Path]:
    """The file `path`, or all files at any depth in the folder `path`, except in hidden folders.

    Links to folders are followed, and each folder is read once.
    """
    if not path.is_dir():
        yield path
        return

    def report(error: OSError) -> None:
        reason = f"The folder {error.filename} cannot be read ({error.strerror})"
        problems.append(f"{reason}; correct its permissions.")

    visited = {os.path.realpath(path)}
    for folder, folders, names in os.walk(path, onerror=report, followlinks=True):
        yield from (Path(folder, name) for name in names)
        targets = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(folders) if name[0] != "."}
        folders[:] = [name for name, target in targets.items() if target not in visited]
        visited |= {*targets.values()}


def _without_answers(files: list[Path]) -> list[Path]:
    """The files without the pictures that predict.py wrote, beside which lie the JSON files of their answers."""
    candidates = {file: ending for file in files for ending in ANSWER_PICTURES if file.name.endswith(ending)}
    folders = {(file.parent, ending) for file, ending in candidates.items()}
    written = {folder / name for folder, ending in folders for name in _written_pictures(folder, ending)}
    return [file for file in files if file not in candidates or file not in written]


def _written_pictures(folder: Path, ending: str) -> Iterator[str]:
    """The names with `ending` of the pictures whose answers in `folder` predict.py wrote."""
    for text in folder.glob(f"*{ANSWER_PICTURES[ending]}"):
        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            source = answered_file(text)
            name = STANDARD_INPUT_NAME if source == STANDARD_INPUT else Path(source).name
            if text.name == answer_name(name, ANSWER_PICTURES[ending]):
                yield answer_name(name, ending)


def answered_file(answer: Path) -> str:
    """The input that an answer, a JSON file or lines of JSON, states; raises any error of reading for another file."""
    with open_regular(answer) as file:
        return str(json.loads(file.readline() if answer.suffix == ".jsonl" else file.read())["file"])
