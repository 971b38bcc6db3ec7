"""Moved to seq2seq.tokenizers.bpe; importable here for one version."""

from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK, Tokenizer, TokenizerOptions  # noqa: F401
