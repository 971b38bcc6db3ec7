"""Scores of translations by the length of their sources (Bahdanau et al. 2015, arXiv 1409.0473, figure 2)."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from sacrebleu.metrics.bleu import BLEU

LIMITS = (0, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60)  # the longest source of each group but the last


class LengthScore(NamedTuple):
    """The scores of the sentences whose sources have similar lengths."""

    lengths: str  # from-to, such as 3-4 or 61+
    sentences: int
    bleu: float  # 0 to 100
    exact_match: float  # 0 to 1


def source_length(text: str, by_characters: bool) -> int:
    """The number of words between spaces or, for languages without spaces, of characters that are not spaces."""
    return len("".join(text.split())) if by_characters else len(text.split())


def scores_by_length(
    lengths: Sequence[int], translations: Sequence[str], references: Sequence[str], bleu: BLEU
) -> list[LengthScore]:
    """The scores of each group of sentences with similar source lengths, shortest first; empty groups are left out.

    `bleu` should have the option `effective_order`: a group of references of fewer than four words has no 4-grams, and
    the precisions of shorter n-grams are then averaged without them.
    """
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(bisect_left(LIMITS, length), []).append(row)
    scores = []
    for group, rows in sorted(groups.items()):
        pairs = [(translations[row], references[row]) for row in rows]
        exact = sum(translation == reference for translation, reference in pairs) / len(rows)
        value = bleu.corpus_score([pair[0] for pair in pairs], [[pair[1] for pair in pairs]]).score
        scores.append(LengthScore(_name(group), len(rows), value, exact))
    return scores


def _name(group: int) -> str:
    """The lengths in a group: 0, 1-2, 3-4 ... 61+."""
    first = LIMITS[group - 1] + 1 if group else 0
    if group == len(LIMITS):
        return f"{first}+"
    return f"{first}-{LIMITS[group]}" if LIMITS[group] > first else f"{first}"
