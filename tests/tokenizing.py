"""Options of a small tokenizer, for tests that do not depend on most of them."""

from seq2seq.tokenizers.bpe import TokenizerOptions

BYTE_OPTIONS = TokenizerOptions(
    kind="bpe",
    pieces="bytes",
    vocabulary=260,
    joint=True,
    single_digits=True,
    coverage=1.0,
    byte_fallback=True,
    normalization="none",
    lowercase=False,
)
