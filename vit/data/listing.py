"""List the images of a folder with one sub-folder for each class, quickly and with little memory.

Hidden files and folders, whose names begin with a dot, are ignored.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.data.images import IMAGE_SUFFIXES
from common.errors import UserError

# File names are kept as bytes, because this takes less time and memory than text.
_ENDINGS = tuple(suffix.encode() for suffix in sorted(IMAGE_SUFFIXES))


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of one split, sorted by the name of the class folder and then by path.

    Files and labels are arrays, because forked workers share the memory of arrays. Python objects would be copied in
    each worker, because reading an object changes its reference count.
    """

    folder: Path
    files: NDArray[np.bytes_]  # (N,) paths relative to `folder`, in the file system's encoding
    labels: NDArray[np.int64]  # (N,) class indices
    other_files: int  # number of files without an image's extension, hidden files excluded


def class_folders(folder: Path) -> list[str]:
    """Return the names of a split's class folders, sorted as text.

    Raises UserError when `folder` is missing, holds no folder, or directly holds images.
    """
    if not folder.is_dir():
        raise UserError(f"The folder of images {folder} does not exist; correct its path.")
    names, images = [], []
    for name, is_folder in _entries(os.fsencode(folder)):
        if is_folder:
            names.append(os.fsdecode(name))
        elif name.lower().endswith(_ENDINGS):
            images.append(os.fsdecode(name))
    if images:
        raise UserError(
            f"{len(images)} images lie directly in {folder} and so have no class (the first is {min(images)}); "
            f"expected {folder}/<class>/<image>, with one folder for each class."
        )
    if not names:
        raise UserError(
            f"The folder {folder} holds no class; expected {folder}/<class>/<image>, with one folder for each class."
        )
    return sorted(names)


def folder_names(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, without hidden ones, sorted as text."""
    return sorted(os.fsdecode(name) for name, is_folder in _entries(os.fsencode(folder)) if is_folder)


def holds_images(folder: Path) -> bool:
    """Whether any file directly in `folder` has an image's extension."""
    entries = _entries(os.fsencode(folder))
    return any(not is_folder and name.lower().endswith(_ENDINGS) for name, is_folder in entries)


def list_class_images(folder: Path, names: list[str], labels: NDArray[np.int64]) -> Listing:
    """List the images in the class folders `names`, in this order; `labels` are the class indices of these folders.

    The file names of each class are stored in an array before the next class is listed, since a million names take
    about 80 MB more as Python objects.
    """
    files: list[NDArray[np.bytes_]] = []
    other_files = 0
    for name in names:
        top = os.fsencode(name)
        paths = list(_files(os.path.join(os.fsencode(folder), top), top))
        images = sorted(path for path in paths if path.lower().endswith(_ENDINGS))
        other_files += len(paths) - len(images)
        files.append(np.array(images, dtype=np.bytes_))
    return Listing(
        folder=folder,
        files=np.concatenate(files),
        labels=np.repeat(labels, [len(part) for part in files]),
        other_files=other_files,
    )


def _files(folder: bytes, prefix: bytes) -> Iterator[bytes]:
    """Yield the paths of the files at any depth in `folder`, hidden ones excluded.

    Each path begins with `prefix` instead of `folder`.
    """
    for name, is_folder in _entries(folder):
        path = prefix + b"/" + name
        if is_folder:
            yield from _files(os.path.join(folder, name), path)
        else:
            yield path


def _entries(folder: bytes) -> Iterator[tuple[bytes, bool]]:
    """Yield the name of each entry of a folder, and whether the entry is a folder or a link to a folder.

    Hidden entries are left out. Raises UserError when the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(b"."):
                    yield entry.name, entry.is_dir()
    except OSError as error:
        raise UserError(
            f"The folder {os.fsdecode(folder)} cannot be read ({error.strerror}); correct its path or its permissions."
        ) from None
