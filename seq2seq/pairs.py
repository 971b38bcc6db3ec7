"""Former path of seq2seq.data.pairs. Importing from here still works in this version, but not in the next."""

from seq2seq.data.pairs import EMPTY_CORPUS as NOTHING  # noqa: F401
from seq2seq.data.pairs import Corpus, SentencePairs  # noqa: F401
