"""Digests of a data set's content, by which a resumed run recognises its data even if their path has changed."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.data.opening import open_regular
from common.errors import UserError

THREADS = 16  # on a network drive, 16 simultaneous requests take little longer than one
FILES_PER_TASK = 1000  # number of files whose lengths a thread reads in one task
ROWS_PER_COPY = 2**16  # of an array that must be copied to be hashed


def digest(parts: Iterable[bytes | NDArray[np.generic]]) -> str:
    """A hash (BLAKE2b) of the concatenated bytes of `parts`, as 32 hexadecimal digits."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        if not isinstance(part, np.ndarray):
            hasher.update(part)
        elif part.flags.c_contiguous:
            hasher.update(part.data)
        else:  # copied in pieces, so that equal costs, which take no memory, do not take 8 bytes each here
            for start in range(0, len(part), ROWS_PER_COPY):
                hasher.update(np.ascontiguousarray(part[start : start + ROWS_PER_COPY]).data)
    return hasher.hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file's bytes; raises UserError if the file cannot be read."""
    try:
        with open_regular(path) as file:
            return digest(iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its path or its permissions.") from None


def digest_files(folder: Path, names: NDArray[np.bytes_]) -> str:
    """The digest of the names of files and of their lengths in bytes; no file is opened.

    `names` (N,) are the files' paths relative to `folder`. A file whose length cannot be read gets the length -1.
    """
    top = os.fsencode(folder)
    tasks = [names[start : start + FILES_PER_TASK] for start in range(0, len(names), FILES_PER_TASK)]
    with ThreadPoolExecutor(THREADS) as threads:
        lengths = list(threads.map(lambda part: _lengths(top, part), tasks))  # arrays: files may be millions
    texts = (b"\0".join([*part.tolist(), b""]) for part in tasks)
    return digest(chain(texts, lengths))


def _lengths(top: bytes, names: NDArray[np.bytes_]) -> NDArray[np.int64]:
    return np.array([_length(os.path.join(top, name)) for name in names.tolist()], dtype="<i8")


def _length(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # reading this file later will raise an error that names it
