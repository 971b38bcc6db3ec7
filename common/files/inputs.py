"""Find the files that the key `input` names: a file, a folder, a pattern such as photos/*.jpg, or "-" (stdin).

A folder stands for the images in it, at any depth, and for the videos in it if the task reads videos. A value that
contains *, ? or [ is a pattern only if no file or folder has exactly this name.
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

# The value of `input` for standard input, and the name from which the file names of its answers are made.
STANDARD_INPUT, STANDARD_INPUT_NAME = "-", "stdin"
# Ending of a picture or video that predict.py writes -> endings of the JSON files beside it with the same answers.
ANSWER_PICTURES = {
    ".boxes.jpg": (".boxes.json",),
    ".boxes.mp4": (".boxes.jsonl",),
    ".masks.png": (".boxes.json",),
    ".panoptic.jpg": (".boxes.json",),
    ".panoptic.png": (".boxes.json",),
    ".lanes.jpg": (".lanes.json",),
    ".lanes.mp4": (".lanes.jsonl",),
    ".completions.png": (".pixels.json",),
    ".reconstruction.png": (".reconstruction.json",),
    ".attention.png": (".classes.json", ".boxes.json"),
    ".encoder.png": (".boxes.json",),
    ".prompted.jpg": (".prompted.json",),
    ".prompted.png": (".prompted.json",),
}


class InputFile(NamedTuple):
    """An input file, and the name from which the file names of its answers are made."""

    path: Path  # "-" for standard input
    name: str  # the path relative to the input's folder, with "/" between its parts; "stdin" for standard input
    content: bytes | None = None  # the bytes of standard input; None for a file, which is read from `path`


def read_each(
    input: str, read: Callable[[InputFile], Iterable[Sample]], unanswered: list[str], suffixes: Collection[str] = ()
) -> Iterator[Sample]:
    """Call `read` on each file that `input` names, and yield the samples that it returns.

    The files are those that `find` returns, or standard input. If `input` is one file or standard input, a UserError
    that `read` raises is propagated. Otherwise its message is appended to `unanswered`, and reading continues with the
    next file. For each folder that cannot be read, a sentence is appended to `unanswered`, too. Raises UserError if
    `input` names no file. `suffixes` is as in `find`.
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

    If `input` is the path of a file, only this file is returned, whatever its ending. A folder is searched at any depth
    for files with the ending of an image format, or with an ending in `suffixes` (lower case, with the dot). Image
    formats that cannot be read are included, so that reading such a file raises an error that names it. For a pattern,
    each folder that matches is searched, and a file that matches is returned if it has one of these endings. Pictures
    and videos that predict.py has written are left out. For each folder that cannot be read, a sentence is appended to
    `unreadable`.
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
    """Whether `input` is a pattern: it contains *, ? or [, and is not an existing path."""
    return glob.has_magic(input) and not os.path.lexists(input)


def matches(pattern: str) -> list[Path]:
    """The paths that match `pattern`, sorted and without duplicates.

    The rules are those of `glob.glob`: ** matches folders at any depth, and wildcards do not match hidden files.
    """
    return sorted({os.path.normpath(path): Path(path) for path in glob.glob(pattern, recursive=True)}.values())


def reading_note(input: str) -> str | None:
    """A note for the log if `input` is an existing path and, read as a pattern, would match other paths.

    Returns None if `input` does not exist, contains none of *, ? and [, or matches no other path.
    """
    if not glob.has_magic(input) or not os.path.lexists(input):
        return None
    others = [path for path in matches(input) if path != Path(input)]
    kind = "folder" if os.path.isdir(input) else "file"
    reading = f"input={input} is the {kind} of this name, and no pattern for {len(others)} other paths"
    return f"{reading} (the first is {others[0]})." if others else None


def _standard_input() -> InputFile:
    """Read the bytes of an image from standard input; raises UserError if there are none."""
    content, state = b"", "empty"
    if sys.stdin is None or sys.stdin.isatty():
        state = "closed" if sys.stdin is None else "a terminal"
    else:
        content = sys.stdin.buffer.read()
    if not content:
        raise UserError(f"input=- reads an image from standard input, which is {state}; give a pipe, or a file.")
    return InputFile(Path(STANDARD_INPUT), STANDARD_INPUT_NAME, content)


def _folder_of(pattern: Path) -> Path:
    """The part of a pattern's path before the first component that contains *, ? or [."""
    first = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    return Path(*pattern.parts[:first])


def _name(file: Path, folder: Path) -> str:
    """The path of `file` relative to `folder`; only the file's own name if the file is not in `folder`."""
    relative = Path(os.path.relpath(file, folder))
    return file.name if ".." in relative.parts else relative.as_posix()


def _files(path: Path, problems: list[str]) -> Iterator[Path]:
    """Yield `path` if it is a file, or all files in the folder `path` at any depth, except in hidden folders.

    Links to folders are followed. A folder that was found before, in another folder, is skipped, so that a cycle of
    links ends. For each folder that cannot be read, a sentence is appended to `problems`.
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
    """The `files` except pictures and videos that predict.py wrote, which the JSON files beside them identify."""
    candidates = {file: ending for file in files for ending in ANSWER_PICTURES if file.name.endswith(ending)}
    folders = {(file.parent, ending) for file, ending in candidates.items()}
    written = {folder / name for folder, ending in folders for name in _written_pictures(folder, ending)}
    return [file for file in files if file not in candidates or file not in written]


def _written_pictures(folder: Path, ending: str) -> Iterator[str]:
    """The names of the pictures with `ending` that predict.py wrote to `folder`.

    predict.py writes a JSON file beside each picture. A picture is recognised if its JSON file states an input, and if
    the JSON file has the name that predict.py gives to an answer to this input.
    """
    for answer in ANSWER_PICTURES[ending]:
        for text in folder.glob(f"*{answer}"):
            with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
                source = answered_file(text)
                name = STANDARD_INPUT_NAME if source == STANDARD_INPUT else Path(source).name
                if text.name == answer_name(name, answer):
                    yield answer_name(name, ending)


def answered_file(answer: Path) -> str:
    """Return the path of the input to which the JSON or JSON Lines file `answer` belongs.

    It is stored under the key "file"; in JSON Lines, in the first line.

    Raises OSError, ValueError, TypeError, KeyError or RecursionError if `answer` cannot be read or states no input.
    """
    with open_regular(answer) as file:
        return str(json.loads(file.readline() if answer.suffix == ".jsonl" else file.read())["file"])
