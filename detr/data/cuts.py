"""Cut val and test from the images of train, for a data set that has no files for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data.splits import cut_by_name, split_off_val
from common.errors import UserError


def cut_train(
    images: list[dict[str, Any]], shares: Mapping[str, float], val_count: int | None, path: Path
) -> dict[str, list[int]]:
    """Divide the images of train; returns the image ids of train and of each split that is cut from it.

    The division depends neither on the run's seed nor on the order of the images.

    Args:
        images: the entries "images" of the train JSON.
        shares: the fraction of the images that each split gets. A hash of the file names selects the images
            (`common.data.splits.cut_by_name`).
        val_count: the number of images that val gets, selected at random; val's share is then ignored. None = val gets
            its share, if `shares` has one.
        path: the train JSON, for messages.

    Raises UserError if no image is left for train.
    """
    shares = {name: share for name, share in shares.items() if name != "val" or val_count is None}
    parts = cut_by_name([image["file_name"] for image in images], list(shares.values()))
    names = [*shares, "train"]
    splits = {name: sorted(images[i]["id"] for i in part) for name, part in zip(names, parts, strict=True)}
    if not splits["train"]:
        keys = " and ".join(f"data.{name}_share={share}" for name, share in shares.items())
        raise UserError(f"{keys} leave nothing of the {len(images)} images of {path}; give smaller shares, or 0.")
    if val_count is not None:
        ids = splits["train"]
        alternative = "files of its own (data.val.images, data.val.annotations)"
        train, val = split_off_val(len(ids), val_count, str(path), alternative)
        splits |= {"train": [ids[i] for i in train], "val": [ids[i] for i in val]}
    return splits
