"""Open and read files whose paths come from users or from data sets. Only regular files are opened.

Other kinds are refused: a named pipe, for instance, may block its reader for ever.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file for reading bytes.

    Raises OSError, with a `strerror`, if the file is missing or cannot be read, or if `path` is a folder, a named pipe
    or a device. Also raises OSError for a name that no file can have, because it contains a null character or a
    character that cannot be encoded.
    """
    try:
        file = open(path, "rb", opener=_open_without_waiting)
    except ValueError:
        raise OSError(errno.EINVAL, "no file can have this name", repr(str(path))) from None
    kind = stat.S_IFMT(os.fstat(file.fileno()).st_mode)
    if kind != stat.S_IFREG:
        file.close()
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'a special file')} and no regular file", str(path))
    return file


def read_bytes(path: Path) -> bytes:
    """The content of a regular file; raises UserError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its path or its permissions.") from None


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file, without a byte order mark.

    Raises UserError if the file cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); correct it, or copy it again.") from None


def read_names(path: Path) -> list[str]:
    """The file names that a file lists, one on each line, without surrounding spaces; empty lines are skipped.

    The names need not be UTF-8. Raises UserError if the file cannot be read.
    """
    lines = read_bytes(path).removeprefix(b"\xef\xbb\xbf").splitlines()
    return [os.fsdecode(line.strip()) for line in lines if line.strip()]


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises UserError if the file cannot be read or is not JSON."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read; give a file with fewer levels of lists.") from None
    except ValueError as error:  # not JSON, or not text
        reason = "a number has too many digits" if "set_int_max_str_digits" in str(error) else error
        raise UserError(f"{path} is not JSON ({reason}); correct it, or copy it again.") from None


def _open_without_waiting(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe waits for a writer. The flag has no effect on reading a regular file.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
