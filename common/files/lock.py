"""One process at a time in a folder, by a lock of the operating system, which ends with its holder, killed or not."""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

NAME = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold `folder`, which exists, while inside; raises UserError when another process holds it.

    A POSIX record lock: forked workers do not inherit it, so that it is free as soon as their killed parent is gone,
    and file systems over a network know it. Where the file system has no locks at all a warning is printed.
    """
    with open(folder / NAME, "a+", encoding="utf-8") as file:
        try:
            _take(file.fileno())
        except OSError as error:
            if error.errno in _TAKEN:
                raise UserError(f"{folder} is in use by {_holder(folder)}; wait for its end, or stop it.") from None
            print(f"Warning: {folder} cannot be locked ({error.strerror}); start one process in it.", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield


def _take(handle: int) -> None:
    if fcntl is not None:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / NAME).read_text(encoding="utf-8") or "another process"
    return "another process"
