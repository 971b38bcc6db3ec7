"""Former path of seq2seq.models.transformer. Importing from here still works in this version, but not in the next."""

from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions  # noqa: F401
