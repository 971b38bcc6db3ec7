"""Checkpoint files: plain types and tensors, written atomically, verified and loaded with weights_only=True.

A checkpoint is a zip file. PyTorch writes a CRC for each record but does not check it; this module does, on every load.
Files of other programs may also be NumPy's .npz, which are zip files, too, or .safetensors. The format is recognised by
the content, not by the name.
"""

import argparse
import math
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from common.config.migrations import migrate_checkpoint
from common.errors import UserError
from common.files import content as fields
from common.files.lines import sync_folder
from common.machine import memory

FORMAT = "triptych-1"
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_COPY_AGAIN = "copy or download it again"


class NewerFormatError(UserError):
    """A checkpoint was written by a newer version of this program."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` and the key "format"; at any moment, `path` is either the old file or the complete new one.

    Raises TypeError if a value is neither a tensor nor of a plain type, since it could not be loaded, and OSError if
    the disk is full or the folder cannot be written. After an error, the old file is untouched.
    """
    _assert_plain(content, "content")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({**content, "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a full disk; torch's own message is about positions in the file
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def load(path: Path | str, required: Sequence[str] = ()) -> dict[str, Any]:
    """Load and verify a checkpoint, ours or another program's, to the CPU, without executing anything in it.

    A file of ours must have the fields in `required`, and all its fields the types of files/content.py. A file of an
    earlier version is returned with the present keys and names (config/migrations.py). .npz and .safetensors give a
    dict of names and tensors. Files that are not a zip (.safetensors, and PyTorch's from before 2020) have no
    checksums: only their lengths are verified. Raises UserError for every file that cannot be read: missing, truncated,
    altered, of another format, with objects that could run code, with tensors that are sparse, quantised or without
    content, or with a field of another type.
    """
    path = Path(path)
    if not path.is_file():
        existing = "is a folder" if path.is_dir() else "is no regular file"
        reason = existing if path.exists() else "does not exist"
        raise UserError(f"{path} {reason}; give the path of a checkpoint, such as RUN/checkpoints/best.pt.")
    try:
        with open(path, "rb") as file:
            content = _read(file)
    except UserError as error:
        raise UserError(f"{path} {error}") from error.__cause__
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and not a dict of weights; give another file.")
    version = content.get("format")
    if isinstance(version, str) and version.startswith("triptych-") and version != FORMAT:
        formats = f"is in the format {version} and this program reads {FORMAT}"
        raise NewerFormatError(f"{path} {formats}; use a newer Triptych.")
    if tensor := fields.unusable_tensor(content):
        raise UserError(f"{path} holds {tensor}; give a file whose tensors are dense, not quantised and complete.")
    if not is_ours(content):
        return content
    if mistake := fields.first_mistake(content, required):
        raise UserError(f"{path} was altered, or not written by this program: {mistake}; give another checkpoint.")
    return migrate_checkpoint(content) if "config" in content else content


def is_ours(content: dict[str, Any]) -> bool:
    """Whether a loaded file was written by `save`; other files go to `Task.adopt`."""
    return content.get("format") == FORMAT


def _read(file: BinaryIO) -> Any:
    """Read a checkpoint's content. The text of a UserError continues a sentence that begins with the file's path."""
    head = file.read(64)
    if not head:
        raise UserError(f"is empty, as after a broken copy; {_COPY_AGAIN}.")
    if head.startswith(b"version https://git-lfs"):
        raise UserError("is a Git LFS pointer and not the file itself; fetch the file with `git lfs pull`.")
    file.seek(0)
    try:
        if head.startswith(b"PK"):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                names = archive.namelist()
            if damaged is not None:
                raise UserError(f"is damaged (the checksum of {damaged} is wrong); {_COPY_AGAIN}.")
            file.seek(0)
            if names and all(name.endswith(".npy") for name in names):
                return _read_arrays(file)
            if not any(name.endswith("data.pkl") for name in names):
                raise UserError("is a zip file but no PyTorch checkpoint; give another file.")
        if _is_safetensors(head):
            return safetensors.torch.load(file.read())
        # Checkpoints of the official DETR hold their `args` as a Namespace.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except (UserError, OSError):
        raise
    except Exception as error:  # damage raises RuntimeError, KeyError, EOFError, UnpicklingError, BadZipFile and more
        if memory.is_out_of_memory(error):
            raise
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"is no PyTorch checkpoint, or is damaged; {_COPY_AGAIN}."
        if refused:
            reason = f"holds {refused[1]}, which could run code; nothing was executed, give a file of plain weights."
        elif head.startswith(b"PK") or _is_safetensors(head):
            reason = f"is damaged ({str(error).partition(chr(10))[0][:160]}); {_COPY_AGAIN}."
        raise UserError(reason) from error


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a JSON header, as an 8-byte little-endian integer, and that header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000  # the format's limit for headers


def _read_arrays(file: BinaryIO) -> dict[str, Tensor]:
    """Read the arrays of an .npz. Raises UserError, with a text as in `_read`, if an array does not hold numbers."""
    tensors = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            try:
                with archive.open(entry) as member:
                    tensors[name] = _tensor(_read_array(member, entry.file_size))
            except (TypeError, ValueError) as error:
                if "Object arrays" in str(error):
                    reason = f"holds pickled objects ({name}), which could run code; nothing was executed,"
                else:
                    reason = f"holds {name}, which is no array of numbers ({str(error).partition(chr(10))[0][:160]});"
                raise UserError(f"{reason} give a file of plain weights.") from error
    return tensors


def _read_array(member: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """Read the array in `member`, a file of `size` bytes; raises ValueError if the array's header states another size.

    NumPy would allocate the size in the header before it reads the array.
    """
    version = np.lib.format.read_magic(member)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(member)
    if dtype.hasobject:
        raise ValueError("Object arrays")
    if math.prod(shape) * dtype.itemsize != size - member.tell():
        raise ValueError(f"it has the shape {shape} and {size - member.tell():,} bytes")
    member.seek(0)
    return np.lib.format.read_array(member, allow_pickle=False)


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Convert a NumPy array to a tensor; bfloat16, which NumPy lacks, is stored as two opaque bytes ("V2")."""
    if array.dtype.str[1:] == "V2":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _assert_plain(value: Any, where: str) -> None:
    """Raise TypeError unless `value` would load with weights_only=True; np.float64, a subclass of float, would not."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _assert_plain(key, f"a key of {where}")
            _assert_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _assert_plain(item, f"{where}[{number}]")
    elif type(value) not in (*_PLAIN, Tensor, nn.Parameter):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(f"{where} is a {kind}; a checkpoint takes tensors and plain types only, so convert it first.")
