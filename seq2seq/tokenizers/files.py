"""Find and read the tokenizer files that are published beside a model: tokenizer.json, vocab.txt, or vocab.json."""

from pathlib import Path
from typing import Any, TypedDict

from common.data.opening import read_json
from common.errors import UserError
from common.files import schema
from seq2seq.tokenizers import byte_bpe, word_piece
from seq2seq.tokenizers.vocabulary import VocabularyTokenizer

LIBRARY_FILE = "tokenizer.json"  # the format of the package `tokenizers`
SUPPORTED = "a WordPiece (BERT) or a byte-level BPE (GPT-2, RoBERTa)"


class _AddedToken(TypedDict):
    content: str
    id: int


class _Model(TypedDict):
    model: dict[str, Any]


class _LibraryFile(_Model, total=False):
    """The parts of a tokenizer.json that are read here."""

    added_tokens: list[_AddedToken] | None
    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None


class _Wordpieces(TypedDict):
    type: str
    vocab: dict[str, int]


class _Merges(_Wordpieces):
    merges: list[str] | list[tuple[str, str]]


def read(path: Path) -> tuple[VocabularyTokenizer, list[str]]:
    """Read the tokenizer in a folder, or that of one file: tokenizer.json, vocab.txt, or vocab.json with merges.txt.

    Also returns notes on what a file does not say. In a folder, tokenizer.json takes precedence over the other files.
    Raises UserError if there is no such file, or if it is that of another kind of tokenizer.
    """
    if path.is_dir():
        file = find(path)
        if file is None:
            raise UserError(
                f"{path} has none of {LIBRARY_FILE}, {word_piece.FILE}, or {' with '.join(byte_bpe.FILES)}; give the "
                "folder that holds the tokenizer's files."
            )
        path = file
    if path.suffix == ".txt":
        return word_piece.read_vocabulary(path)
    if path.name == byte_bpe.FILES[0]:
        return byte_bpe.read_vocabulary(path, path.with_name(byte_bpe.FILES[1])), []
    return _read_library_file(path), []


def find(folder: Path) -> Path | None:
    """Return the tokenizer file in `folder` that `read` reads, or None if there is none."""
    names = [LIBRARY_FILE, word_piece.FILE]
    if all((folder / name).is_file() for name in byte_bpe.FILES):
        names.append(byte_bpe.FILES[0])
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_library_file(path: Path) -> VocabularyTokenizer:
    content = read_json(path)
    mistake = schema.mistake(content, _LibraryFile, "") if isinstance(content, dict) else "it is not a table"
    kind = None if mistake else content["model"].get("type")
    expected = {"BPE": _Merges, "WordPiece": _Wordpieces}.get(str(kind))
    if expected is None:
        raise UserError(
            f"{path} has a tokenizer of type {kind} ({mistake or 'another model'}), and only {SUPPORTED} can be "
            "imported; give the files of such a model."
        )
    if mistake := schema.mistake(content["model"], expected, "model"):
        raise UserError(f"{path} is not a file of the package tokenizers ({mistake}); copy or download it again.")
    return byte_bpe.of_library(content, path) if kind == "BPE" else word_piece.of_library(content, path)
