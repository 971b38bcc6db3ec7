"""Random splits of a data set, which do not depend on a run's seed."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from common.data.names import composed
from common.errors import UserError
from common.machine.seeds import generator, mix


def random_parts(counts: Sequence[int], *seed: int | str) -> list[NDArray[np.int64]]:
    """Split range(sum(counts)) at random into parts of the sizes `counts`; returns the sorted indices of each part.

    `seed` is one or more integers or strings. The parts depend only on `counts` and `seed`.
    """
    order = torch.randperm(sum(counts), generator=generator(*seed)).numpy()
    return [np.sort(part) for part in np.split(order, np.cumsum(counts[:-1]))]


def split_off_val(count: int, val_count: int, name: str, remedy: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose `val_count` of `count` samples at random for val; returns the indices of the train and of the val samples.

    Raises UserError if no sample is left for train. The message calls the data set `name` and advises "give val
    `remedy`".
    """
    if val_count >= count:
        raise UserError(
            f"data.val_count={val_count} leaves nothing of the {count} images of {name}; give val {remedy}, or a "
            "smaller data.val_count."
        )
    val, train = random_parts((val_count, count - val_count), "val of train", val_count)
    return train, val


def cut_by_name(names: Sequence[str], shares: Sequence[float], rest: int = 0) -> list[list[int]]:
    """Split the samples `names` into a part for each of `shares`, and the rest.

    Returns a sorted list of indices for each part, and a last one for the rest. A share is a fraction of all samples,
    and its part has at least one sample. But a part is made smaller, even empty, if this is necessary to leave at least
    `rest` samples for the rest.

    The samples are ordered by a hash of the last component of their name, and the parts are taken in this order.
    Samples with the same last component are ordered by their whole name. So the parts do not depend on the order of
    `names`. If all last components differ, the parts do not depend on the folders in `names` either. A data set that is
    stored in several formats, with other folders, is then split in the same way in each format.
    """

    def order(index: int) -> tuple[int, str]:
        name = composed(names[index].replace("\\", "/"))
        return mix("parts of train", name.rpartition("/")[2]), name

    indices = sorted(range(len(names)), key=order)
    parts = []
    for share in shares:
        size = min(max(1, round(share * len(names))), max(0, len(indices) - rest))
        parts.append(sorted(indices[:size]))
        indices = indices[size:]
    return [*parts, sorted(indices)]
