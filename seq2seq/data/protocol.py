"""What the tasks of translation and language modelling require of a data set in addition to `common.task.Data`."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

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


class TextAmounts(NamedTuple):
    """How much text a split has."""

    tokens: int
    characters: int  # Unicode characters
    bytes_: int  # in UTF-8
    unknown: int  # tokens that stand for something outside the vocabulary


class LanguageData(Data, Protocol):
    """A text as one sequence of tokens, in blocks for training and in windows for evaluation (see seq2seq.data.text).

    A batch has tokens and the targets that follow them, int64 (B, N), and `counts`, boolean (B, N), which is True where
    a target counts. In val and test, each token of the split counts in exactly one sample.
    """

    block: int  # the maximum number of tokens of a sample

    @property
    def evaluation_stride(self) -> int:
        """The number of targets that count in a sample of val or test, but for the last one."""

    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer. Without one from `use`, the first call trains it on the split train."""

    def use(self, tokenizer: TextTokenizer) -> None:
        """Use a checkpoint's tokenizer instead of training one."""

    def amounts(self, split: Split) -> TextAmounts:
        """The numbers of tokens, characters and bytes of a split."""

    def encode(self, text: str) -> list[int]:
        """The ids of a user's text, as in the middle of a longer text."""
