"""Lock a folder for one process at a time; the operating system releases the lock when that process ends."""

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
_HELD_ERRORS = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class InUseError(UserError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """A context that locks an existing folder; raises InUseError if another process holds the lock.

    On Linux and macOS, the lock is a POSIX record lock, which most network file systems support, too. Forked workers do
    not inherit the lock. It is therefore released as soon as the process that took it ends, even if its workers are
    still running. On a file system without locks, a warning is printed, and the folder is not locked.
    """
    with open(folder / NAME, "ab+", buffering=0) as file:
        try:
            _take(file.fileno())
        except OSError as error:
            if error.errno in _HELD_ERRORS:
                raise InUseError(f"{folder} is in use by {_holder(folder)}; wait until it ends, or stop it.") from None
            print(f"Warning: {folder} cannot be locked ({error.strerror}); start one process in it.", file=sys.stderr)
        holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        with contextlib.suppress(OSError):  # on a full disk, the folder is locked, but the holder's name is missing
            file.truncate(0)
            file.write(holder.encode())
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
