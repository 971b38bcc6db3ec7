"""Masks: their exact number, their shares, their seeds, and whole words."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from seq2seq.criterion.masking import Entries, MaskOptions, mask_batch, mask_count, select

PUBLISHED = MaskOptions(share=0.15, replaced=0.8, random=0.1, whole_words=False)
WORDS = MaskOptions(share=0.15, replaced=0.8, random=0.1, whole_words=True)
PAD, UNK, CLS, SEP, MASK, SIZE = 0, 1, 2, 3, 4, 100
FIXED = np.isin(np.arange(SIZE), [PAD, CLS, SEP, MASK])
ENTRIES = Entries(MASK, PAD, FIXED, np.arange(SIZE) % 3 != 0)  # every third entry continues a word


def text(length: int, seed: int = 0) -> np.ndarray:
    """A text of `length` tokens with its special entries."""
    words = np.random.default_rng(seed).integers(5, SIZE, length - 2)
    return np.concatenate([[CLS], words, [SEP]])


@pytest.mark.parametrize(
    ("length", "expected"), [(3, 1), (9, 1), (10, 2), (20, 3), (30, 4), (34, 5), (128, 19), (512, 77)]
)
def test_the_number_of_masked_tokens_is_exact_and_counts_special_entries(length, expected):
    """round(0.15 * 10) = round(1.5) = 2 and round(0.15 * 30) = round(4.5) = 4, as Python rounds, and the authors."""
    assert mask_count(length, PUBLISHED) == expected
    masked = mask_batch([text(length)], [0], PUBLISHED, ENTRIES)
    assert masked.counts == [expected] and len(masked.selected) == len(masked.targets) == expected


def test_a_text_of_fewer_tokens_is_masked_whole_and_special_entries_never_are():
    everything = MaskOptions(share=1.0, replaced=1.0, random=0.0, whole_words=False)
    row = np.array([CLS, 7, UNK, SEP, 8, SEP])
    masked = mask_batch([row, np.array([CLS, SEP])], [0, 1], everything, ENTRIES)
    assert masked.counts == [3, 0]
    assert masked.inputs.tolist() == [[CLS, MASK, MASK, SEP, MASK, SEP], [CLS, SEP, PAD, PAD, PAD, PAD]]
    assert masked.targets.tolist() == [7, UNK, 8] and masked.selected.tolist() == [1, 2, 4]


def test_targets_are_the_tokens_that_were_masked_and_others_stay():
    rows = [text(40, seed) for seed in range(5)] + [text(12, 9)]
    masked = mask_batch(rows, range(6), PUBLISHED, ENTRIES)
    original = torch.zeros(6, 40, dtype=torch.int64)
    for i, row in enumerate(rows):
        original[i, : len(row)] = torch.from_numpy(row)
    assert torch.equal(masked.targets, original.flatten()[masked.selected])
    changed = (masked.inputs != original).flatten().nonzero()[:, 0]
    assert {*changed.tolist()} <= {*masked.selected.tolist()}
    assert masked.counts == [6] * 5 + [2] and (masked.selected.diff() > 0).all()


def test_eighty_percent_become_the_mask_and_ten_percent_any_entry():
    """Standard deviations of the shares of 15,000 tokens are below 0.004; random entries are all SIZE, even MASK."""
    rows = [text(100, seed) for seed in range(1000)]
    masked = mask_batch(rows, range(1000), PUBLISHED, ENTRIES)
    inputs = masked.inputs.flatten()[masked.selected]
    is_mask, is_same = inputs == MASK, inputs == masked.targets
    assert len(inputs) == 15_000
    assert is_mask.float().mean().item() == pytest.approx(0.8 + 0.1 / SIZE, abs=0.015)
    assert is_same.float().mean().item() == pytest.approx(0.1 + 0.1 / SIZE, abs=0.015)
    others = inputs[~is_mask & ~is_same]
    assert len({*others.tolist()}) == SIZE - 1 and others.float().mean().item() == pytest.approx(SIZE / 2, rel=0.06)
    positions = masked.selected % 100
    assert {*positions.tolist()} == {*range(1, 99)}


def test_a_mask_depends_only_on_its_own_seed():
    rows = [text(20, seed) for seed in range(3)]
    together = mask_batch(rows, [5, 6, 7], PUBLISHED, ENTRIES)
    for i, seed in enumerate((5, 6, 7)):
        alone = mask_batch(rows[i : i + 1], [seed], PUBLISHED, ENTRIES)
        assert torch.equal(alone.inputs[0], together.inputs[i])
    other = mask_batch(rows, [8, 6, 7], PUBLISHED, ENTRIES)
    assert not torch.equal(other.inputs[0], together.inputs[0]) and torch.equal(other.inputs[1:], together.inputs[1:])


def test_whole_words_are_masked_together():
    for seed in range(200):
        row = text(60, seed)
        positions = np.sort(select(row, WORDS, ENTRIES, np.random.default_rng(seed)))
        assert 1 <= len(positions) <= mask_count(60, WORDS)
        begins = ENTRIES.begins_word[row]
        begins[1] = True  # the first token of a text
        for position in positions.tolist():
            end = position + 1
            while end < 59 and not begins[end]:
                end += 1
            start = position
            while not begins[start]:
                start -= 1
            assert {*range(start, end)} <= {*positions.tolist()}


def test_a_word_longer_than_the_number_of_masks_is_masked_in_part():
    row = np.array([CLS, 6, 9, 12, 15, 18, SEP])  # five tokens of one word
    assert ENTRIES.begins_word[row[1:-1]].sum() == 0
    positions = select(row, WORDS, ENTRIES, np.random.default_rng(0))
    assert positions.tolist() == [1]


@pytest.mark.parametrize("options", [{"share": 0.0}, {"replaced": 0.8, "random": 0.3}])
def test_shares_that_cannot_be_are_refused(options):
    with pytest.raises(UserError, match="expected a share above 0, and a sum of the other two of at most 1"):
        MaskOptions(**{"share": 0.15, "replaced": 0.8, "random": 0.1, "whole_words": False, **options})
