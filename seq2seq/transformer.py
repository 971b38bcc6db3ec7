"""Former import path of `seq2seq.models.transformer`, which still works in this version."""

from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions  # noqa: F401
