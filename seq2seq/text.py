"""Moved to seq2seq.tokenizers.text; importable here for one version."""

from seq2seq.tokenizers.text import Lines, Ragged, read_pair  # noqa: F401
