"""The tokens of a text as an array of integers in a file that is mapped into memory, and written only once."""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.data.fingerprints import digest
from common.data.opening import open_regular
from common.errors import UserError
from common.files.lines import naming, sync_folder
from seq2seq.tokenizers.protocol import TextTokenizer

# A file begins with the format, an 8-byte text, and five 8-byte little-endian integers: the number of bytes of a token
# and the fields of `TokenStream` but for `ids`, and the number of tokens. The tokens follow, little-endian.
FORMAT = b"tokens 1"
HEADER_BYTES = len(FORMAT) + 5 * 8
SUFFIX = ".tokens"


class TokenStream(NamedTuple):
    """A tokenized text."""

    ids: NDArray[Any]  # (T,) uint16, or int32 for a vocabulary of more than 65,536 entries
    characters: int  # Unicode characters of the text
    bytes_: int  # bytes of the text in UTF-8
    unknown: int  # tokens that stand for something outside the vocabulary


def tokenize(pieces: Iterable[str], tokenizer: TextTokenizer) -> TokenStream:
    """Tokenize a text, which is given in `pieces`, in memory."""
    counts = _Counts(tokenizer)
    parts = list(counts.encode(pieces))
    return TokenStream(np.concatenate([np.empty(0, counts.type), *parts]), *counts.totals)


def tokenize_once(
    folder: Path, text_digest: str, pieces: Callable[[], Iterable[str]], tokenizer: TextTokenizer
) -> TokenStream:
    """Tokenize a text unless its tokens are in `folder`, and map their file into memory.

    `text_digest` identifies the text and how it is cut into the pieces that `pieces` returns. The file has the name
    that `file_name` returns. It appears only when it is complete. Processes that start at the same time each write
    their own draft, and the last one is kept. Raises UserError if the file cannot be written.
    """
    path = folder / file_name(text_digest, tokenizer)
    stream = _mapped(path)
    if stream is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, pieces(), tokenizer)
        except OSError as error:
            raise UserError(
                f"data.cache={folder}: {error.filename or path} cannot be written ({error.strerror}); name another "
                "folder, or give data.cache=null to keep the tokens in memory."
            ) from error
        stream = _mapped(path)
        assert stream is not None, "the file was written just now"
    return stream


def file_name(text_digest: str, tokenizer: TextTokenizer) -> str:
    """The name of the file for a text and a tokenizer: a digest of both."""
    return digest([FORMAT, text_digest.encode(), tokenizer.state().encode()]) + SUFFIX


class _Counts:
    """Encodes the pieces of a text, and counts what they hold."""

    def __init__(self, tokenizer: TextTokenizer):
        self.type = np.dtype("<u2" if tokenizer.size <= 1 << 16 else "<i4")
        # The first piece begins the text. The others follow it, so a tokenizer must not begin them with a space.
        self._first, self._next = tokenizer.encode, getattr(tokenizer, "encode_continuation", tokenizer.encode)
        self._unknown = getattr(tokenizer, "unk", None)
        self.totals = [0, 0, 0]  # characters, bytes, unknown tokens

    def encode(self, pieces: Iterable[str]) -> Iterator[NDArray[Any]]:
        for i, piece in enumerate(pieces):
            ids = np.array((self._next if i else self._first)(piece), self.type)
            unknown = 0 if self._unknown is None else int(np.count_nonzero(ids == self._unknown))
            self.totals = [
                total + new for total, new in zip(self.totals, (len(piece), len(piece.encode()), unknown), strict=True)
            ]
            yield ids


def _write(path: Path, pieces: Iterable[str], tokenizer: TextTokenizer) -> None:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    counts, tokens = _Counts(tokenizer), 0
    try:
        with naming(draft), open(draft, "wb") as file:
            file.write(bytes(HEADER_BYTES))
            for ids in counts.encode(pieces):
                file.write(ids.tobytes())
                tokens += len(ids)
            file.seek(0)
            file.write(FORMAT + np.array([counts.type.itemsize, *counts.totals, tokens], "<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def _mapped(path: Path) -> TokenStream | None:
    """Map a file of tokens into memory; None if it does not exist, or is not what `_write` wrote."""
    try:
        with open_regular(path) as file:
            return _read(file)
    except OSError:
        return None


def _read(file: BinaryIO) -> TokenStream | None:
    header, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    if len(header) < HEADER_BYTES or not header.startswith(FORMAT):
        return None
    width, characters, bytes_, unknown, tokens = np.frombuffer(header[len(FORMAT) :], "<i8").tolist()
    if width not in (2, 4) or size != HEADER_BYTES + width * tokens:
        return None
    kind = np.dtype("<u2" if width == 2 else "<i4")
    ids = np.asarray(np.memmap(file, kind, "r", HEADER_BYTES)) if tokens else np.empty(0, kind)
    return TokenStream(ids, characters, bytes_, unknown)
