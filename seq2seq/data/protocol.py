"""What the translation task requires of a data set in addition to `common.task.Data`."""

from collections.abc import Sequence
from typing import Any, Protocol

from common.task import Data, Split
from seq2seq.tokenizers.protocol import TextTokenizer


class TextData(Data, Protocol):
    """Pairs of sentences in two languages, and the tokenizers of both languages."""

    source: str  # the language to translate from: en, zh_Hant ...
    target: str  # the language to translate to

    def tokenizers(self) -> tuple[TextTokenizer, TextTokenizer]:
        """The tokenizers of source and target; a joint tokenizer is returned twice.

        Without tokenizers from `use`, the first call trains them on the split train.
        """

    def use(self, source: TextTokenizer, target: TextTokenizer) -> None:
        """Use a checkpoint's tokenizers instead of training them."""

    def categories(self, split: Split) -> Sequence[str] | None:
        """The category of each pair, or None if the data have no categories."""

    def view(self, line: str, target: str | None = None, id: int = 0) -> dict[str, Any]:
        """Make a sample of a user's sentence of any length and, optionally, its translation.

        The sample has the keys that `SentencePairs.sample` lists. Without a translation, it lacks `target` and
        `target_text`.
        """
