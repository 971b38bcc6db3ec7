"""An export folder that is written completely or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError
from common.files.lines import sync_folder

DESCRIPTION_FILE, FORMAT = "model.json", "triptych-export-1"  # a folder with this file and format is an export of ours


def check_output(output: Path) -> None:
    """Raise UserError if `output` holds anything but an earlier export."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not _is_export(output)):
        raise UserError(f"--output {output} is a file, or a folder with other content; give a new folder.")


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a draft folder, which replaces `output` when the block ends and is removed when the block raises."""
    output = output.resolve()  # `.` has no name
    draft, old = (output.with_name(f".{output.name}.{suffix}") for suffix in ("draft", "old"))
    _restore(old, output)
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
        _restore(old, output)
        shutil.rmtree(draft, ignore_errors=True)


def _restore(old: Path, output: Path) -> None:
    """Move an earlier export back to `output` if an error or a kill has kept the new one from replacing it."""
    if old.exists() and not output.exists():
        old.rename(output)


def _is_export(folder: Path) -> bool:
    try:
        content = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
