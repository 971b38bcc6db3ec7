"""What the tasks require of a data set in addition to `common.task.Data`."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.task import Data, Split
from seq2seq.tokenizers.protocol import TextTokenizer
from seq2seq.tokenizers.words import Vocabulary, WordOptions


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


class WordData(Data, Protocol):
    """Words of a text with the windows around them, for word2vec.

    A batch has `words`, `left` and `right` (N,), int64: the words of its passages, and the numbers of words before and
    after each that are its context; and `lengths` (B,), the number of words of each passage.
    """

    options: WordOptions
    window: int  # maximum number of context words on each side

    @property
    def vocabulary(self) -> Vocabulary:
        """The words of the split train or, after `use`, those of a checkpoint."""

    def use(self, vocabulary: Vocabulary) -> None:
        """Use a checkpoint's vocabulary instead of counting the words of train."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """The expected share of each word among the words of batches: (V,)."""
