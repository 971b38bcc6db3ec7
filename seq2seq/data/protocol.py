"""What the tasks require of a data set in addition to `common.task.Data`."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from common.task import Data, Split
from seq2seq.tokenizers.protocol import TextTokenizer
from seq2seq.tokenizers.vocabulary import VocabularyTokenizer
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


class SingleTextData(Data, Protocol):
    """Single texts, and the tokenizer of a masked language model."""

    def text_tokenizer(self) -> VocabularyTokenizer:
        """The tokenizer. Without one from `use`, the first call reads it from a file, or trains it on train."""

    def use(self, tokenizer: VocabularyTokenizer) -> None:
        """Use a checkpoint's tokenizer instead; raises UserError if it has no mask entry."""

    def view(self, text: str, id: int = 0) -> dict[str, Any]:
        """Make a sample of a user's text of any length: id, tokens (n,) int64 and text.

        Each `mask_text` of the tokenizer in the text becomes its mask entry.
        """


class SentenceData(SingleTextData, Protocol):
    """Sentences for masked language modelling. A sample has id and tokens (n,) int64 with special entries at the ends.

    A batch has ids, tokens (B, N) int64, padded on the right, and `rows`, the tokens of each sample without padding as
    a list of int64 arrays, which stay in the memory of the CPU. One from `view` also has texts.
    """

    def token_counts(self) -> NDArray[np.int64]:
        """How often each entry of the vocabulary occurs in train: (V,)."""


class LabelledTextData(SingleTextData, Protocol):
    """Texts with a class each. A batch is as in `SentenceData`, with labels (B,) int64 and lengths (B,) int64."""

    def classes(self) -> Sequence[str]:
        """The names of the classes, by index."""

    def set_learnt_classes(self, classes: Sequence[str]) -> None:
        """Receive the names of the classes of a checkpoint; labels are then indices of these."""


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
