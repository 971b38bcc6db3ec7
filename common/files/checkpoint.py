"""Checkpoint files. They hold plain types and tensors, are written atomically, and are verified when they are loaded.

A checkpoint is a zip file, which is loaded with weights_only=True. PyTorch writes a CRC of each record but does not
check it; this module checks it at every load. Checkpoints of other programs may also be NumPy's .npz files, which are
zip files as well, or .safetensors files. The format is recognised by the file's content, not by its name.
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
WORD_VECTORS = "file of word vectors"  # the only key of the content of such a file, and its path
_VECTORS_HEAD = re.compile(rb"\d{1,12}[ \t]+\d{1,9}[ \t]*\r?\n")  # the numbers of words and of dimensions (word2vec)
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_COPY_AGAIN = "copy or download it again"


class NewerFormatError(UserError):
    """A checkpoint is in the format of a newer version of this program."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint that holds `content` and, under the key "format", the version of the file format.

    At any moment, `path` is either the old file or the complete new one. After an error, the old file is unchanged.
    Raises TypeError if a value is neither a tensor nor of a plain type, because a file with such a value could not be
    loaded. Raises OSError if the disk is full or the folder cannot be written.
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
        if isinstance(error.__context__, OSError):  # a full disk, for instance; torch's message does not say so
            raise error.__context__ from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def load(path: Path | str, required: Sequence[str] = ()) -> dict[str, Any]:
    """Load a checkpoint of this or another program to the CPU and verify it, without executing anything in it.

    A file that Triptych wrote must have the fields in `required`, and its fields must have the types in
    files/content.py. If an earlier version of Triptych wrote the file, its content is converted to the current keys and
    names (config/migrations.py). For .npz and .safetensors, the result maps names to tensors. Files that are not zip
    files (.safetensors, and PyTorch's format before 1.6) have no checksums, so only their lengths are verified. A file
    of word vectors in a format of word2vec is not read; the result is {WORD_VECTORS: path}, for `Task.adopt`.

    Raises UserError if the file is missing, truncated or of another format, if a checksum is wrong, and if a field is
    missing or has a wrong type. Also raises UserError if the file holds an object that could run code, or a tensor that
    is sparse, nested, quantised or without content.
    """
    path = Path(path)
    if not path.is_file():
        existing = "is a folder" if path.is_dir() else "is no regular file"
        reason = existing if path.exists() else "does not exist"
        raise UserError(f"{path} {reason}; give the path of a checkpoint, such as RUN/checkpoints/best.pt.")
    try:
        with open(path, "rb") as file:
            if _VECTORS_HEAD.match(file.read(64)):
                return {WORD_VECTORS: str(path)}
            file.seek(0)
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
    """Whether `save` wrote the loaded file. The content of any other file is converted by `Task.adopt`."""
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
        # Namespace is permitted, because checkpoints of the official DETR hold their `args` as one.
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
    """Whether a file with these first bytes is a .safetensors file.

    Such a file begins with the length of a JSON header, as an 8-byte little-endian integer, and the header itself.
    """
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000  # the format's limit for headers


def _read_arrays(file: BinaryIO) -> dict[str, Tensor]:
    """Read the arrays of an .npz file; returns a dict from the arrays' names to tensors.

    Raises UserError if an array does not hold numbers. The text of the error continues a sentence, as in `_read`.
    """
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
    """Read the array in `member`, a file of `size` bytes.

    Raises ValueError if the array's header states another size. This is checked first, because NumPy would allocate
    memory of the stated size before it reads the array. Also raises ValueError for an array of Python objects.
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
    """Convert a NumPy array to a tensor.

    NumPy has no bfloat16. An .npz file stores a bfloat16 array as two opaque bytes per element (type "V2").
    """
    if array.dtype.str[1:] == "V2":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _assert_plain(value: Any, where: str) -> None:
    """Raise TypeError unless `value` can be loaded with weights_only=True; `where` names it in the message.

    A value of a subclass of a plain type cannot be loaded. An example is np.float64, which is a subclass of float.
    """
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
