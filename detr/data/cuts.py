"""Cutting val and test from the images of train, where a data set has no files for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.data.splits import cut_by_name, split_off_val
from common.errors import UserError


def cut_train(
    images: list[dict[str, Any]], shares: Mapping[str, float], val_count: int | None, path: Path
) -> dict[str, list[int]]:
    """Cut the `images` of the JSON `path`; returns the image ids of each split in `shares` and of train.

    A split gets its share of the images by a hash of their names (`common.data.splits.cut_by_name`). If `val_count` is
    given, val gets this number at random instead. Neither choice depends on the run's seed or on the order of the
    images. Raises UserError if no image is left for train.
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
