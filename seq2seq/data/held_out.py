"""Cut val and test from the texts of train by a hash, so that no text is in two splits."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from common.errors import UserError
from common.machine.seeds import mix
from common.task import Split

# The share, and the maximum number, of train's different texts that are cut as val or test by default.
DEFAULT_SHARE, MAX_DEFAULT_COUNT = 0.1, 1000


def cut(
    texts: Iterable[str], shares: dict[Split, float | None], origin: str, others: Iterable[str] = ()
) -> tuple[dict[Split, NDArray[np.int64]], int]:
    """Divide `texts` into train and the splits in `shares`; returns the rows of each, and how many texts are left out.

    A split gets the given share of the different texts or, for None, `DEFAULT_SHARE` of them but at most
    `MAX_DEFAULT_COUNT`. The selection depends only on the texts and on how many are selected; that of the first split
    in `shares` does not depend on the others. A selected text that occurs again is left out there. A text of `others`,
    which are those of splits with files of their own, is not selected. Raises UserError, which names `origin`, if
    nothing remains for train.
    """
    digests = np.fromiter(map(digest, texts), np.int64)
    different, first_rows = np.unique(digests, return_index=True)  # in ascending order of the hashes
    new = ~np.isin(different, np.fromiter(map(digest, others), np.int64))
    different, first_rows = different[new], first_rows[new]
    parts: dict[Split, NDArray[np.int64]] = {}
    start = 0
    for split, share in shares.items():
        count = round((DEFAULT_SHARE if share is None else share) * len(different))
        count = max(count, int(share != 0 and len(different) > 2))  # so that the split is not empty
        count = min(count, MAX_DEFAULT_COUNT) if share is None else count
        parts[split] = np.sort(first_rows[start : start + count])
        start += count
    if start and start >= len(different):
        keys = " and ".join(
            f"data.{split}_share={'null' if share is None else share}" for split, share in shares.items()
        )
        raise UserError(
            f"{keys} leaves nothing of the {len(different):,} different texts of {origin}; give less, or separate "
            f"files ({', '.join(f'data.{split}' for split in shares)})."
        )
    train = np.flatnonzero(~np.isin(digests, different[:start]))
    return {"train": train, **parts}, len(digests) - len(train) - start


def digest(text: str) -> int:
    """A 63-bit hash. Texts are selected in ascending order of hashes, whatever their order in the file."""
    return mix("parts of train", text)
