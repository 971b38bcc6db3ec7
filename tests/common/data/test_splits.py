"""Random splits: complete, disjoint and reproducible."""

import pytest
import torch

from common.data.splits import cut_by_name, random_parts, split_off_val
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


def test_a_cut_by_name_keeps_samples_for_the_rest_where_it_is_to() -> None:
    """The rest gives way to the parts otherwise, and the first part precedes the second."""
    sizes = {count: [len(part) for part in cut_by_name([*"abcd"[:count]], [0.1, 0.5], rest=1)] for count in range(5)}
    assert sizes == {0: [0, 0, 0], 1: [0, 0, 1], 2: [1, 0, 1], 3: [1, 1, 1], 4: [1, 2, 1]}
    assert [len(part) for part in cut_by_name(["a", "b"], [0.1, 0.1])] == [1, 1, 0]
    assert cut_by_name([*"abcdefgh"], [0.3], rest=1) == cut_by_name([*"abcdefgh"], [0.3])
