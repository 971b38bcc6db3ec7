"""Former path of seq2seq.data.multi30k. Importing from here still works in this version, but not in the next."""

from seq2seq.data.multi30k import Multi30k  # noqa: F401
