"""Checks of an image folder's layout: class folders one level too high or too low, and classes without images."""

import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from vit.data.layouts import SPLIT_NAMES
from vit.data.listing import Listing

MAX_NAMES = 5  # maximum number of class names in a note
MAX_COUNTS = 20  # with more classes, `class_counts` gives only the smallest and the largest count


def refuse_split_names(classes: Sequence[str], folder: Path) -> None:
    """Raise UserError when `folder` has several class folders and all of them have names of splits.

    In this case, `folder` is the root of the data set and not the folder of a split.
    """
    if len(classes) > 1 and SPLIT_NAMES.issuperset(name.lower() for name in classes):
        raise UserError(
            f"The class folders of {folder} are {', '.join(classes)}, which are names of splits and not of classes; "
            f"give data.root={folder} instead."
        )


def depth_advice(classes: Sequence[str], listing: Listing) -> list[str]:
    """Return a list with one warning when train has a single class, or when no class folder holds images directly.

    Otherwise, the list is empty. `classes` and `listing` are those of train.
    """
    deepest = os.fsdecode(listing.files[0])
    if len(classes) == 1:
        remedy = f"; if {Path(deepest).parts[1]} is a class, give data.train={listing.folder / classes[0]}"
        return [
            f"train has a single class, {classes[0]}, so there is nothing to learn; expected a folder for each class "
            f"in {listing.folder}{remedy if len(Path(deepest).parts) > 2 else ''}."
        ]
    if any(name.count(b"/") == 1 for name in listing.files):
        return []
    return [
        f"no class folder of {listing.folder} holds images itself, but only folders with images: {deepest} is taken "
        f"as an image of the class {Path(deepest).parts[0]}; if {Path(deepest).parts[1]} is its class, the class "
        "folders are one level too high."
    ]


def absent_classes(classes: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Return a list with one note on the classes without images in a split; empty if there are no such classes.

    `counts` holds the split's number of images of each class.
    """
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    more = ", ..." if len(absent) > MAX_NAMES else ""
    return [f"no image of {len(absent)} of {len(classes)} classes ({', '.join(absent[:MAX_NAMES])}{more})"] * bool(
        absent
    )


def class_counts(classes: Sequence[str], counts: Sequence[int]) -> str:
    """Return a line with a split's number of images of each class.

    With more than `MAX_COUNTS` classes, the line has only the smallest and the largest number, with their classes.
    """
    if len(classes) <= MAX_COUNTS:
        return f"by class: {', '.join(f'{name} {count}' for name, count in zip(classes, counts, strict=True))}"
    fewest, most = (pick(range(len(classes)), key=counts.__getitem__) for pick in (min, max))
    return f"by class: {counts[fewest]} ({classes[fewest]}) to {counts[most]} ({classes[most]})"
