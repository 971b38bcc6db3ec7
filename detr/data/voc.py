"""Detection data in Pascal VOC's format: one XML file for each image."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from common.data.images import IMAGE_SUFFIXES
from common.data.names import composed
from common.data.opening import read_names
from common.errors import UserError
from common.types import Split
from detr.data import voc_xml
from detr.data.converted import (
    Box,
    Converted,
    Labels,
    class_names,
    count_note,
    describe_corners,
    find_splits,
    image_names,
    xywh,
)
from detr.data.layouts import Layout, SplitFiles
from detr.data.voc_xml import VocImage

FirstPixel = Literal["auto", 0, 1]
Images = Mapping[str, Sequence[str]]  # the image files of a folder, by file name without suffix in Unicode's form NFC

XML_FOLDERS = ("Annotations", "annotations", "xml", "labels")  # names of the folder of XML files
IMAGE_FOLDERS = ("JPEGImages", "images", "Images")  # names of the folder of images beside it


@dataclass(kw_only=True, eq=False)
class Voc(Converted):
    """A detection data set in Pascal VOC's format; `layouts` lists the layouts of `root`.

    If a split is given by paths, its `annotations` is a folder of XML files, or a list such as
    ImageSets/Main/trainval.txt, which names files in Annotations/ without their suffix. In a folder, images without an
    XML file and XML files without an image are left out. If a list names a missing image or XML file, UserError is
    raised. There is one exception: if no image in the list of test has an XML file, test is read without annotations.
    An object marked as difficult is treated as a crowd: it is no training target, and evaluation ignores detections
    that match it.

    Args:
        classes: the names of the classes in the order of their ids; None = all names in the files, sorted.
        first_pixel: how corners are counted. 1 = they are the first and the last pixel of the object, counted from 1,
            as in the official files. 0 = they are positions between pixels, counted from 0, as in COCO, so that
            xmax - xmin is the width. "auto" = 0 if any xmin or ymin of any split is below 1, otherwise 1.
    """

    layouts: ClassVar[str] = (
        "VOCdevkit (Annotations/, JPEGImages/, and lists of the splits in ImageSets/Main/), Roboflow (XML files beside "
        "the images in train/, valid/ and test/), or XML files beside the images or in annotations/ beside images/"
    )

    first_pixel: FirstPixel

    def find_layout(self, root: Path) -> Layout:
        """Find the splits in `root` or, if there are none, in its only subfolder that holds Annotations/.

        The subfolders of VOCdevkit/ in `root` are searched, too. Raises UserError if several subfolders hold
        Annotations/.
        """
        for name, files in _layouts(root):
            if files:
                return Layout(name=name, official=False, recognised=True, files=files)
        years = sorted(path.parent for pattern in ("*", "VOCdevkit/*") for path in root.glob(f"{pattern}/Annotations"))
        if len(years) > 1:
            raise UserError(f"data.root={root} holds {', '.join(map(str, years))}; give one of them.")
        if years:
            return self.find_layout(years[0])
        return Layout(name="Pascal VOC", official=False, recognised=False, files={})

    def convert(self, split: Split) -> dict[Split, tuple[Labels, Sequence[str]]]:
        """Read the files of all splits, because the classes and first_pixel="auto" depend on all of them."""
        splits = list(dict.fromkeys([split, *self.splits_with_files()]))
        files = {name: _read(*self._required_files(name), name) for name in splits}
        boxes = [thing for images, _ in files.values() for _, image in images for thing in image.objects]
        below = [thing.origin for thing in boxes if min(thing.corners[:2]) < 1]
        first_pixel = self.first_pixel if self.first_pixel != "auto" else int(not below)
        note = _first_pixel_note(first_pixel, self.first_pixel, below)
        parts = {name: _labels(images, notes, first_pixel, note) for name, (images, notes) in files.items()}
        classes = class_names(list(parts.values()), self.classes)
        return {name: (labels, classes) for name, labels in parts.items()}


Files = list[tuple[str, VocImage]]  # the name and the annotations of each image


def _layouts(root: Path) -> Iterator[tuple[str, dict[Split, SplitFiles]]]:
    """Yield the name of each layout and its files in `root`, which are {} if `root` does not have this layout."""
    lists = root / "ImageSets" / "Main"
    pair = _pair(root)
    yield "VOCdevkit", {split: (pair[0], path) for split, path in _lists(lists).items()} if pair else {}
    splits = {split: _pair(folder) for split, folder in find_splits(root, "{}").items()}
    yield "XML files in a folder for each split", {split: files for split, files in splits.items() if files}
    beside = pair is not None and pair[0] == pair[1]
    yield (
        f"XML files {'beside the images' if beside else 'in a folder beside that of images'}",
        ({"train": pair} if pair else {}),
    )


def _lists(folder: Path) -> dict[Split, Path]:
    """Return the lists of the splits in `folder`.

    If there is trainval.txt but no train.txt, trainval.txt is the list of train. The list of val is then not used,
    because trainval.txt contains its images.
    """
    lists = find_splits(folder, "{}.txt")
    if "train" in lists or not (folder / "trainval.txt").exists():
        return lists
    return {"train": folder / "trainval.txt", **{split: path for split, path in lists.items() if split == "test"}}


def _pair(folder: Path) -> SplitFiles | None:
    """Return the folder of images and the folder of XML files of the data set in `folder`; None without XML files.

    The folder of XML files is returned twice if it is `folder` itself, or if there is no folder of images beside it.
    """
    for annotations in (*(folder / name for name in XML_FOLDERS), folder):
        if _xml_files(annotations):
            images = [folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()]
            return (images[0] if images and annotations != folder else annotations), annotations
    return None


def _xml_files(folder: Path) -> list[Path]:
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(names) if name.lower().endswith(".xml") and not name.startswith("._")]


def _read(folder: Path, annotations: Path, split: Split) -> tuple[Files, list[str] | None]:
    """Read one split; returns its images with their annotations, and notes on what was left out.

    The notes are None for a split without annotations.
    """
    images: defaultdict[str, list[str]] = defaultdict(list)
    for name in image_names(folder):
        images[composed(Path(name).stem)].append(name)
    if annotations.is_dir():
        return _read_folder(folder, annotations, images)
    return _read_list(annotations, images, split)


def _read_folder(folder: Path, annotations: Path, images: Images) -> tuple[Files, list[str]]:
    files: Files = []
    without_image, used = [], set()
    for path in _xml_files(annotations):
        content = voc_xml.read(path)
        name = _image_of(path, content, images) or _named_image(content, folder)
        if name is None:
            without_image.append(path)
            continue
        files.append((name, content))
        used.add(name)
    unused = [folder / name for names in images.values() for name in names if name not in used]
    if not files:
        raise UserError(f"{annotations} has no XML file of an image in {folder}; give the folder of the images.")
    return files, [
        *count_note("left out", "XML file without an image", without_image),
        *count_note("left out", "image without an XML file", unused),
    ]


def _read_list(path: Path, images: Images, split: Split) -> tuple[Files, list[str] | None]:
    """Read the images that a list names; the result is that of `_read`.

    A test split may lack the XML files of all its images; it then has no annotations. In every other case, a missing
    XML file raises UserError.
    """
    parents = path.absolute().parents
    folders = [folder for name in XML_FOLDERS if len(parents) > 2 and (folder := parents[2] / name).is_dir()]
    if not folders:
        raise UserError(f"{path} is a list, but there is no folder Annotations/ beside ImageSets/; give such a list.")
    files = {stem: folders[0] / f"{stem}.xml" for stem in _names_in(path)}
    missing = [file for file in files.values() if not file.exists()]
    if len(missing) == len(files) and split == "test":
        blank = VocImage("", 0, 0, [])
        return [(_image_of(file, blank, images) or f"{stem}.jpg", blank) for stem, file in files.items()], None
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(files)} names in {path} have no XML file, the first would be {missing[0]}; "
            "add them, or correct the list."
        )
    contents = {stem: voc_xml.read(file) for stem, file in files.items()}
    return [
        (_image_of(files[stem], content, images) or f"{stem}.jpg", content) for stem, content in contents.items()
    ], []


def _names_in(path: Path) -> list[str]:
    """Return the names in a list, without image suffixes; raises UserError if the list cannot be read or is empty."""
    lines = dict.fromkeys(read_names(path))
    names = [line[: -len(end)] if (end := Path(line).suffix).lower() in IMAGE_SUFFIXES else line for line in lines]
    if not names:
        raise UserError(f"{path} names no image; a split needs at least one.")
    return names


def _image_of(path: Path, content: VocImage, images: Images) -> str | None:
    """Return the image that has the name of the XML file, apart from the suffix; None if there is no such image.

    If there are several such images, the one that <filename> states is returned. Raises UserError if <filename> states
    none of them.
    """
    names = images.get(composed(path.stem), [])
    if len(names) < 2 or content.filename in names:
        return content.filename if content.filename in names else next(iter(names), None)
    raise UserError(f"{path} may belong to {' or '.join(names)}; write the image's name into its <filename>.")


def _named_image(content: VocImage, folder: Path) -> str | None:
    name = os.path.basename(content.filename.replace("\\", "/"))
    return name if name and (folder / name).is_file() else None


def _labels(files: Files, notes: list[str] | None, first_pixel: int, pixel_note: str) -> Labels:
    difficult = [thing.origin for _, image in files for thing in image.objects if thing.is_difficult]
    return Labels(
        images=[(name, image.height, image.width) for name, image in files],
        boxes=[
            Box(i, thing.name, xywh(thing.corners, first_pixel), thing.origin, thing.is_difficult)
            for i, (_, image) in enumerate(files)
            for thing in image.objects
        ],
        notes=[*(notes or []), pixel_note, *count_note("treated as crowd", "object marked as difficult", difficult)],
        is_labelled=notes is not None,
    )


def _first_pixel_note(first_pixel: int, key: FirstPixel, below: Sequence[str]) -> str:
    reason = f"data.first_pixel={key}"
    if key == "auto":
        reason += f": {len(below)} boxes have an xmin or ymin below 1" if below else ": no xmin or ymin is below 1"
        reason += f", the first is {below[0]}" if below else ""
    return f"corners of boxes are read as {describe_corners(first_pixel)} ({reason})"
