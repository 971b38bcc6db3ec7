"""Write the folder of an export completely or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files.lines import sync_folder

# A folder is recognised as an earlier export if it has the file DESCRIPTION_FILE with the value FORMAT for "format".
DESCRIPTION_FILE, FORMAT = "model.json", "triptych-export-1"


def check_output(output: Path) -> None:
    """Raise UserError if `output` is a file, or a folder with other files than those of an earlier export.

    The model.json of an export lists the export's files under "files". Older versions wrote no such list. In a folder
    without the list, all files count as files of the earlier export.
    """
    names = [file.name for file in output.iterdir()] if output.is_dir() else []
    earlier = _earlier_export(output) if names else {}
    if output.is_file() or earlier is None:
        raise UserError(f"--output {output} is a file, or a folder with other content; give a new folder.")
    files = earlier.get("files")
    others = sorted(set(names) - set(map(str, files))) if isinstance(files, list) else []
    if others:
        raise UserError(
            f"--output {output} holds {others[0]} beside an earlier export, which the new one replaces; move it, or "
            "give a new folder."
        )


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """Yield a draft folder. It replaces `output` when the block ends, or is removed if the block raises an error."""
    output = output.resolve()  # the path "." has no name, which the next line needs
    draft, old = (output.with_name(f".{output.name}.{suffix}") for suffix in ("draft", "old"))
    _restore(old, output)
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for file in draft.rglob("*"):
            if file.is_dir():
                sync_folder(file)
                continue
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
    """Move an earlier export from `old` back to `output` if nothing is at `output`.

    Nothing is at `output` if a process moved the earlier export to `old`, and then failed or was killed before it moved
    the new export to `output`.
    """
    if old.exists() and not output.exists():
        old.rename(output)


def _earlier_export(folder: Path) -> dict[str, Any] | None:
    """Return the content of the model.json of an export in `folder`, or None if `folder` holds no export."""
    try:
        content = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None
