"""Random splits: complete, disjoint and reproducible."""

import pytest
import torch

from common.data.splits import random_parts, split_off_val
from common.errors import UserError
from common.machine.seeds import generator


def test_parts_hold_every_index_once_in_order_and_depend_on_the_seed_alone() -> None:
    parts = random_parts((5, 0, 20), "a", 1)
    assert [len(part) for part in parts] == [5, 0, 20]
    assert sorted(index for part in parts for index in part.tolist()) == [*range(25)]
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert all((a == b).all() for a, b in zip(parts, random_parts((5, 0, 20), "a", 1), strict=True))
    assert random_parts((5, 20), "a", 2)[0].tolist() != parts[0].tolist()


def test_val_is_the_start_of_the_same_permutation_as_in_earlier_versions() -> None:
    """A resumed run must use the split with which it was started."""
    order = torch.randperm(50, generator=generator("val of train", 8)).tolist()
    train, val = split_off_val(50, 8, "photos", "a folder of its own")
    assert (train.tolist(), val.tolist()) == (sorted(order[8:]), sorted(order[:8]))


def test_a_val_that_leaves_nothing_to_train_on_is_refused() -> None:
    message = "data.val_count=50 leaves nothing of the 50 images of photos; give val a folder of its own, or a smaller"
    with pytest.raises(UserError, match=message):
        split_off_val(50, 50, "photos", "a folder of its own")
