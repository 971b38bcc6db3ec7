"""Former path of seq2seq.criterion.cross_entropy.

Importing from here still works in this version, but not in the next.
"""

from seq2seq.criterion.cross_entropy import LossOptions  # noqa: F401
