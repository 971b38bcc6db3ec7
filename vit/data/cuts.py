"""Cut val and test from the images of train, for a data set that has no folder for val or no folder for test."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from common.data.splits import cut_by_name, split_off_val
from common.errors import UserError
from common.types import Split
from vit.data.listing import Listing

VAL_SHARE = 0.1
# If train has at least LARGE_SET images, LARGE_VAL_COUNT of them become val by default. A larger val would not select a
# better checkpoint.
LARGE_SET, LARGE_VAL_COUNT = 100_000, 10_000


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """The number or share of train's images that become val and test.

    val_count: number of images to cut as val, chosen at random; 0 = no val, None = `val_share` decides.
    val_share: share of each class to cut as val, used if `val_count` is None; 0 = no val, None = 0.1, or 10,000 images
        chosen at random if train has at least 100,000 images.
    test_share: share of each class to cut as test; 0 = no test.
    """

    val_count: int | None
    val_share: float | None
    test_share: float

    @property
    def has_val(self) -> bool:
        """Whether any images are cut as val."""
        return self.val_count > 0 if self.val_count is not None else self.val_share != 0

    def cut(self, whole: Listing, splits: Collection[Split]) -> tuple[dict[Split, Listing], dict[Split, str]]:
        """Cut `splits` (val, test or both) from the images of `whole`.

        Returns two dicts. The first holds the listing of each of `splits` and of train, which gets the remaining
        images. The second holds a phrase for the log on how each of `splits` was cut.

        The images of a share are chosen within each class by a hash of the file names
        (`common.data.splits.cut_by_name`). Each class gives at least one image to each split that is cut by a share, as
        long as at least one image remains for train. The cut of a class depends only on the shares and on its file
        names, and not on the run's seed or on other classes. Test is cut first, so that its images do not depend on the
        size of val.

        Raises UserError if the sum of the shares is 1 or more, or if `val_count` leaves no image for train.
        """
        count = self._val_count_of(len(whole.files)) if "val" in splits else None
        shares: dict[Split, float] = {"test": self.test_share} if "test" in splits else {}
        if "val" in splits and count is None:
            shares["val"] = VAL_SHARE if self.val_share is None else self.val_share
        if sum(shares.values()) >= 1:
            keys = " and ".join(f"data.{split}_share={share}" for split, share in shares.items())
            raise UserError(
                f"{keys} leave nothing of the {len(whole.files)} images of {whole.folder}; give smaller shares, or 0."
            )
        rows = _cut_classes(whole, shares)
        notes = {split: f"by a hash of the names (data.{split}_share={share})" for split, share in shares.items()}
        if count is not None:
            remedy = "a folder of its own (data.val)"
            train, val = split_off_val(len(rows["train"]), count, str(whole.folder), remedy)
            rows |= {"train": rows["train"][train], "val": rows["train"][val]}
            notes["val"] = f"at random (data.val_count={count})"
        listings = {split: replace(whole, files=whole.files[i], labels=whole.labels[i]) for split, i in rows.items()}
        return listings, notes

    def _val_count_of(self, count: int) -> int | None:
        """Return how many of `count` images to choose at random as val; None if val is cut by a share."""
        if self.val_count is None and self.val_share is None and count >= LARGE_SET:
            return LARGE_VAL_COUNT
        return self.val_count


def _cut_classes(whole: Listing, shares: dict[Split, float]) -> dict[Split, NDArray[np.int64]]:
    """Cut `shares` from each class of `whole`.

    Returns the indices of the images of each split in `shares` and of train, in ascending order.
    """
    if not shares:
        return {"train": np.arange(len(whole.labels))}
    parts: dict[Split, list[int]] = {split: [] for split in (*shares, "train")}
    ends: list[int] = (np.flatnonzero(np.diff(whole.labels)) + 1).tolist()
    for start, end in pairwise((0, *ends, len(whole.labels))):
        # The hash requires valid Unicode, but the name of a file may contain any bytes.
        names = [name.decode(errors="backslashreplace") for name in whole.files[start:end].tolist()]
        rows = cut_by_name(names, list(shares.values()), rest=1)
        for part, of_class in zip(parts.values(), rows, strict=True):
            part += [start + row for row in of_class]
    return {split: np.array(part, dtype=np.int64) for split, part in parts.items()}
