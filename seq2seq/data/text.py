"""Text for language models: files of any size, or Python's documentation, as one sequence of tokens cut into blocks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from common.data import fingerprints
from common.data.costs import equal_costs
from common.errors import UserError
from common.machine.seeds import mix
from common.task import Batch, Split
from common.types import SPLITS, Positive, Share
from seq2seq.data import docstrings, token_file
from seq2seq.data.protocol import TextAmounts
from seq2seq.data.text_lines import MAX_SEARCH_BYTES, TextLines, text_files
from seq2seq.data.token_file import TokenStream
from seq2seq.tokenizers import training
from seq2seq.tokenizers.bpe import TokenizerOptions
from seq2seq.tokenizers.protocol import TextTokenizer

# The share, and the maximum number of bytes, of the end of train's file that is cut as val or test by default.
DEFAULT_SHARE, MAX_DEFAULT_BYTES = 0.1, 1_000_000
PIECE_BYTES = 1 << 18  # bytes of text that are tokenized at a time
MAX_TRAINING_PIECES = 400  # a tokenizer is trained on the first 400 pieces of train, about 100 MB


class Passage(NamedTuple):
    """The text of one split."""

    pieces: Callable[[], Iterator[str]]  # yields the text in pieces of about `PIECE_BYTES`
    origin: str  # what was read, for messages
    version: str | None = None  # of Python, whose documentation it is


EMPTY = Passage(partial(iter, ()), "")


@dataclass(kw_only=True, eq=False)
class Text:
    """A text, which is tokenized once into one sequence of T tokens per split.

    A training epoch consists of blocks of `block` tokens, side by side, in random order. The first block begins after a
    random number of tokens, from 0 to `block` - 1, which depends on the run's seed and on the epoch. So the tokens that
    begin a block, which are predicted from few tokens, differ from epoch to epoch. There are T // block - 1 blocks (at
    least 1), so that fewer than 2 * `block` tokens at both ends are left out of an epoch.

    In val and test, each token is predicted exactly once. A window holds up to `block` tokens, of which the last
    `stride` are predicted, and the next window begins `stride` tokens later. So each token is predicted from at least
    `block` - `stride` tokens before it, or from all there are. The first token of a split is predicted from the
    tokenizer's begin token.

    The constructor opens no file. A mistake in a file raises UserError when its split is first used.

    Args:
        train: a text file in UTF-8, plain or compressed, or a pattern such as 'texts/*.txt'; None = the documentation
            strings of Python's standard library, which also are val and test unless these have files.
        val: text file or pattern of the split that selects the checkpoint. None = it is cut from train's end.
        test: text file or pattern of the split with the reported numbers. None = it is cut from train's end.
        val_share: the fraction of train's bytes to cut as val, before test; None = 0.1, but at most 1,000,000 bytes. 0
            = no val. The cut is at the next line end. If there is none within 64 KiB, or within half of a part of less
            than 128 KiB, the cut is at the next space or, without one, at the next character.
        test_share: like `val_share`, for test, which is the last part of the text.
        tokenizer: options of the tokenizer, which is trained on train only (its first 100 MB).
        block: number of tokens that are predicted in a training sample, and the longest context in evaluation.
        stride: number of tokens that a window of val or test predicts; None = half of `block`.
        batch_size: maximum size of the batch of one optimizer step, in tokens.
        cache: folder for the tokens of the splits, 2 or 4 bytes each, in a file whose name is a digest of text and
            tokenizer; None = they are held in memory.
    """

    batch_unit: ClassVar[str] = "tokens"

    train: str | None
    val: str | None
    test: str | None
    val_share: Share | None
    test_share: Share | None
    tokenizer: TokenizerOptions
    block: Positive
    stride: Positive | None
    batch_size: Positive
    cache: str | None

    def __post_init__(self) -> None:
        """Raise UserError if `block` exceeds `batch_size`, or `stride` exceeds `block`."""
        if self.block > self.batch_size:
            raise UserError(
                f"data.block={self.block} is more than data.batch_size={self.batch_size}, both in tokens; lower "
                "data.block or raise data.batch_size."
            )
        if self.stride is not None and self.stride > self.block:
            raise UserError(
                f"data.stride={self.stride} is more than data.block={self.block}, so that some tokens would never be "
                "predicted; give at most data.block."
            )
        self._tokenizer: TextTokenizer | None = None
        self._streams: dict[Split, TokenStream] = {}
        self._digests: dict[Split, str] = {}
        self._passages: dict[Split, Passage] = {}

    @property
    def evaluation_stride(self) -> int:
        """The number of tokens that a window of val or test predicts."""
        return self.stride or max(1, self.block // 2)

    def text_tokenizer(self) -> TextTokenizer:
        """The tokenizer. Without one from `use`, the first call trains it on the split train."""
        if self._tokenizer is None:
            pieces = self._passage("train").pieces()
            self._tokenizer = training.train(islice(pieces, MAX_TRAINING_PIECES), self.tokenizer)
        return self._tokenizer

    def use(self, tokenizer: TextTokenizer) -> None:
        """Use a checkpoint's tokenizer instead of training one."""
        self._tokenizer = tokenizer
        self._streams = {}

    def count(self, split: Split) -> int:
        """Number of blocks of train, or of windows of val or test; 0 if there is no such split."""
        tokens = len(self._stream(split).ids)
        if split == "train":
            return max(1, tokens // self.block - 1)
        return -(-tokens // self.evaluation_stride)

    def cost(self, split: Split) -> NDArray[np.int64]:
        """Number of tokens of each block or window, which is the same for all: (n,), without memory of its own."""
        return equal_costs(min(self.block, len(self._stream(split).ids)), self.count(split))

    def sample(self, split: Split, index: int, generator: torch.Generator | None) -> dict[str, Any]:
        """One block of train, with the first block at the start of the text, or one window of val or test.

        A sample has id (its index), tokens (N,), the targets (N,) that follow each of them, and `first`, the index of
        the first target that counts. There is no augmentation, so `generator` is not used.
        """
        tokens = len(self._stream(split).ids)
        if split == "train":
            return self._cut(split, index, index * self.block, index * self.block + min(self.block, tokens))
        first = index * self.evaluation_stride
        end = min(first + self.evaluation_stride, tokens)
        return self._cut(split, index, max(0, end - self.block), end, first)

    def epoch_sample(self, split: Split, index: int, epoch_seed: int) -> dict[str, Any]:
        """One block of train in an epoch; `epoch_seed` determines where the first block begins. See `sample`."""
        tokens = len(self._stream(split).ids)
        length = min(self.block, tokens)
        phases = min(self.block, tokens - self.count(split) * length + 1)
        start = mix(epoch_seed, "phase") % phases + index * length
        return self._cut(split, index, start, start + length)

    def _cut(self, split: Split, index: int, start: int, end: int, first: int | None = None) -> dict[str, Any]:
        """The sample whose targets are the tokens from `start` to `end`, and count from `first` (None = `start`) on."""
        ids = self._stream(split).ids
        targets = ids[start:end].astype(np.int64)
        before = int(ids[start - 1]) if start else self.text_tokenizer().special.begin
        first = 0 if first is None else first - start
        return {"id": index, "tokens": np.append(before, targets[:-1]), "targets": targets, "first": first}

    def where(self, split: Split, index: int) -> str:
        """The tokens of a block or window, and the text that holds them, for messages."""
        step = self.block if split == "train" else self.evaluation_stride
        return f"about {step} tokens from token {index * step:,} on of {self._passage(split).origin}"

    def fingerprint(self, split: Split) -> dict[str, str]:
        """A digest of the split's text and, if it is that of Python, Python's version."""
        version = self._passage(split).version
        return {"text": self._digest(split)} | ({} if version is None else {"Python version": version})

    def amounts(self, split: Split) -> TextAmounts:
        """The numbers of tokens, characters and bytes of a split."""
        stream = self._stream(split)
        return TextAmounts(len(stream.ids), stream.characters, stream.bytes_, stream.unknown)

    def tokens(self, split: Split) -> NDArray[np.int64]:
        """A copy of all tokens of a split: (T,)."""
        return self._stream(split).ids.astype(np.int64)

    def encode(self, text: str) -> list[int]:
        """The ids of a user's text, as in the middle of a longer text."""
        tokenizer = self.text_tokenizer()
        ids: list[int] = getattr(tokenizer, "encode_continuation", tokenizer.encode)(text)
        return ids

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        """Make a batch with ids, tokens and targets, int64 (B, N), and `counts`, boolean (B, N).

        Rows are padded with 0 on the right. `counts` is True where a target counts: not at padding, and not at a token
        that another window predicts.
        """
        longest = max(len(sample["targets"]) for sample in samples)
        tokens, targets = np.zeros((2, len(samples), longest), np.int64)
        counts = np.zeros((len(samples), longest), np.bool_)
        for i, sample in enumerate(samples):
            length = len(sample["targets"])
            tokens[i, :length], targets[i, :length] = sample["tokens"], sample["targets"]
            counts[i, sample["first"] : length] = True
        return {
            "ids": [sample["id"] for sample in samples],
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "counts": torch.from_numpy(counts),
        }

    def summary(self) -> list[str]:
        """Lines for the start summary: the vocabulary, the amounts of each split, and where the tokens are stored."""
        tokenizer = self.text_tokenizer()
        lines = [f"{tokenizer.options.kind}, {tokenizer.size:,} entries"]
        lines += [line for split in SPLITS for line in self.split_summary(split)]
        return lines + ([] if self.cache is None else [f"tokens are stored in {self._folder}"])

    def split_summary(self, split: Split) -> list[str]:
        """The lines of `summary` on one split; empty if there is no such split."""
        tokens, characters, bytes_, unknown = self.amounts(split)
        if not tokens:
            return []
        size = f"{tokens:,} tokens, {characters:,} characters, {bytes_:,} bytes of UTF-8"
        parts = f"{self.count(split):,} blocks of {self.block} tokens"
        if split != "train":
            stride = self.evaluation_stride
            parts = (
                f"each token is predicted once, in windows of {self.block} tokens at a stride of {stride}: from at "
                f"least {self.block - stride} tokens before it"
            )
        lines = [f"{split}: {size}, of {self._passage(split).origin}", f"{split}: {parts}"]
        return lines + [f"{split}: {unknown:,} tokens are outside the vocabulary"] * bool(unknown)

    @property
    def _folder(self) -> Path:
        return Path(self.cache or "").expanduser()

    def __getstate__(self) -> dict[str, Any]:
        """The state for a worker process that is not forked: it maps the files again instead of receiving a copy."""
        return {**self.__dict__, "_passages": {}, "_streams": {} if self.cache else self._streams}

    def _stream(self, split: Split) -> TokenStream:
        if split not in self._streams:
            passage, tokenizer = self._passage(split), self.text_tokenizer()
            if self.cache is None or passage is EMPTY:
                self._streams[split] = token_file.tokenize(passage.pieces(), tokenizer)
            else:
                key = f"{self._digest(split)} {PIECE_BYTES}"
                self._streams[split] = token_file.tokenize_once(self._folder, key, passage.pieces, tokenizer)
        return self._streams[split]

    def _digest(self, split: Split) -> str:
        if split not in self._digests:
            pieces = self._passage(split).pieces()
            self._digests[split] = fingerprints.digest(piece.encode() for piece in pieces)
        return self._digests[split]

    def _passage(self, split: Split) -> Passage:
        """The text of a split; raises UserError for a file that cannot be read, and if nothing is left for train.

        A split with files does not read those of train.
        """
        if split not in self._passages:
            name = self._files[split]
            if split != "train" and name is not None:
                lines = TextLines(text_files(f"data.{split}", name))
                self._passages[split] = Passage(partial(lines.chunks, PIECE_BYTES), name)
            elif self.train is None:
                self._passages[split] = _documentation(split)
            else:
                self._passages |= self._cut_train(self.train)
        return self._passages[split]

    @property
    def _files(self) -> dict[Split, str | None]:
        return {"train": self.train, "val": self.val, "test": self.test}

    def _cut_train(self, name: str) -> dict[Split, Passage]:
        """Divide train's files: the end is test, and the part before it val, unless these splits have files."""
        lines, passages = TextLines(text_files("data.train", name)), dict[Split, Passage]()
        end = lines.total
        shares: dict[Split, float | None] = {"test": self.test_share, "val": self.val_share}
        for split, share in shares.items():
            if self._files[split] is None:
                default = min(DEFAULT_SHARE * lines.total, MAX_DEFAULT_BYTES)
                count = round(default if share is None else share * lines.total)
                start = lines.cut(max(0, end - count), min(count // 2, MAX_SEARCH_BYTES))
                passages[split] = _span(lines, start, end, name)
                end = start
        if not any(piece.strip() for piece in lines.chunks(PIECE_BYTES, 0, end)):
            raise UserError(
                f"data.train={name}: data.val_share and data.test_share leave nothing of its {lines.total:,} bytes; "
                "give less, or files for data.val and data.test."
            )
        return {"train": _span(lines, 0, end, name), **passages}


def _span(lines: TextLines, start: int, stop: int, name: str) -> Passage:
    """The text from byte `start` to byte `stop` of train's files, which the key data.train=`name` names."""
    if start == stop:
        return EMPTY
    whole = (start, stop) == (0, lines.total)
    pieces = partial(lines.chunks, PIECE_BYTES, start, stop)
    return Passage(pieces, name if whole else f"bytes {start:,} to {stop:,} of {name}")


def _documentation(split: Split) -> Passage:
    """The documentation strings of `split`, with an empty line after those of each module."""
    texts = docstrings.docstrings(split)
    pieces = partial(map, "{}\n\n".format, texts)
    return Passage(pieces, docstrings.origin(), docstrings.python_version())
