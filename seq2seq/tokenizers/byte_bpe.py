"""The byte-level byte-pair encoding of GPT-2 and RoBERTa, with their published vocabularies.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; Liu et al. 2019 (arXiv
1907.11692), section 4.4. A text is split by GPT-2's regular expression into words, numbers and signs, each with the
space before it, and merges of bytes never cross these borders. Every text can be encoded, and decoding restores it.

The files are vocab.json (entry -> id) and merges.txt, or tokenizer.json. Entries are written in GPT-2's alphabet, in
which each byte is a printable character, such as U+0120 for the space.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypedDict

import tokenizers
from tokenizers import models, pre_tokenizers

from common.data.opening import read_json, read_text
from common.errors import UserError
from common.files import schema
from seq2seq.tokenizers.bpe import byte_alphabet, readable
from seq2seq.tokenizers.vocabulary import (
    CONTINUATION,
    VocabularyTokenizer,
    entries_mistake,
    find_special,
    in_order_of_ids,
)

FILES = ("vocab.json", "merges.txt")
SPECIAL_NAMES = {
    "begin": ("<s>", "<|endoftext|>"),
    "end": ("</s>", "<|endoftext|>"),
    "pad": ("<pad>",),
    "unknown": ("<unk>",),
    "mask": ("<mask>",),
}
VERSION_LINE = "#version"  # begins the first line of merges.txt
# Options of the library's BPE that GPT-2 does not use.
OTHER_SETTINGS = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
SPACE = "\u0120"  # the space in GPT-2's alphabet


class ByteBpeState(TypedDict):
    """The content of the JSON text that `ByteBpe.state` returns, except its key "kind"."""

    entries: list[str]  # the entry of each id, in GPT-2's alphabet
    merges: list[tuple[str, str]]  # the two entries that each merge joins, first merge first
    space_before: bool  # whether a space is inserted before a text that begins with none


class ByteBpe(VocabularyTokenizer):
    """A byte-level BPE. The special entries are recognised by their names, see `SPECIAL_NAMES`."""

    kind = "byte_bpe"
    units = "bytes"
    mask_text = "<mask>"
    mask_takes_space = True

    def __init__(self, content: dict[str, Any], origin: str = "The checkpoint's tokenizer"):
        """Make a tokenizer from `content`, which has the keys of `ByteBpeState`.

        Raises UserError, which begins with `origin`, if the content is malformed or is that of another tokenizer.
        """
        if mistake := _mistake(content):
            raise UserError(
                f"{origin}: it is not a byte-level BPE, as GPT-2 and RoBERTa have it ({mistake}); give the files that "
                "were published with the model."
            )
        self._merges = [(left, right) for left, right in content["merges"]]
        self._space_before = bool(content["space_before"])
        ids = {entry: id for id, entry in enumerate(content["entries"])}
        library = tokenizers.Tokenizer(models.BPE(ids, self._merges))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=self._space_before, use_regex=True)
        special = find_special(content["entries"], SPECIAL_NAMES, origin, ["begin", "end"])
        super().__init__(content["entries"], special, library)
        contents = [_bytes_of(entry) for entry in self.entries]
        for id in self.special_entries.ids:
            contents[id] = b""
        if self.special_entries.unknown is not None:
            contents[self.special_entries.unknown] = "\ufffd".encode()
        self._contents = contents

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Special entries are left out; unknown and invalid UTF-8 become U+FFFD."""
        text = b"".join(self._contents[id] for id in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._space_before else text

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's entry in readable form: a space as U+2581, a byte of an incomplete character as <0xE4>."""
        return [self.entries[i] if i in self.special_entries.ids else readable(_bytes_of(self.entries[i])) for i in ids]

    def filling(self, id: int) -> str:
        """Return an entry's text, with ## instead of no space before it; bytes of an incomplete character as <0xE4>."""
        piece = self.pieces([id])[0]
        return piece.removeprefix("\u2581") if piece.startswith("\u2581") else f"{CONTINUATION}{piece}"

    def begins_word(self, id: int) -> bool:
        """Whether an entry begins with a space. A sign without a space before it belongs to the word before it."""
        return self.entries[id].startswith(SPACE)

    def content(self) -> dict[str, Any]:
        """Return the merges and whether a space is inserted; see ByteBpeState."""
        return {"merges": self._merges, "space_before": self._space_before}


def read_vocabulary(vocabulary: Path, merges: Path) -> ByteBpe:
    """Read vocab.json and merges.txt; raises UserError for a file that cannot be read or is of another tokenizer."""
    ids = read_json(vocabulary)
    if mistake := schema.mistake(ids, dict[str, int], "its content"):
        raise UserError(f"{vocabulary}: {mistake}; expected a table of entries and their ids; copy the file again.")
    lines = read_text(merges).split("\n")
    start = int(lines[0].startswith(VERSION_LINE))
    pairs = [line.rstrip("\r").split(" ") for line in lines[start:] if line.strip()]
    if wrong := next((i for i, pair in enumerate(pairs, start + 1) if len(pair) != 2), None):
        raise UserError(
            f"{merges}: line {wrong} is not two entries with a space between them; give the merges.txt that was "
            f"published with {vocabulary.name}."
        )
    content = {"entries": in_order_of_ids(ids, str(vocabulary)), "merges": pairs, "space_before": False}
    return ByteBpe(content, str(vocabulary))


def of_library(content: dict[str, Any], path: Path) -> ByteBpe:
    """Make a tokenizer from the content of `path`, a tokenizer.json whose model is a BPE.

    Raises UserError if the file has other settings than GPT-2's: another regular expression, a normaliser, or options
    of the merges.
    """
    model, splitter = content["model"], content.get("pre_tokenizer") or {}
    other = {
        "pre_tokenizer": splitter.get("type") != "ByteLevel" or not splitter.get("use_regex", True),
        "normalizer": content.get("normalizer") is not None,
        **{key: bool(model.get(key)) for key in OTHER_SETTINGS},
    }
    if key := next((key for key in other if other[key]), None):
        raise UserError(
            f"{path}: its {key} is not that of GPT-2 and RoBERTa, whose byte-level BPE is the only one that can be "
            "imported; give the files of such a model."
        )
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    entries = in_order_of_ids({**model["vocab"], **added}, str(path))
    space_before = bool(splitter.get("add_prefix_space", False))
    return ByteBpe({"entries": entries, "merges": merges, "space_before": space_before}, str(path))


def _mistake(content: dict[str, Any]) -> str | None:
    """Return the first mistake in a tokenizer's content, or None; the package `tokenizers` panics at some of them."""
    if mistake := schema.mistake(content, ByteBpeState, "tokenizer"):
        return mistake
    if mistake := entries_mistake(content["entries"]):
        return mistake
    entries = set(content["entries"])
    if missing := sorted(byte_alphabet().keys() - entries):
        return f"{len(missing)} of 256 bytes have no entry, the first is 0x{byte_alphabet()[missing[0]]:02x}"
    for left, right in content["merges"]:
        if not {left, right, left + right} <= entries:
            return f"it merges {left!r} and {right!r}, which are not all entries"
    return None


def _bytes_of(entry: str) -> bytes:
    """Return the bytes of an entry; a character outside GPT-2's alphabet, as in an added entry, stands for itself."""
    alphabet = byte_alphabet()
    return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode("utf-8", "replace") for c in entry)
