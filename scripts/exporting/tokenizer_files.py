"""Our tokenizers as files of the `tokenizers` library, which many languages read: the same ids without Triptych.

What is done in Python here (seq2seq/tokenizers/bpe.py) is said there in steps that the library knows; whether both give
the same ids is tried on texts.
"""

import json
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, normalizers, processors

from scripts.exporting.plan import Row
from seq2seq.tokenizers.bpe import BYTE_SYMBOLS, EOS, SPECIAL_NAMES, SPECIAL_SYMBOLS, UNK, Tokenizer
from seq2seq.tokenizers.marian import SentencePieces

COUNT, LENGTH, SEED = 50, 12, 0  # of texts that random ids stand for
TEXTS = ("", " ", "a", " a", "2", "A b  c", "naïve café", "3.14 €", "\t\n x", "日本 語", "<s> </s>", "👍🏽!", "</unk")


def make(source: Any, target: Any) -> tuple[dict[str, str], dict[str, Any], list[Row]]:
    """Files by their names, what is told about them, and how far they differ from ours on texts."""
    if isinstance(source, SentencePieces):
        return _of_pieces(source, target)
    pairs = {"tokenizer.json": source} if source is target else {}
    pairs = pairs or {"source_tokenizer.json": source, "target_tokenizer.json": target}
    files = {name: library_form(tokenizer) for name, tokenizer in pairs.items()}
    rows = [Row(f"{len(_texts(one))} texts", name, differing(one, files[name])) for name, one in pairs.items()]
    told = {
        "source": next(iter(pairs)),
        "target": list(pairs)[-1],
        "reader": "tokenizers.Tokenizer.from_file; encode(text).ids ends in the end's id; decode takes ids without it",
    }
    return files, told, rows


def library_form(tokenizer: Tokenizer) -> str:
    """The library's JSON of one of our tokenizers.

    Differs: where tokens stand for bytes that are no UTF-8, all of them become U+FFFD, and not the wrong ones alone.
    """
    content = json.loads(tokenizer.state())
    options, bpe = content["options"], content["bpe"]
    spelt = options["pieces"] == "characters"
    names = dict(zip(SPECIAL_SYMBOLS, SPECIAL_NAMES, strict=True))
    if spelt:  # a byte of a character without an entry
        names |= {symbol: f"<0x{byte:02X}>" for byte, symbol in enumerate(BYTE_SYMBOLS)}
    bpe["model"]["vocab"] = {names.get(entry, entry): id for entry, id in bpe["model"]["vocab"].items()}
    bpe["model"]["unk_token"] = SPECIAL_NAMES[UNK]
    bpe["model"]["byte_fallback"] = spelt and options["byte_fallback"]
    made = tokenizers.Tokenizer.from_str(json.dumps(bpe))
    made.normalizer = normalizers.Sequence(_normalizers(options))
    end = [(SPECIAL_NAMES[EOS], EOS)]
    made.post_processor = processors.TemplateProcessing(single=f"$A {SPECIAL_NAMES[EOS]}", special_tokens=end)
    made.decoder = decoders.Sequence(_decoders(spelt))
    text: str = made.to_str(pretty=True)
    return text


def differing(tokenizer: Tokenizer, form: str) -> float:
    """The share of texts whose ids, or whose text from ids, are others in the library's form."""
    made = tokenizers.Tokenizer.from_str(form)
    wrong = 0
    for text in (texts := _texts(tokenizer)):
        ids = tokenizer.encode(text)
        wrong += made.encode(text).ids != [*ids, EOS] or made.decode(ids) != tokenizer.decode(ids)
    return wrong / len(texts)


def _texts(tokenizer: Tokenizer) -> list[str]:
    """Awkward ones, and what random ids stand for."""
    drawn = torch.Generator().manual_seed(SEED)
    rows = torch.randint(UNK + 1, tokenizer.size, (COUNT, LENGTH), generator=drawn).tolist()
    return [*TEXTS, *map(tokenizer.decode, rows)]


def _normalizers(options: dict[str, Any]) -> list[Any]:
    steps: list[Any] = []
    if options["normalization"] != "none":
        steps.append(normalizers.NFC() if options["normalization"] == "nfc" else normalizers.NFKC())
    if options["lowercase"]:
        steps.append(normalizers.Lowercase())
    # A space before a text that begins with a letter or a space: before every text, and away again from the others.
    return [*steps, normalizers.Prepend(" "), normalizers.Replace(tokenizers.Regex(r"\A (?![\p{L} ])"), "")]


def _decoders(spelt: bool) -> list[Any]:
    nothing = [decoders.Replace(tokenizers.Regex(r"\A<(pad|s|/s)>\z"), "")]
    unknown = [decoders.Replace(tokenizers.Regex(r"\A<unk>\z"), "\ufffd")]
    joined = [decoders.ByteFallback(), decoders.Fuse()] if spelt else [decoders.ByteLevel()]
    return [*nothing, *(unknown if spelt else []), *joined, decoders.Strip(" ", 1, 0)]


def _of_pieces(source: SentencePieces, target: Any) -> tuple[dict[str, str], dict[str, Any], list[Row]]:
    """A list of pieces by id for each language: the texts are cut by the SentencePiece models that came with them."""
    files = {
        f"{name}_pieces.json": json.dumps(tokenizer.entries, ensure_ascii=False, indent=0) + "\n"
        for name, tokenizer in (("source", source), ("target", target))
    }
    told = {
        "source": "source_pieces.json",
        "target": "target_pieces.json",
        "reader": "pieces by id; cut a text with the published source.spm, and join pieces, U+2581 being a space",
    }
    return files, told, []
