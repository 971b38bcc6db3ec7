"""Moved to seq2seq.data.multi30k; importable here for one version."""

from seq2seq.data.multi30k import Multi30k  # noqa: F401
