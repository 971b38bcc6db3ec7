"""Former path of seq2seq.tokenizers.bpe. Importing from here still works in this version, but not in the next."""

from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK, Tokenizer, TokenizerOptions  # noqa: F401
