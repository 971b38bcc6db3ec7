"""The tokenizers of Marian's published models: SentencePiece unigram models, and tables with the ids of their pieces.

SentencePiece: Kudo and Richardson 2018 (arXiv 1808.06226). Unigram model: Kudo 2018 (arXiv 1804.10959). The package
`sentencepiece` is needed only to read .spm files when a model is imported. After that, the checkpoint contains
everything that the package `tokenizers` needs to encode and decode. vocab.json has the ids of the pieces of source.spm.
The ids of the pieces of target.spm are in the same file if the model has one vocabulary for both languages, and
otherwise in target_vocab.json.
"""

import base64
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from common.data.opening import open_regular, read_json
from common.errors import UserError
from common.files import schema
from common.types import Count
from seq2seq.tokenizers import charsmap as charsmaps
from seq2seq.tokenizers.bpe import (
    EOS,
    SPECIAL,
    SPECIAL_NAMES,
    SPECIAL_SYMBOLS,
    UNK,
    Tokenizer,
    TokenizerOptions,
    chunks,
)
from seq2seq.tokenizers.protocol import TextTokenizer
from seq2seq.tokenizers.text import Ragged

STATE_KIND = "sentencepiece"  # distinguishes the states of `SentencePieces` from those of `Tokenizer`
SPACE_SYMBOL = "\u2581"  # the character by which SentencePiece replaces a space
MODEL_FILES = ("source.spm", "target.spm")


class ForeignSpecialIds(NamedTuple):
    """The ids of the special entries in the vocabulary of a Marian model."""

    eos: int
    unk: int
    pad: int


class SentencePiecesState(TypedDict):
    """The content of the JSON text that `SentencePieces.state` returns, except its key "kind" (STATE_KIND)."""

    entries: list[str]  # the entry of each id
    joint: bool  # whether source and target have one vocabulary
    pieces: list[tuple[str, float]]  # the pieces of the unigram model with their scores
    unknown: Count  # index of the unknown piece in `pieces`
    charsmap: str  # base64 of the normalizer's character map (see charsmap.py); empty if there is none
    space_before: bool  # whether a space is inserted before the text
    single_spaces: bool  # whether several spaces become one, and spaces at both ends are removed


class SentencePieces:
    """Converts text to ids and back with an imported vocabulary; implements `TextTokenizer`.

    `options` describe the tokenizer to callers; encoding and decoding do not use them. Models with several target
    languages expect a language code at the start of a text, such as ">>fra<<", which is encoded as one token. Decoding
    returns the normalised text.
    """

    special = SPECIAL

    def __init__(self, content: dict[str, Any]):
        """Restore a tokenizer from `content`, the parsed JSON of a state that `tokenizer_states` or `state` returned.

        Raises UserError if `content` is malformed.
        """
        if mistake := _mistake(content):
            raise UserError(
                f"The tokenizer was not imported by this program, or is damaged: {mistake}; import the files of its "
                "model again."
            )
        self._content = content
        self._entries: list[str] = content["entries"]
        self._ids = {entry: id for id, entry in enumerate(self._entries) if id >= len(SPECIAL_NAMES)}
        self._pieces = tokenizers.Tokenizer(models.Unigram([(p, s) for p, s in content["pieces"]], content["unknown"]))
        steps: list[Any] = []
        if charsmap := base64.b64decode(content["charsmap"]):
            steps.append(normalizers.Precompiled(charsmap))
        if content["single_spaces"]:
            steps += [normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Strip()]
        self._normalizer = normalizers.Sequence(steps)
        scheme = "always" if content["space_before"] else "never"
        self._pieces.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_SYMBOL, prepend_scheme=scheme, split=False)
        self.options = TokenizerOptions(
            kind="unigram",  # type: ignore[arg-type]
            pieces="characters",
            vocabulary=self.size,
            joint=content["joint"],
            single_digits=False,
            coverage=1.0,
            byte_fallback=False,
            normalization="none",
            lowercase=False,
        )

    @property
    def size(self) -> int:
        """Number of entries, including the 4 special ones."""
        return len(self._entries)

    @property
    def entries(self) -> list[str]:
        """The entries, in order of their ids."""
        return self._entries

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without BOS and EOS; an empty list for an empty text."""
        return self._encode([text])[0]

    def encode_all(self, texts: Iterable[str]) -> Ragged:
        """Return the ids of each text as an int32 row that ends with EOS."""
        return Ragged.of((ids for chunk in chunks(texts) for ids in self._encode(chunk)), EOS)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. PAD, BOS and EOS are left out; UNK becomes U+FFFD."""
        text = "".join("\ufffd" if i == UNK else self._entries[i] for i in ids if i == UNK or i >= len(SPECIAL_NAMES))
        return text.replace(SPACE_SYMBOL, " ").strip(" ")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's entry in readable form: a space as U+2581."""
        return [SPECIAL_NAMES[i] if i < len(SPECIAL_NAMES) else self._entries[i] for i in ids]

    def state(self) -> str:
        """Return the tokenizer as JSON text, from which `restore` rebuilds it without other files."""
        return json.dumps(self._content)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        parts = [_split_language_code(text) for text in texts]
        normalised = [self._normalizer.normalize_str(rest) for _, rest in parts]
        encodings = self._pieces.encode_batch(normalised, add_special_tokens=False)
        return [
            [self._ids.get(piece, UNK) for piece in ([code] if code else []) + (encoding.tokens if text else [])]
            for (code, _), text, encoding in zip(parts, normalised, encodings, strict=True)
        ]


def restore(state: str) -> "Tokenizer | SentencePieces":
    """Rebuild a tokenizer, trained by this program or imported, from a text that its method `state` returned.

    Raises UserError for a text that is not JSON, and for a malformed state.
    """
    try:
        content = json.loads(state)
    except (ValueError, RecursionError):
        content = None  # `Tokenizer.restore` raises the UserError
    if isinstance(content, dict) and content.get("kind") == STATE_KIND:
        return SentencePieces(content)
    return Tokenizer.restore(state)


def _mistake(content: dict[str, Any]) -> str | None:
    """Return the first mistake in a state's content, or None if it is valid.

    The check is needed because the package `tokenizers` panics on malformed content.
    """
    if mistake := schema.mistake(content, SentencePiecesState, "tokenizer"):
        return mistake
    pieces, unknown = content["pieces"], content["unknown"]
    if unknown >= len(pieces):
        return f"its unknown piece is number {unknown} of {len(pieces)}"
    if not all(text and math.isfinite(score) for text, score in pieces):
        return "it has an empty piece, or one without a finite score"
    if tuple(content["entries"][: len(SPECIAL_NAMES)]) != SPECIAL_NAMES:
        return f"its entries do not begin with {', '.join(SPECIAL_NAMES)}"
    try:
        json.dumps(content, ensure_ascii=False).encode()
        charsmap = base64.b64decode(content["charsmap"], validate=True)
    except ValueError as error:  # the content has half of a surrogate pair, or the character map is not base64
        return str(error)
    reason = charsmaps.mistake(charsmap) if charsmap else None
    return f"its charsmap cannot be used: {reason}" if reason else None


def share_vocabulary(source: TextTokenizer, target: TextTokenizer) -> bool:
    """Whether source and target have one vocabulary: one tokenizer object, or two of Marian's with equal entries."""
    if isinstance(source, SentencePieces) and isinstance(target, SentencePieces):
        return source.entries == target.entries
    return source is target


def vocabularies(folder: Path | None, joint: bool, size: int) -> tuple[dict[str, int], dict[str, int]] | None:
    """Read the ids of the source pieces and of the target pieces from a folder with Marian's tokenizer files.

    Returns two dicts (piece -> id), or None if `folder` is None or one of the files is missing. `joint` tells whether
    the model has one vocabulary for both languages; otherwise, the ids of the target are read from target_vocab.json.
    `size` is the number of rows of the model's embeddings. Raises UserError if the ids of a vocabulary are not 0 to
    `size` - 1.
    """
    names = ["vocab.json", "vocab.json" if joint else "target_vocab.json"]
    if folder is None or not all((folder / name).is_file() for name in (*MODEL_FILES, *names)):
        return None
    source, target = (_vocabulary(folder / name) for name in names)
    for ids in (source, target):
        if sorted(ids.values()) != [*range(size)]:
            raise UserError(
                f"{folder} has a tokenizer that does not belong to the checkpoint: its vocabulary has {len(ids):,} "
                f"entries with ids up to {max(ids.values(), default=-1):,}, and the embeddings have {size:,} rows; "
                "give the files that were published together."
            )
    return source, target


def tokenizer_states(
    folder: Path, vocabularies: tuple[dict[str, int], dict[str, int]], row_orders: tuple[Sequence[int], Sequence[int]]
) -> list[str]:
    """Return the states of the source tokenizer and of the target tokenizer in `folder`, as JSON texts.

    `vocabularies` map the pieces of source and of target to Marian's ids. `row_orders` hold, for source and for target,
    Marian's id of each row of our embeddings. The entries of a state are in the order of our rows.
    """
    states = []
    for name, ids, order in zip(MODEL_FILES, vocabularies, row_orders, strict=True):
        pieces = {id: piece for piece, id in ids.items()}
        entries = [*SPECIAL_NAMES, *(pieces[id] for id in order[len(SPECIAL_NAMES) :])]
        joint = vocabularies[0] == vocabularies[1]
        content = {"kind": STATE_KIND, "entries": entries, "joint": joint, **read_unigram_model(folder / name)}
        states.append(json.dumps(content))
    return states


def read_unigram_model(path: Path) -> dict[str, Any]:
    """Read a SentencePiece unigram model. Returns all fields of `SentencePiecesState` except `entries` and `joint`.

    Pieces that SentencePiece never outputs (control, unused) are left out. Raises UserError for any other file or kind
    of model, for pieces of other types (user-defined, byte), and if the package `sentencepiece` is missing.
    """
    model = _parsed(path)
    types = model.SentencePiece
    pieces: list[list[Any]] = []
    unknown = None
    for piece in model.pieces:
        text = piece.piece
        if piece.type not in (types.NORMAL, types.UNKNOWN, types.CONTROL, types.UNUSED):
            raise UserError(
                f"{path} has the piece {text!r} of an unsupported type (user-defined, or a byte); "
                "only plain unigram models can be imported."
            )
        if piece.type == types.UNKNOWN:  # renamed, so that the characters "<unk>" in a text do not match it
            unknown, text = len(pieces), SPECIAL_SYMBOLS[UNK]
        if piece.type in (types.NORMAL, types.UNKNOWN):
            pieces.append([text, piece.score])
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM or unknown is None or len(pieces) < 2:
        raise UserError(
            f"{path} is not a unigram model of SentencePiece with an unknown piece; no other model can be imported."
        )
    normalizer = model.normalizer_spec
    return {
        "pieces": pieces,
        "unknown": unknown,
        "charsmap": base64.b64encode(normalizer.precompiled_charsmap).decode(),
        "space_before": normalizer.add_dummy_prefix,
        "single_spaces": normalizer.remove_extra_whitespaces,
    }


def _parsed(path: Path) -> Any:
    """Parse a file as a `ModelProto` of the package `sentencepiece`.

    Raises UserError if the package is missing, or if the file is not a SentencePiece model.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2 as format
    except ImportError as error:
        raise UserError(
            f"Reading {path} requires the package sentencepiece: pip install sentencepiece protobuf."
        ) from error
    proto: Any = format  # type checkers do not see its classes, which the module creates when it is imported
    try:
        with open_regular(path) as file:
            return proto.ModelProto.FromString(file.read())
    except DecodeError as error:
        raise UserError(f"{path} is not a SentencePiece model, or is damaged; copy or download it again.") from error


def _split_language_code(text: str) -> tuple[str, str]:
    """Split a text into the language code at its start ("" if there is none) and the rest."""
    end = text.find("<<") if text.startswith(">>") else -1
    return (text[: end + 2], text[end + 2 :]) if end >= 0 else ("", text)


def _vocabulary(path: Path) -> dict[str, int]:
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(id, int) for id in content.values()):
        raise UserError(f"{path} is not a table of pieces and their ids; copy or download it again.")
    return content
