"""What files an image folder holds: a folder for each class, listed quickly and kept small."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.data.images import ENDINGS
from common.errors import UserError

_ENDINGS = tuple(ending.encode() for ending in sorted(ENDINGS))  # names of files stay bytes: less work, less memory


@dataclass(frozen=True, kw_only=True)
class Listing:
    """One split as arrays, which forked workers share: reading a Python object writes its counter and copies its page.

    Images stand in the order of their classes, and of their names within one.
    """

    folder: Path
    files: NDArray[np.bytes_]  # (N,) relative to the folder, in the file system's encoding
    labels: NDArray[np.int64]  # (N,) class index
    others: int  # files that are no images by their ending


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a split, sorted; raises UserError when there is none or images lie beside them."""
    if not folder.is_dir():
        raise UserError(f"The folder of images {folder} does not exist; mend its path.")
    names, images = [], []
    for name, is_folder in _entries(os.fsencode(folder)):
        if is_folder:
            names.append(os.fsdecode(name))
        elif name.lower().endswith(_ENDINGS):
            images.append(os.fsdecode(name))
    if images:
        raise UserError(
            f"{len(images)} images lie directly in {folder}, the first is {min(images)}, and so have no class; "
            f"expected {folder}/<class>/<image>, with one folder for each class."
        )
    if not names:
        raise UserError(
            f"The folder {folder} holds no class; expected {folder}/<class>/<image>, with one folder for each class."
        )
    return sorted(names)


def list_images_of(folder: Path, names: list[str], labels: NDArray[np.int64]) -> Listing:
    """All images of the class folders `names`, in order; `labels` are the indices of these classes.

    Names become an array class by class: a million of them as objects would take some 80 MB more.
    """
    files: list[NDArray[np.bytes_]] = []
    others = 0
    for name in names:
        top = os.fsencode(name)
        found = list(_files(os.path.join(os.fsencode(folder), top), top))
        images = sorted(file for file in found if file.lower().endswith(_ENDINGS))
        others += len(found) - len(images)
        files.append(np.array(images, dtype=np.bytes_))
    return Listing(
        folder=folder,
        files=np.concatenate(files),
        labels=np.repeat(labels, [len(part) for part in files]),
        others=others,
    )


def _files(folder: bytes, said: bytes) -> Iterator[bytes]:
    """Paths of all files under a folder, however deep; they begin with `said`, what the folder is called there."""
    for name, is_folder in _entries(folder):
        path = said + b"/" + name
        if is_folder:
            yield from _files(os.path.join(folder, name), path)
        else:
            yield path


def _entries(folder: bytes) -> Iterator[tuple[bytes, bool]]:
    """Name of each entry of a folder that is not hidden, and whether it is a folder, or a link to one."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(b"."):
                    yield entry.name, entry.is_dir()
    except OSError as error:
        raise UserError(
            f"The folder {os.fsdecode(folder)} cannot be read ({error.strerror}); mend its path or its permissions."
        ) from None
