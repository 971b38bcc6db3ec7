"""Moved to seq2seq.data.pairs; importable here for one version."""

from seq2seq.data.pairs import NOTHING, Corpus, SentencePairs  # noqa: F401
