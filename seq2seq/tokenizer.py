"""Former import path of `seq2seq.tokenizers.bpe`, which still works in this version."""

from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK, Tokenizer, TokenizerOptions  # noqa: F401
