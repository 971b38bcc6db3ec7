"""Former path of seq2seq.tokenizers.text. Importing from here still works in this version, but not in the next."""

from seq2seq.tokenizers.text import Lines, Ragged, read_pair  # noqa: F401
