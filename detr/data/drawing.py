"""Data sets that are drawn at first use: the folder of their files appears when all of them are written."""

import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from common.machine.distributed import is_main


def draw_once(folder: Path, what: str, draw: Callable[[Path], None]) -> None:
    """Call `draw` with a temporary folder, which is then renamed to `folder`; do nothing if `folder` exists.

    `what` names the pictures in messages. Raises UserError when the files cannot be written.
    """
    if folder.exists():
        return
    temporary = folder.with_name(f"{folder.name}.draft-{secrets.token_hex(4)}")
    if is_main():
        print(f"Drawing {folder}, once; this takes some seconds.", file=sys.stderr)
    try:
        draw(temporary)
        temporary.rename(folder)
    except OSError as error:
        if not folder.exists():  # otherwise another process finished the same pictures first
            raise UserError(f"The {what} cannot be drawn ({error}); choose another data.root.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
