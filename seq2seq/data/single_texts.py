"""The base class of data sets of single texts for encoder-only models: the tokenizer, and padded batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from common.task import Batch
from common.types import Positive, Range
from seq2seq.tokenizers import files
from seq2seq.tokenizers.vocabulary import VocabularyTokenizer
from seq2seq.tokenizers.word_piece import WordPiece

Length = Annotated[int, Range(low=3, high=1_000_000)]  # of a sample in tokens: its two special entries and one more


@dataclass(frozen=True, kw_only=True)
class WordPieceOptions:
    """The tokenizer of an encoder-only model.

    file: tokenizer.json, vocab.txt, vocab.json (with merges.txt beside it), or the folder that holds them; None = a
        WordPiece is trained on the split train (its first 100 million characters).
    vocabulary: number of entries of a trained WordPiece, including the 5 special ones and all characters.
    lowercase: whether a trained WordPiece converts text to lower case and removes accents.
    """

    file: str | None
    vocabulary: Annotated[int, Range(low=1, high=1_000_000)]  # the library reserves memory for all entries at once
    lowercase: bool


@dataclass(kw_only=True, eq=False)
class SingleTexts(ABC):
    """Texts, each with the tokenizer's special entries at its ends ([CLS] and [SEP]).

    The tokenizer is that of `use`, that of `tokenizer.file`, or a WordPiece trained on the split train.

    Args:
        tokenizer: see WordPieceOptions.
        longest: maximum number of tokens of a sample.
        batch_size: maximum size of the batch of one optimizer step, in padded tokens: the number of samples times the
            number of tokens of the longest.
    """

    batch_unit: ClassVar[str] = "tokens"

    tokenizer: WordPieceOptions
    longest: Length
    batch_size: Positive

    def __post_init__(self) -> None:
        """Raise UserError if `longest` exceeds `batch_size`."""
        if self.longest > self.batch_size:
            raise UserError(
                f"data.longest={self.longest} is more than data.batch_size={self.batch_size}, both in tokens; lower "
                "data.longest or raise data.batch_size."
            )
        self._tokenizer: VocabularyTokenizer | None = None
        self.tokenizer_notes: list[str] = []

    @abstractmethod
    def training_texts(self) -> Iterable[str]:
        """The texts of train on which a tokenizer is trained."""

    @abstractmethod
    def forget_tokens(self) -> None:
        """Forget all token ids, because the tokenizer has changed."""

    def text_tokenizer(self) -> VocabularyTokenizer:
        """The tokenizer; without one from `use`, the first call reads its file or trains it.

        Raises UserError for a tokenizer without a mask entry, such as GPT-2's.
        """
        if self._tokenizer is None:
            options = self.tokenizer
            if options.file is None:
                trained = WordPiece.train(self.training_texts(), options.vocabulary, lowercase=options.lowercase)
                self._tokenizer = trained
            else:
                self._tokenizer, self.tokenizer_notes = files.read(Path(options.file).expanduser())
                refuse_without_mask(self._tokenizer, f"data.tokenizer.file={options.file}")
        return self._tokenizer

    def use(self, tokenizer: VocabularyTokenizer) -> None:
        """Use a checkpoint's tokenizer; raises UserError if it has no mask entry."""
        refuse_without_mask(tokenizer, "The checkpoint's tokenizer")
        self._tokenizer = tokenizer
        self.forget_tokens()

    def framed(self, ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
        """Put the tokenizer's begin and end entries around ids: (n,) -> (n + 2,) int64."""
        special = self.text_tokenizer().special
        return np.concatenate([[special.begin], np.asarray(ids, np.int64), [special.end]])

    def view(self, text: str, id: int = 0) -> dict[str, Any]:
        """Make a sample of a user's text of any length, in which the tokenizer's `mask_text` is a blank."""
        return {"id": id, "tokens": self.framed(self.text_tokenizer().encode_with_blanks(text)), "text": text}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Make a batch: ids, tokens int64 (B, N) padded on the right, their lengths (B,), and rows without padding.

        If the samples have "text", the batch has texts; if they have "label", it has labels (B,) int64.
        """
        lengths = [len(sample["tokens"]) for sample in samples]
        padding = self.text_tokenizer().special_entries.pad or 0
        tokens = np.full((len(samples), max(lengths)), padding, np.int64)
        for row, sample in zip(tokens, samples, strict=True):
            row[: len(sample["tokens"])] = sample["tokens"]
        batch: Batch = {
            "ids": [sample["id"] for sample in samples],
            "tokens": torch.from_numpy(tokens),
            "lengths": torch.tensor(lengths),
            "rows": [sample["tokens"] for sample in samples],
        }
        if "text" in samples[0]:
            batch["texts"] = [sample["text"] for sample in samples]
        if "label" in samples[0]:
            batch["labels"] = torch.tensor([sample["label"] for sample in samples])
        return batch

    def tokenizer_summary(self) -> list[str]:
        """Lines on the tokenizer for the start summary."""
        tokenizer = self.text_tokenizer()
        origin = "" if self.tokenizer.file is None else f" of {self.tokenizer.file}"
        return [f"{tokenizer.kind} with {tokenizer.size:,} entries{origin}", *self.tokenizer_notes]


def refuse_without_mask(tokenizer: VocabularyTokenizer, origin: str) -> None:
    """Raise UserError, which begins with `origin`, for a tokenizer without an entry that masks a token."""
    if tokenizer.special_entries.mask is None:
        raise UserError(
            f"{origin} has no entry {tokenizer.mask_text}, so it is not that of a masked language model; give the "
            "tokenizer of BERT or RoBERTa, or null to train one."
        )
