"""Checks of an image folder's layout: class folders one level too high or too low, and splits under other names."""

import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from common.types import Split
from vit.data.listing import Listing

OTHER_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("training",),
    "val": ("valid", "validation", "dev"),
    "test": ("testing", "eval"),
}
SPLIT_NAMES = {*OTHER_NAMES, *(name for names in OTHER_NAMES.values() for name in names)}
MAX_NAMES = 5  # of classes in a note


def refuse_split_names(classes: Sequence[str], folder: Path) -> None:
    """Raise UserError when `folder` is one level too high, that is, its class folders are the folders of splits."""
    if len(classes) > 1 and SPLIT_NAMES.issuperset(name.lower() for name in classes):
        raise UserError(
            f"The class folders of {folder} are {', '.join(classes)}, which are names of splits and not of classes; "
            f"give data.root={folder} instead."
        )


def unread_folders(root: str | None, split: Split) -> list[str]:
    """A warning if `root` has a folder that seems to hold `split` under another name, which is not read."""
    folders = [] if root is None else sorted(path.name for path in Path(root).iterdir() if path.is_dir())
    name = next((name for name in folders if name != split and name.lower() in (split, *OTHER_NAMES[split])), None)
    if name is None:
        return []
    return [
        f"data.root={root} holds {name}/, which is not read: the folder of {split} must have the name {split}; rename "
        f"it, or give data.{split}={Path(str(root), name)}."
    ]


def depth_advice(classes: Sequence[str], listing: Listing) -> list[str]:
    """A warning when train has a single class, or when no class folder holds images directly."""
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
    """A note on the classes without an image in a split; `counts` are the split's numbers of images by class."""
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    more = ", ..." if len(absent) > MAX_NAMES else ""
    return [f"no image of {len(absent)} of {len(classes)} classes ({', '.join(absent[:MAX_NAMES])}{more})"] * bool(
        absent
    )
