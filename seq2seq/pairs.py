"""Moved to seq2seq.data.pairs; importable here for one version."""

from seq2seq.data.pairs import EMPTY_CORPUS as NOTHING  # noqa: F401
from seq2seq.data.pairs import Corpus, SentencePairs  # noqa: F401
