"""The WordPiece tokenizer of BERT, with a published vocabulary or one that is trained on a run's text.

Devlin et al. 2019 (arXiv 1810.04805), section 3; Schuster and Nakajima 2012. A text is split at white space, and each
punctuation mark and each Chinese character is a word of its own. A word is cut, from its start on, into the longest
entries that there are; an entry that continues a word begins with "##". A word that cannot be cut is unknown.

The files are vocab.txt, which has an entry on each line, or tokenizer.json.

Differs: BERT's trainer was not published. Training is that of the package `tokenizers`: merges of the most frequent
pairs, as in byte-pair encoding, starting from characters.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from common.data.opening import read_json, read_text
from common.errors import UserError
from common.files import schema
from seq2seq.tokenizers.bpe import MIN_PAIR_COUNT
from seq2seq.tokenizers.vocabulary import (
    CONTINUATION,
    VocabularyTokenizer,
    entries_mistake,
    find_special,
    in_order_of_ids,
    spans,
)

FILE = "vocab.txt"
SETTINGS_FILE = "tokenizer_config.json"  # beside vocab.txt: whether text is lowercased, and the like
SPECIAL_SYMBOLS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPECIAL_NAMES = {
    "begin": ("[CLS]",),
    "end": ("[SEP]",),
    "pad": ("[PAD]",),
    "unknown": ("[UNK]",),
    "mask": ("[MASK]",),
}
MAX_WORD = 100  # characters; a longer word is unknown, as in BERT
MAX_TRAINING_CHARACTERS = 100_000_000  # from which a vocabulary is trained
MAX_ALPHABET = 1000  # maximum number of characters that training starts from; rarer ones are unknown


class Settings(TypedDict):
    """How a text is normalised before it is split."""

    lowercase: bool
    strip_accents: bool  # whether marks are removed from letters, after canonical decomposition
    chinese_characters: bool  # whether each Chinese character is a word


class WordPieceState(TypedDict):
    """The content of the JSON text that `WordPiece.state` returns, except its key "kind"."""

    entries: list[str]  # the entry of each id
    settings: Settings


class WordPiece(VocabularyTokenizer):
    """A WordPiece tokenizer with BERT's rules for splitting a text into words."""

    kind = "word_piece"
    units = "characters"
    mask_text = "[MASK]"
    mask_takes_space = False

    def __init__(self, content: dict[str, Any], origin: str = "The checkpoint's tokenizer"):
        """Make a tokenizer from `content`, which has the keys of `WordPieceState`.

        Raises UserError, which begins with `origin`, if the content is malformed or has no [CLS], [SEP] or [UNK].
        """
        mistake = schema.mistake(content, WordPieceState, "tokenizer") or entries_mistake(content["entries"])
        if mistake:
            raise UserError(
                f"{origin}: it is not a WordPiece vocabulary ({mistake}); give the files that were published with the "
                "model."
            )
        entries = content["entries"]
        special = find_special(entries, SPECIAL_NAMES, origin, ["begin", "end", "unknown"])
        self.settings: Settings = content["settings"]
        library = _splitter(self.settings)
        library.model = models.WordPiece(
            {entry: id for id, entry in enumerate(entries)},
            unk_token=SPECIAL_NAMES["unknown"][0],
            max_input_chars_per_word=MAX_WORD,
            continuing_subword_prefix=CONTINUATION,
        )
        super().__init__(entries, special, library)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int, *, lowercase: bool) -> "WordPiece":
        """Train a tokenizer of `vocabulary` entries on the first `MAX_TRAINING_CHARACTERS`.

        The same texts give the same entries.

        `lowercase` also removes accents, as in BERT. The first entries are the special ones, the characters, and the
        characters that continue a word. Raises UserError when `vocabulary` is too small for these, or larger than the
        number of entries that the texts give.
        """
        settings = Settings(lowercase=lowercase, strip_accents=lowercase, chinese_characters=True)
        lines = list(_first(texts))
        library = _splitter(settings)
        alphabet = _alphabet(lines, library)
        # The trainer would give the ids of continuing characters, and with them the order of equally frequent merges,
        # in the order of a hash table, which differs from run to run. As special entries, they have fixed ids.
        first = [*SPECIAL_SYMBOLS, *alphabet]
        if vocabulary < len(first):
            raise UserError(
                f"data.tokenizer.vocabulary={vocabulary}: expected at least {len(first):,}, for the special entries "
                "and every character that merges start from; give more."
            )
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocabulary,
            min_frequency=MIN_PAIR_COUNT,
            special_tokens=first,
            limit_alphabet=0,
            continuing_subword_prefix=CONTINUATION,
            show_progress=False,
        )
        library.train_from_iterator(lines, trainer, length=len(lines))
        entries = in_order_of_ids(library.get_vocab(), "The trained tokenizer")
        if len(entries) < vocabulary:
            raise UserError(
                f"data.tokenizer.vocabulary={vocabulary}: the training text gives no more than {len(entries):,} "
                "entries that occur at least twice; give that number or less."
            )
        return cls({"entries": entries, "settings": settings})

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words of `ids` with spaces between them. Special entries are left out; unknown becomes U+FFFD.

        A punctuation mark is a word, too, since the entries do not tell which spaces the text had.
        """
        special = self.special_entries
        shown = (id for id in ids if id == special.unknown or id not in special.ids)
        words = " ".join("\ufffd" if id == special.unknown else self.entries[id] for id in shown)
        return words.replace(f" {CONTINUATION}", "")

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each id's entry; one that continues a word begins with ##."""
        return [self.entries[id] for id in ids]

    def filling(self, id: int) -> str:
        """Return the entry; one that continues a word begins with ##."""
        return self.entries[id]

    def begins_word(self, id: int) -> bool:
        """Whether an entry does not begin with ##."""
        return not self.entries[id].startswith(CONTINUATION)

    def content(self) -> dict[str, Any]:
        """Return the settings; see WordPieceState."""
        return {"settings": self.settings}


def read_vocabulary(path: Path) -> tuple[WordPiece, list[str]]:
    """Read vocab.txt, and the settings in tokenizer_config.json beside it, if there is such a file.

    Also returns notes: without tokenizer_config.json, the vocabulary decides whether text is lowercased, namely if no
    entry but the special ones has an upper-case letter. Raises UserError for a file that cannot be read or is that of
    another tokenizer.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    entries = [line.rstrip("\r") for line in lines]
    file = path.with_name(SETTINGS_FILE)
    stored = read_json(file) if file.is_file() else {}
    stored = stored if isinstance(stored, dict) else {}
    notes = []
    lowercase = stored.get("do_lower_case")
    if not isinstance(lowercase, bool):
        upper = next((entry for entry in entries if entry.lower() != entry and not entry.startswith("[")), None)
        lowercase = upper is None
        reason = "none of its entries has" if upper is None else f"its entry {upper!r} has"
        action = "lowercases text" if lowercase else "keeps upper case"
        notes.append(f"{path.name} {action}, since {reason} an upper-case letter and there is no {SETTINGS_FILE}")
    settings = _settings(lowercase, stored.get("strip_accents"), stored.get("tokenize_chinese_chars", True))
    return WordPiece({"entries": entries, "settings": settings}, str(path)), notes


def of_library(content: dict[str, Any], path: Path) -> WordPiece:
    """Make a tokenizer from the content of `path`, a tokenizer.json whose model is a WordPiece.

    Raises UserError if the file has other settings than BERT's: another rule of splitting, or another prefix.
    """
    model, normalizer = content["model"], content.get("normalizer") or {}
    other = {
        "normalizer": normalizer.get("type") != "BertNormalizer" or not normalizer.get("clean_text", True),
        "pre_tokenizer": (content.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer",
        "continuing_subword_prefix": model.get("continuing_subword_prefix", CONTINUATION) != CONTINUATION,
        "max_input_chars_per_word": model.get("max_input_chars_per_word", MAX_WORD) != MAX_WORD,
        "unk_token": model.get("unk_token") not in SPECIAL_NAMES["unknown"],
    }
    if key := next((key for key in other if other[key]), None):
        raise UserError(
            f"{path}: its {key} is not that of BERT, whose WordPiece is the only one that can be imported; give the "
            "files of such a model."
        )
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    entries = in_order_of_ids({**model["vocab"], **added}, str(path))
    settings = _settings(
        normalizer.get("lowercase", True), normalizer.get("strip_accents"), normalizer.get("handle_chinese_chars", True)
    )
    return WordPiece({"entries": entries, "settings": settings}, str(path))


def _settings(lowercase: Any, strip_accents: Any, chinese_characters: Any) -> Settings:
    """Return the settings of a file; without a value for `strip_accents`, accents are removed if text is lowercased."""
    return Settings(
        lowercase=bool(lowercase),
        strip_accents=bool(lowercase if strip_accents is None else strip_accents),
        chinese_characters=bool(chinese_characters),
    )


def _first(texts: Iterable[str]) -> Iterator[str]:
    """The first `MAX_TRAINING_CHARACTERS` of all texts, in parts."""
    room = MAX_TRAINING_CHARACTERS
    for text in texts:
        for start, stop in spans(text[:room]):
            yield text[start:stop]
        room -= len(text)
        if room <= 0:
            return


def _splitter(settings: Settings) -> tokenizers.Tokenizer:
    """Make a tokenizer without entries, which splits a text into words by BERT's rules."""
    library = tokenizers.Tokenizer(models.WordPiece(unk_token=SPECIAL_NAMES["unknown"][0]))
    library.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings["chinese_characters"],
        strip_accents=settings["strip_accents"],
        lowercase=settings["lowercase"],
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return library


def _alphabet(lines: Iterable[str], library: tokenizers.Tokenizer) -> list[str]:
    """Return the most frequent characters of normalised lines, sorted, and then those that may continue a word.

    Each of the latter begins with ##. Punctuation and Chinese characters cannot continue a word.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(library.normalizer.normalize_str(line))
    frequent = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:MAX_ALPHABET]
    characters = sorted(frequent)
    splits = {c: library.pre_tokenizer.pre_tokenize_str(library.normalizer.normalize_str(f"a{c}a")) for c in characters}
    return [*characters, *(f"{CONTINUATION}{c}" for c in characters if len(splits[c]) == 1)]
