"""Describe an error of the operating system, such as a full disk, in one sentence; raise the limit on open files."""

import errno
import sys
from pathlib import Path

from common.errors import UserError

if sys.platform != "win32":
    import resource

MIN_OPEN_FILES = 32  # for a process without workers; with torch 2.15, 16 are too few for some runs
OPEN_FILES_PER_WORKER = 8  # measured: for a process with 4 workers, 48 are too few and 64 suffice
MAX_SHOWN_NAME = 60  # of a file name that is too long, this many characters are shown

_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    errno.EACCES: "correct its permissions, or name another path",
    errno.EPERM: "correct its permissions, or name another path",
    errno.EROFS: "name a path that can be written",
    errno.ENOTDIR: "a part of this path is a file; correct the path",
    errno.EISDIR: "this path is a folder; name a file",
    errno.ELOOP: "correct the symbolic links",
    **dict.fromkeys(_FULL, "make room, and repeat the command"),
}


def ensure_open_files(workers: int) -> None:
    """Raise this process's limit on open files (ulimit -n) if it is too low for `workers` worker processes.

    Raises UserError if the system does not permit the higher limit. With too few open files, the workers would wait for
    each other for ever. On Windows, nothing is checked.
    """
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MIN_OPEN_FILES + OPEN_FILES_PER_WORKER * workers
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        remedy = f"raise it (ulimit -n {needed})" + (", or lower trainer.workers" if workers else "")
        raise UserError(f"ulimit -n is {hard}, and {workers} workers need {needed} open files; {remedy}.")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def describe(error: OSError) -> str | None:
    """Return a sentence with the cause of an error and its remedy; None for an error that may be a bug.

    Too many open files are described even if the error has no path. Every other error without a path gives None.
    """
    if error.errno in _TOO_MANY:
        return f"{error.strerror}: more than the limit (ulimit -n) permits; raise it, or lower trainer.workers."
    if error.filename is None:
        return None
    path = str(error.filename)
    if error.errno == errno.ENAMETOOLONG:
        name = max(Path(path).parts, key=len)[:MAX_SHOWN_NAME]
        return f"a path has a part that is longer than the file system takes (255 bytes), {name}...; shorten it."
    if error.errno in _REMEDIES:
        return f"{path} cannot be read or written ({error.strerror}); {_REMEDIES[error.errno]}."
    return None
