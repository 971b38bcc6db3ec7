"""Word vectors in the two file formats of word2vec, text and binary, which gensim, fastText and others also write.

Both formats begin with a line of text: the number V of words and the number d of dimensions. A row of the text format
is the word and d decimal numbers, separated by spaces. A row of the binary format is the word, a space and d
little-endian 4-byte floats; word2vec adds a line feed to each row, and gensim does not.
"""

import gzip
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.files.output import creating
from seq2seq.data.text_lines import MAX_MAGIC_BYTES
from seq2seq.tokenizers.text import compression, decompressed, open_text

HEADER = re.compile(rb"\s*(\d{1,12})[ \t]+(\d{1,9})[ \t]*\r?\n")
FLOAT = np.dtype("<f4")
PADDING = b" \t\r"  # word2vec ends each row of a text file with a space
WHITE_SPACE = re.compile(r"[ \t\r\n]")
REMEDY = "give a file as word2vec or gensim (save_word2vec_format) writes it"

Content = bytes | mmap.mmap


def read_vectors(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    """Read word vectors in either format, plain or compressed by gzip, bzip2 or xz.

    Returns V words, in the order of the file, and their vectors (V, d). The format is recognised by the first row, not
    by the file's name. Raises UserError if the file cannot be read, is damaged, or holds a word twice, or a number that
    is not finite.
    """
    content = _content(path)
    header = HEADER.match(content)
    if header is None:
        raise UserError(
            f"{path} does not begin with the number of words and of dimensions, as the files of word2vec do; add that "
            "line (a GloVe file lacks it), or give another file."
        )
    count, width = int(header[1]), int(header[2])
    if not count or not width:
        raise UserError(f"{path} announces {count} words of {width} dimensions, so there is nothing to read; {REMEDY}.")
    if 2 * count * width > len(content):  # each number takes at least two bytes, so no memory is requested in vain
        raise UserError(
            f"{path} announces {count:,} words of {width:,} dimensions, for which its {len(content):,} bytes are too "
            "few; copy it again, or correct its first line."
        )
    read = _read_text if _begins_with_text(content, header.end(), width) else _read_binary
    words, vectors = read(path, content, header.end(), count, width)
    _check(path, words, vectors)
    return words, vectors


def write_vectors(path: Path, words: Sequence[str], vectors: NDArray[Any], *, binary: bool) -> None:
    """Write word vectors (V, d) in the binary or the text format; a name that ends in .gz is compressed by gzip.

    Numbers in text have 9 significant digits, which identify every 4-byte float. Rows of the binary format end as
    word2vec writes them, with a line feed. Raises UserError for a word that is empty or has white space, which neither
    format can hold, and if the file cannot be written.
    """
    assert len(words) == len(vectors)
    if unsuited := [word for word in words if not word or WHITE_SPACE.search(word)]:
        raise UserError(
            f"The word {unsuited[0]!r} is empty or has white space, which files of word2vec cannot hold; replace it."
        )
    rows = _binary_rows(words, vectors) if binary else _text_rows(words, vectors)
    with creating(path), open(path, "wb") as file:
        # The time and the name are left out, so that equal vectors give equal files.
        target = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) if path.suffix == ".gz" else file
        target.write(f"{len(words)} {vectors.shape[1]}\n".encode())
        target.writelines(rows)
        if target is not file:
            target.close()


def _binary_rows(words: Sequence[str], vectors: NDArray[Any]) -> Iterator[bytes]:
    for word, vector in zip(words, vectors, strict=True):
        yield word.encode() + b" " + vector.astype(FLOAT).tobytes() + b"\n"


def _text_rows(words: Sequence[str], vectors: NDArray[Any]) -> Iterator[bytes]:
    for word, vector in zip(words, vectors.astype(np.float32), strict=True):
        yield f"{word} {' '.join(map('{:.9g}'.format, vector.tolist()))}\n".encode()


def _content(path: Path) -> Content:
    """Map a file's bytes into memory or, if it is compressed, decompress them."""
    with open_text(path) as file:
        module = compression(file.read(MAX_MAGIC_BYTES), path)
        size = file.seek(0, 2)
        file.seek(0)
        if module is not None:
            return decompressed(file.read(), module, path)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""


def _begins_with_text(content: Content, start: int, width: int) -> bool:
    """Whether the first row is text: a word and decimal numbers, or at least printable, with a space for each number.

    The second rule finds damaged rows of text, such as a word with a space, so that the message names their fault.
    """
    line = _line(content, start)
    _, *numbers = line.split() or [b""]
    try:
        return bool([float(number) for number in numbers])
    except ValueError:
        return line.count(b" ") >= max(2, width) and line.decode(errors="replace").strip().isprintable()


def _line(content: Content, start: int) -> bytes:
    end = content.find(b"\n", start)
    return content[start : len(content) if end < 0 else end]


def _read_text(
    path: Path, content: Content, start: int, count: int, width: int
) -> tuple[list[str], NDArray[np.float32]]:
    words, vectors = [], np.empty((count, width), np.float32)
    for row in range(count):
        if start >= len(content):
            raise _incomplete(path, row, count)
        line = _line(content, start)
        start += len(line) + 1
        word, *numbers = line.rstrip(PADDING).split(b" ")
        if len(numbers) != width:
            raise UserError(
                f"{path}: line {row + 2:,} has {len(numbers)} numbers, and the first line announces {width}; {REMEDY}."
            )
        try:
            with np.errstate(over="ignore"):  # a number beyond fp32 becomes infinite, which `_check` refuses
                vectors[row] = [float(number) for number in numbers]
        except ValueError as error:
            raise UserError(
                f"{path}: line {row + 2:,} has a field that is not a number ({error}); {REMEDY}."
            ) from error
        words.append(_word(path, word, row))
    _refuse_rest(path, content, start, count)
    return words, vectors


def _read_binary(
    path: Path, content: Content, start: int, count: int, width: int
) -> tuple[list[str], NDArray[np.float32]]:
    words, vectors = [], np.empty((count, width), np.float32)
    for row in range(count):
        space = content.find(b" ", start)
        end = space + 1 + FLOAT.itemsize * width
        if space < 0 or end > len(content):
            raise _incomplete(path, row, count)
        words.append(_word(path, content[start:space].removeprefix(b"\n"), row))
        vectors[row] = np.frombuffer(content[space + 1 : end], FLOAT)
        start = end
    _refuse_rest(path, content, start, count)
    return words, vectors


def _word(path: Path, raw: bytes, row: int) -> str:
    try:
        word = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: word {row + 1:,} is not valid UTF-8 (byte 0x{raw[error.start]:02x}), so the file is damaged or "
            f"has another encoding; {REMEDY}, in UTF-8."
        ) from error
    if not word:
        raise UserError(f"{path}: word {row + 1:,} is empty; {REMEDY}.")
    return word


def _incomplete(path: Path, rows: int, count: int) -> UserError:
    return UserError(f"{path} ends after {rows:,} of the {count:,} words that it announces; copy it again.")


def _refuse_rest(path: Path, content: Content, start: int, count: int) -> None:
    if content[start : start + 4096].strip():
        raise UserError(f"{path} goes on after the {count:,} words that its first line announces; correct that line.")


def _check(path: Path, words: list[str], vectors: NDArray[np.float32]) -> None:
    """Raise UserError for a word that occurs twice, and for a number that is not finite."""
    rows: dict[str, int] = {}
    for row, word in enumerate(words):
        if (first := rows.setdefault(word, row)) != row:
            raise UserError(f"{path} holds {word!r} twice, as words {first + 1:,} and {row + 1:,}; remove one of them.")
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise UserError(f"{path}: the vector of {words[row]!r} (word {row + 1:,}) is not finite; give another file.")
