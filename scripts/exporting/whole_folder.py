"""A folder that is there as a whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files.lines import sync_folder

MARK, FORMAT = "model.json", "triptych-export-1"  # what tells a folder of ours


def refuse(output: Path) -> None:
    """Raise UserError for a place that holds anything but an earlier export."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not _is_ours(output)):
        raise UserError(f"--output {output} holds something else already; give a new folder.")


@contextmanager
def replaced(output: Path) -> Iterator[Path]:
    """A draft beside `output`, which takes its place when the block ends, and is removed when it raises."""
    output = output.resolve()  # `.` has no name
    draft, old = (output.with_name(f".{output.name}.{word}") for word in ("draft", "old"))
    _put_back(old, output)
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        sync_folder(draft)
        if output.exists():
            output.rename(old)
        draft.rename(output)
        sync_folder(output.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        _put_back(old, output)
        shutil.rmtree(draft, ignore_errors=True)


def _put_back(old: Path, output: Path) -> None:
    """Give an earlier export its place again where nothing has taken it; a kill may also have left it so."""
    if old.exists() and not output.exists():
        old.rename(output)


def _is_ours(folder: Path) -> bool:
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
