"""Train the kind of tokenizer that the options name."""

from collections.abc import Iterable

from seq2seq.tokenizers.bpe import Tokenizer, TokenizerOptions
from seq2seq.tokenizers.characters import Characters
from seq2seq.tokenizers.protocol import TextTokenizer


def train(texts: Iterable[str], options: TokenizerOptions, which: str = "") -> TextTokenizer:
    """Train a tokenizer on `texts`: that of `Tokenizer.train` for kind=bpe, of `Characters.train` for kind=characters.

    `which` is inserted into error messages to name the texts, such as " in German". The same texts in the same order
    give the same tokenizer. Raises UserError for options that do not suit the texts.
    """
    kind: type[Tokenizer] | type[Characters] = Characters if options.kind == Characters.kind else Tokenizer
    return kind.train(texts, options, which)
