"""Cutting a set into parts at random, the same for any seed of a run."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UserError
from common.machine.seeds import generator


def random_parts(sizes: Sequence[int], *seed: int | str) -> list[NDArray[np.int64]]:
    """Cut range(sum(sizes)) into parts of these sizes at random: the sorted indices of each, the same for one seed."""
    order = torch.randperm(sum(sizes), generator=generator(*seed)).numpy()
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes[:-1]))]


def split_off_val(count: int, val_count: int, whole: str, own: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of train and of a val cut from its `count` samples.

    Raises UserError when nothing would be left; `whole` names the set there, and `own` says how val is given instead.
    """
    if val_count >= count:
        raise UserError(
            f"data.val_count={val_count} leaves nothing of the {count} images of {whole}; give val {own}, or a smaller "
            "data.val_count."
        )
    val, train = random_parts((val_count, count - val_count), "val of train", val_count)
    return train, val
