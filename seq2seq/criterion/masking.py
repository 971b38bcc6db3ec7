"""Which tokens of a text are masked, and what replaces them (Devlin et al. 2019, arXiv 1810.04805, section 3.1).

Of a text of n tokens, the special entries at its ends included, exactly max(1, round(share * n)) are selected, or all
if there are fewer. Each is replaced by the mask entry, by a random entry, or by itself. This is the authors' way of
masking (create_pretraining_data.py). Masks with a probability for each token, as transformers samples them, vary in
number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from common.machine.seeds import mix
from common.types import Fraction


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Options of masking. Raises UserError if nothing is masked, or if `replaced` + `random` exceeds 1.

    share: the fraction of a text's tokens that are predicted.
    replaced: the fraction of these that become the mask entry.
    random: the fraction of these that become a random entry of the vocabulary. The others stay as they are.
    whole_words: whether all tokens of a word are selected together (the authors' later "whole word masking").
    """

    share: Fraction
    replaced: Fraction
    random: Fraction
    whole_words: bool

    def __post_init__(self) -> None:
        if not self.share or self.replaced + self.random > 1 + 1e-9:
            raise UserError(
                f"task.masks.share={self.share}, task.masks.replaced={self.replaced} and "
                f"task.masks.random={self.random}: expected a share above 0, and a sum of the other two of at most 1; "
                "give 0.15, 0.8 and 0.1 as published."
            )


class Entries(NamedTuple):
    """What masking needs to know about a vocabulary of V entries."""

    mask: int  # the id of the mask entry
    pad: int  # the id of padding
    fixed: NDArray[np.bool_]  # (V,): which entries are never selected
    begins_word: NDArray[np.bool_]  # (V,): which entries begin a word


class Masked(NamedTuple):
    """A batch of B texts with M masked tokens, on the CPU."""

    inputs: Tensor  # the tokens that the model reads, padded on the right, (B, N) int64
    selected: Tensor  # indices of the masked tokens into the flattened B * N tokens, (M,) int64, ascending
    targets: Tensor  # the tokens to be predicted, (M,) int64
    counts: list[int]  # the number of masked tokens of each text


def mask_batch(
    rows: Sequence[NDArray[np.int64]], seeds: Sequence[int | str], options: MaskOptions, entries: Entries
) -> Masked:
    """Mask the tokens of each text, `rows`. A text's mask depends only on its own seed and tokens."""
    width = max(map(len, rows))
    inputs, targets = np.full((2, len(rows), width), entries.pad, np.int64)
    selected, counts = [np.empty(0, np.int64)], []
    for i, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        rng = np.random.default_rng(mix(seed, "masked"))
        positions = np.sort(select(row, options, entries, rng))
        inputs[i, : len(row)] = targets[i, : len(row)] = row
        inputs[i, positions] = replace(row[positions], options, entries, rng)
        selected.append(i * width + positions)
        counts.append(len(positions))
    indices = torch.from_numpy(np.concatenate(selected))
    return Masked(torch.from_numpy(inputs), indices, torch.from_numpy(targets).flatten()[indices], counts)


def mask_count(length: int, options: MaskOptions) -> int:
    """How many tokens of a text of `length` tokens, its special entries included, are masked, if it has as many."""
    return max(1, round(options.share * length))


def select(
    tokens: NDArray[np.int64], options: MaskOptions, entries: Entries, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Select the positions to mask of one text (n,), in random order.

    With `whole_words`, words are taken in random order, and a word with more tokens than may still be selected is
    skipped, as by the authors. If all words are too long, the first tokens of the first one are selected.
    """
    candidates = np.flatnonzero(~entries.fixed[tokens])
    count = min(mask_count(len(tokens), options), len(candidates))
    if not options.whole_words or not count:
        return rng.permutation(candidates)[:count]
    begins = entries.begins_word[tokens[candidates]]
    begins |= np.diff(candidates, prepend=-2) > 1  # the first token of a text, or the first after a fixed entry
    words = np.split(candidates, np.flatnonzero(begins)[1:])
    order = [words[i] for i in rng.permutation(len(words)).tolist()]
    selected: list[int] = []
    for word in order:
        if len(selected) + len(word) <= count:
            selected += word.tolist()
    return np.array(selected or order[0][:count].tolist(), np.int64)


def replace(
    tokens: NDArray[np.int64], options: MaskOptions, entries: Entries, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Replace each selected token (m,) by the mask entry, by a random entry of all V, or by itself."""
    draws, others = rng.random(len(tokens)), rng.integers(0, len(entries.fixed), len(tokens))
    is_random = draws < options.replaced + options.random
    return np.where(draws < options.replaced, entries.mask, np.where(is_random, others, tokens))
