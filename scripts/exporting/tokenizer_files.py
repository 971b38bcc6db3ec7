"""Export our tokenizers to files for the library `tokenizers`, which then produces the same ids without Triptych.

The parts of seq2seq/tokenizers/bpe.py that are written in Python are replaced by normalizers and decoders of the
library. The ids and the decoded texts of the two implementations are compared on sample texts; for the tokenizers of
encoder-only models (seq2seq/tokenizers/vocabulary.py), only the ids. For the imported tokenizers of Marian
(seq2seq/tokenizers/marian.py), only the lists of pieces are exported, and nothing is compared.
"""

import json
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, normalizers, processors

from scripts.exporting.plan import Comparison
from seq2seq.tokenizers.bpe import BYTE_SYMBOLS, EOS, SPECIAL_NAMES, SPECIAL_SYMBOLS, UNK, Tokenizer
from seq2seq.tokenizers.marian import SentencePieces
from seq2seq.tokenizers.vocabulary import CONTINUATION, VocabularyTokenizer
from seq2seq.tokenizers.word_piece import WordPiece

COUNT, LENGTH, SEED = 50, 12, 0  # number of texts decoded from random ids, ids per text, and their seed
TEXTS = ("", " ", "a", " a", "2", "A b  c", "naïve café", "3.14 €", "\t\n x", "日本 語", "<s> </s>", "👍🏽!", "</unk")


def export(source: Any, target: Any) -> tuple[dict[str, str], dict[str, Any], list[Comparison]]:
    """Export the tokenizers of the source and the target language.

    There is one file if the languages share one tokenizer of bpe.py, otherwise there are two. Returns the files (name
    -> content), the metadata for model.json, and the comparisons with our tokenizers.
    """
    if isinstance(source, SentencePieces):
        return _export_pieces(source, target)
    by_file = {"tokenizer.json": source} if source is target else {}
    by_file = by_file or {"source_tokenizer.json": source, "target_tokenizer.json": target}
    files = {
        name: vocabulary_json(tokenizer, begin=False)
        if isinstance(tokenizer, VocabularyTokenizer)
        else library_json(tokenizer)
        for name, tokenizer in by_file.items()
    }
    comparisons = [
        Comparison(f"{len(_sample_texts(tokenizer))} texts", name, mismatch_rate(tokenizer, files[name]))
        for name, tokenizer in by_file.items()
    ]
    metadata = {
        "source": next(iter(by_file)),
        "target": list(by_file)[-1],
        "reader": "tokenizers.Tokenizer.from_file; encode(text).ids ends in the end id; decode takes ids without it",
    }
    return files, metadata, comparisons


def library_vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    """The entries of one of our tokenizers and their ids, as the library's file names them."""
    vocabulary: dict[str, int] = tokenizers.Tokenizer.from_str(library_json(tokenizer)).get_vocab()
    return vocabulary


def library_json(tokenizer: Tokenizer) -> str:
    """Convert one of our tokenizers to the library's JSON.

    Differs: if a run of byte tokens is not valid UTF-8, the library decodes every byte of the run to U+FFFD. Our
    tokenizer replaces only the invalid bytes.
    """
    content = json.loads(tokenizer.state())
    options, bpe = content["options"], content["bpe"]
    by_characters = options["pieces"] == "characters"
    names = dict(zip(SPECIAL_SYMBOLS, SPECIAL_NAMES, strict=True))
    if by_characters:  # tokens for the bytes of characters that are not in the vocabulary
        names |= {symbol: f"<0x{byte:02X}>" for byte, symbol in enumerate(BYTE_SYMBOLS)}
    bpe["model"]["vocab"] = {names.get(entry, entry): id for entry, id in bpe["model"]["vocab"].items()}
    bpe["model"]["unk_token"] = SPECIAL_NAMES[UNK]
    bpe["model"]["byte_fallback"] = by_characters and options["byte_fallback"]
    exported = tokenizers.Tokenizer.from_str(json.dumps(bpe))
    exported.normalizer = normalizers.Sequence(_normalizers(options))
    end = [(SPECIAL_NAMES[EOS], EOS)]
    exported.post_processor = processors.TemplateProcessing(single=f"$A {SPECIAL_NAMES[EOS]}", special_tokens=end)
    exported.decoder = decoders.Sequence(_decoders(by_characters=by_characters))
    text: str = exported.to_str(pretty=True)
    return text


def vocabulary_json(tokenizer: VocabularyTokenizer, *, begin: bool) -> str:
    """Convert the tokenizer of an encoder-only model to the library's JSON.

    A text gets the end entry and, with `begin`, the begin entry. The text of the mask entry, such as [MASK], is encoded
    as this entry.
    """
    exported = tokenizers.Tokenizer.from_str(tokenizer.library.to_str())
    first, last = ((tokenizer.entries[id], id) for id in tokenizer.special[:2])
    template = f"{first[0]} $A {last[0]}" if begin else f"$A {last[0]}"
    exported.post_processor = processors.TemplateProcessing(single=template, special_tokens=[first, last])
    takes_space = tokenizer.mask_takes_space
    exported.add_special_tokens([tokenizers.AddedToken(tokenizer.mask_text, lstrip=takes_space, normalized=False)])
    words = isinstance(tokenizer, WordPiece)
    exported.decoder = decoders.WordPiece(CONTINUATION, cleanup=False) if words else decoders.ByteLevel()
    text: str = exported.to_str(pretty=True)
    return text


def mismatch_rate(tokenizer: Tokenizer | VocabularyTokenizer, exported_json: str) -> float:
    """Return the fraction of the sample texts that the exported tokenizer encodes or decodes differently from ours.

    For the tokenizer of an encoder-only model, only encoding is compared.
    """
    exported = tokenizers.Tokenizer.from_str(exported_json)
    mismatches = 0
    for text in (texts := _sample_texts(tokenizer)):
        ids, end = tokenizer.encode(text), tokenizer.special.end
        decodes = isinstance(tokenizer, VocabularyTokenizer) or exported.decode(ids) == tokenizer.decode(ids)
        mismatches += exported.encode(text).ids != [*ids, end] or not decodes
    return mismatches / len(texts)


def _sample_texts(tokenizer: Tokenizer | VocabularyTokenizer) -> list[str]:
    """Return the corner cases TEXTS, and texts that `tokenizer` decodes from random ids."""
    rng = torch.Generator().manual_seed(SEED)
    rows = torch.randint(UNK + 1, tokenizer.size, (COUNT, LENGTH), generator=rng).tolist()
    return [*TEXTS, *map(tokenizer.decode, rows)]


def _normalizers(options: dict[str, Any]) -> list[Any]:
    steps: list[Any] = []
    if options["normalization"] != "none":
        steps.append(normalizers.NFC() if options["normalization"] == "nfc" else normalizers.NFKC())
    if options["lowercase"]:
        steps.append(normalizers.Lowercase())
    # bpe.py prepends a space to a text that begins with a letter or a space. Here, a space is prepended to every text,
    # then removed from a text that is empty or begins with any other character.
    return [*steps, normalizers.Prepend(" "), normalizers.Replace(tokenizers.Regex(r"\A (?![\p{L} ])"), "")]


def _decoders(*, by_characters: bool) -> list[Any]:
    removed = [decoders.Replace(tokenizers.Regex(r"\A<(pad|s|/s)>\z"), "")]
    unknown = [decoders.Replace(tokenizers.Regex(r"\A<unk>\z"), "\ufffd")]
    joined = [decoders.ByteFallback(), decoders.Fuse()] if by_characters else [decoders.ByteLevel()]
    return [*removed, *(unknown if by_characters else []), *joined, decoders.Strip(" ", 1, 0)]


def _export_pieces(source: SentencePieces, target: Any) -> tuple[dict[str, str], dict[str, Any], list[Comparison]]:
    """Export the pieces of both languages in the order of their ids, but not the SentencePiece models.

    Returns the files and the metadata as `export` does, and an empty list of comparisons.
    """
    files = {
        f"{name}_pieces.json": json.dumps(tokenizer.entries, ensure_ascii=False, indent=0) + "\n"
        for name, tokenizer in (("source", source), ("target", target))
    }
    metadata = {
        "source": "source_pieces.json",
        "target": "target_pieces.json",
        "reader": "pieces by id; tokenize with the published source.spm, and join pieces; U+2581 is a space",
    }
    return files, metadata, []
