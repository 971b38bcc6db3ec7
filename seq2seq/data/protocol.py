"""What translation asks of its data beyond `common.task.Data`."""

from collections.abc import Sequence
from typing import Any, Protocol

from common.task import Data, Split
from seq2seq.tokenizers.protocol import TextTokenizer


class TextData(Data, Protocol):
    """Pairs of sentences in two languages, and the tokenizers of both."""

    source: str  # the language to translate from: en, zh_Hant ...
    target: str

    def tokenizers(self) -> tuple[TextTokenizer, TextTokenizer]:
        """Those of source and target, learnt from train at the first call; one and the same when joint."""

    def use(self, source: TextTokenizer, target: TextTokenizer) -> None:
        """Take a checkpoint's tokenizers in place of own ones, which then are never learnt."""

    def categories(self, split: Split) -> Sequence[str] | None:
        """The kind of text of each pair, for sets that know it."""

    def view(self, line: str, target: str | None = None, id: int = 0) -> dict[str, Any]:
        """A user's sentence, and perhaps its given translation, as a sample, of any length."""
