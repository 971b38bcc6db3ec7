"""Former path of seq2seq.tasks.translation. Importing from here still works in this version, but not in the next."""

from seq2seq.tasks.translation import Translation  # noqa: F401
