"""Moved to seq2seq.models.transformer; importable here for one version."""

from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions  # noqa: F401
