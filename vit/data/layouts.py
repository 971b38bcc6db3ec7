"""Recognise the layout of a folder of images: a folder for each split, or class folders only (a flat folder)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError
from common.types import Split
from vit.data.listing import folder_names, holds_images

# The names that the folder of each split may have, in upper or lower case. If several folders exist, the first one in
# this order is read.
FOLDER_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
SPLIT_NAMES = {name for names in FOLDER_NAMES.values() for name in names}
MAX_NAMES = 5  # maximum number of folder names in a message


@dataclass(frozen=True, kw_only=True)
class SplitFolders:
    """The folders of the splits, with notes and warnings on how `root` was read."""

    folders: dict[Split, Path]  # only of the splits that have a folder
    notes: list[str] = field(default_factory=list)  # lines for the summary
    warnings: dict[Split, list[str]] = field(default_factory=dict)
    unread: Sequence[str] = ()  # names of the folders in `root` that belong to no split


def find_folders(root: str | None, by_path: Mapping[Split, Path]) -> SplitFolders:
    """Find the folders of the splits in `root`; if `root` is None, only those in `by_path` are returned.

    `by_path` holds the folders that the config gives for single splits (data.train, data.val, data.test). They take
    precedence over the folders in `root`, and no other split reads them.

    The folders of `root` that have the name of a split are the folders of the splits. However, they are classes if each
    of them holds images and no folders, and if folders with other names lie beside them. If all folders of `root` are
    classes, `root` is flat and is itself the folder of train.

    Raises UserError when `root` does not exist. If `by_path` lacks train, also raises UserError when a flat `root`
    contains a folder of `by_path`, or when the only folder of a flat `root` holds folders and no images (this folder is
    then the root of the data set).
    """
    if root is None:
        return SplitFolders(folders=dict(by_path))
    top = Path(root)
    if not top.is_dir():
        raise UserError(f"The folder data.root={root} does not exist; correct its path.")
    used = {os.path.realpath(path) for path in by_path.values()}
    names = [name for name in folder_names(top) if os.path.realpath(top / name) not in used]
    named = {split: _matching(names, split) for split in FOLDER_NAMES}
    of_splits = [name for matches in named.values() for name in matches]
    others = [name for name in names if name not in of_splits]
    classes = [n for n in of_splits if others and holds_images(top / n) and not folder_names(top / n)]
    if len(classes) < len(of_splits):
        return _folders_of_splits(top, named, others, by_path)
    return _flat_folder(top, names, classes, by_path)


def missing_folder(root: str, split: Split, unread: Sequence[str]) -> str:
    """Return the error message for a split that has no folder in `root`.

    `unread` are the names of the folders in `root` that belong to no split.
    """
    others = f" ({_listed(unread)} beside the folders of other splits cannot be read)" if unread else ""
    return (
        f"There is no folder {split} in data.root={root}{others}; expected {split}/<class>/<image> there, or give the "
        f"folder of these images as data.{split}."
    )


def _matching(names: Sequence[str], split: Split) -> list[str]:
    """Return those of `names` that are names of `split`, in the order of `FOLDER_NAMES`; the first of them is read."""
    return [name for known in FOLDER_NAMES[split] for name in reversed(names) if name.lower() == known]


def _folders_of_splits(
    top: Path, named: Mapping[Split, list[str]], others: list[str], by_path: Mapping[Split, Path]
) -> SplitFolders:
    """Return the folders of the splits, for a root `top` that holds folders of splits.

    If there is no test folder, the val folder is used as test, as for ImageNet. `named` maps each split to the names of
    the folders in `top` that have one of this split's names. `others` holds the names of the remaining folders in
    `top`.
    """
    folders: dict[Split, Path] = {split: top / matches[0] for split, matches in named.items() if matches}
    val_is_test = "val" in folders and "test" not in {*folders, *by_path}
    if val_is_test:
        folders["test"] = folders.pop("val")
    folders = {split: path for split, path in folders.items() if split not in by_path}
    read = [f"{path.name}/ is {split}" for split, path in folders.items()]
    if val_is_test:
        read[-1] += ", since there is no folder of test"
    warnings = {
        split: [
            f"data.root={top} holds {name}/, which is not read, since {matches[0]}/ is the folder of {split}; move its "
            f"images, or give data.{split}={top / name}."
            for name in matches[1:]
        ]
        for split, matches in named.items()
        if split not in by_path
    }
    with_images = [name for name in others if "train" in folders and holds_images(top / name)]
    if with_images:
        warnings["train"].append(
            f"data.root={top} holds folders of splits ({', '.join(f'{path.name}/' for path in folders.values())}), so "
            f"that {_listed(with_images)}, which hold images, are not read; if all of its folders are classes, move "
            "the images of each directly into its folder."
        )
    unread = f"; not read: {_listed(others)}" if others else ""
    notes = [f"data.root={top}: {', '.join(read)}{unread}"] * bool(read)
    return SplitFolders(folders={**folders, **by_path}, notes=notes, warnings=warnings, unread=others)


def _flat_folder(top: Path, names: list[str], classes: list[str], by_path: Mapping[Split, Path]) -> SplitFolders:
    """Return the folders of the splits, for a flat root `top`: `top` is train, unless `by_path` has a folder of train.

    `names` are the class folders in `top`, and `classes` are those of them that have the name of a split.
    """
    if "train" in by_path:
        return SplitFolders(folders=dict(by_path), notes=[f"data.root={top} is not read, since data.train is given"])
    for split, path in by_path.items():
        if Path(os.path.realpath(top)) in Path(os.path.realpath(path)).parents:
            raise UserError(
                f"data.{split}={path} lies in data.root={top}, whose folders are classes of train; move it out of "
                "data.root, or give data.train instead of data.root."
            )
    if len(names) == 1 and not holds_images(top / names[0]) and folder_names(top / names[0]):
        raise UserError(
            f"data.root={top} holds the single folder {names[0]}, which holds folders and no images; give "
            f"data.root={top / names[0]}."
        )
    warnings = [
        f"data.root={top}: {_listed(classes)} is taken as a class, since it holds images and no folders, and other "
        "folders lie beside it; if it is none, move it out of data.root."
    ] * bool(classes)
    notes = [f"data.root={top}: a flat folder, whose {len(names)} folders are the classes"]
    return SplitFolders(folders={"train": top, **by_path}, notes=notes, warnings={"train": warnings})


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > MAX_NAMES else ""
    return ", ".join(f"{name}/" for name in names[:MAX_NAMES]) + more
