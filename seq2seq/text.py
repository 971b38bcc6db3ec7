"""Former import path of `seq2seq.tokenizers.text`, which still works in this version."""

from seq2seq.tokenizers.text import Lines, Ragged, read_pair  # noqa: F401
