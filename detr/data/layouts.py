"""The layouts of a folder that holds a data set in COCO's format, recognised by the names of its JSON files."""

from dataclasses import dataclass
from pathlib import Path

from common.types import Split

# The folder of images, and the annotations: COCO JSON or, in other formats, a file or a folder.
SplitFiles = tuple[Path, Path]

LAYOUTS = (
    "COCO 2017 (annotations/instances_train2017.json, train2017/, val2017/), Roboflow (train/_annotations.coco.json, "
    "valid/, test/), or train.json, val.json and test.json beside images/"
)
PANOPTIC_LAYOUTS = (
    "COCO 2017 panoptic (annotations/panoptic_train2017.json beside annotations/panoptic_train2017/, train2017/, "
    "val2017/)"
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of the splits in one folder.

    `files` maps each split of the data set to its paths. The paths need not exist: for COCO 2017, `files` always has
    train and test.
    """

    name: str  # for the summary
    official: bool  # whether it is COCO 2017
    recognised: bool  # False if the folder has no known layout; `files` are then {} or those of COCO 2017
    files: dict[Split, SplitFiles]


def find_layout(root: Path) -> Layout:
    """Find the first layout of `LAYOUTS` that has a JSON file in `root`.

    If there is none, the result is the layout of COCO 2017 with `recognised` False.

    For COCO 2017, `files` always has train and test, even if the files of one of them do not exist: evaluation, for
    example, needs only those of test. For the other layouts, `files` has only splits whose JSON exists.
    """
    official = _official(root)
    if any(annotations.exists() for _, annotations in official.values()):
        return Layout(name="COCO 2017", official=True, recognised=True, files=official)
    for name, files in (("Roboflow", _roboflow(root)), ("JSON files beside images/", _beside_images(root))):
        existing = {split: paths for split, paths in files.items() if paths[1].exists()}
        if existing:
            return Layout(name=name, official=False, recognised=True, files=existing)
    return Layout(name="COCO 2017", official=True, recognised=False, files=official)


def find_panoptic_layout(root: Path) -> Layout:
    """Find the panoptic files of COCO 2017 in `root`; `files` always has train and test, as in `find_layout`."""
    files = _official(root, "panoptic")
    recognised = any(annotations.exists() for _, annotations in files.values())
    return Layout(name="COCO 2017 (panoptic)", official=True, recognised=recognised, files=files)


def _official(root: Path, kind: str = "instances") -> dict[Split, SplitFiles]:
    """Return the files of COCO 2017. Its test set is published without labels, so val2017 serves as test.

    `kind` is the first word in the names of the JSON files.
    """
    folders: dict[Split, str] = {"train": "train2017", "test": "val2017"}
    return {split: (root / folder, root / "annotations" / f"{kind}_{folder}.json") for split, folder in folders.items()}


def _roboflow(root: Path) -> dict[Split, SplitFiles]:
    folders: dict[Split, str] = {"train": "train", "val": "valid", "test": "test"}
    return {split: (root / folder, root / folder / "_annotations.coco.json") for split, folder in folders.items()}


def _beside_images(root: Path) -> dict[Split, SplitFiles]:
    splits: tuple[Split, ...] = ("train", "val", "test")
    return {split: (root / "images", root / f"{split}.json") for split in splits}
