"""Detection data in YOLO's format: a text file for each image, with boxes relative to the image's size."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from common.data.names import composed
from common.data.opening import read_text
from common.errors import UserError
from common.types import Split
from detr.data import yolo_text, yolo_yaml
from detr.data.converted import Box, Converted, Labels, check_classes, count_note, find_splits, image_names
from detr.data.header_sizes import HeaderSizes
from detr.data.layouts import Layout, SplitFiles

CLASS_FILE = "classes.txt"  # written by labelImg and Label Studio: the name of a class on each line
NO_LABELS = ("classes.txt", "notes.txt", "train.txt", "val.txt", "test.txt")  # text files that hold no labels
READING_THREADS = 8  # a network drive serves several requests at once

# Pairs of an image's path and the path of its label file. The path of an image inside the folder of images is relative
# to this folder; the paths of other images are absolute.
LabelFiles = list[tuple[str, Path]]


@dataclass(kw_only=True, eq=False)
class Yolo(Converted):
    """A detection data set in YOLO's format; `layouts` describes the supported layouts of `root`.

    If a split is given by paths, its `annotations` is the folder of its label files. An image without a label file, or
    with an empty one, has no objects. A polygon becomes the smallest box that contains it. The sizes of the images,
    which are needed to convert relative boxes to pixels, are read from the headers of the image files.

    Args:
        classes: the names of the classes in the order of their numbers in the label files, from 0; None = the names
            in data.yaml or classes.txt.
    """

    layouts: ClassVar[str] = (
        "data.yaml, or classes.txt with label files in labels/ beside images/ or beside the images, for each of "
        "train/, val/ and test/ or for all images"
    )

    def find_layout(self, root: Path) -> Layout:
        """Find the files of each split, by the YAML file of `root` or, without one, by the names of folders.

        `root` is a folder or the YAML file itself. Without a YAML file, the first layout of `_folder_layouts` that has
        files is used. If none has files, `recognised` is False in the result.
        """
        path = _find_yaml(root)
        if path is not None:
            data = yolo_yaml.read(path)
            files = {split: (data.folder, path) for split in data.entries}
            return Layout(name=f"YOLO with {path.name}", official=False, recognised=True, files=files)
        for name, files in _folder_layouts(root):
            if files:
                return Layout(name=name, official=False, recognised=True, files=files)
        return Layout(name="YOLO", official=False, recognised=False, files={})

    def convert(self, split: Split) -> dict[Split, tuple[Labels, Sequence[str]]]:
        """Read the label files of `split`, and the sizes of its images."""
        folder, annotations = self._required_files(split)
        if yolo_yaml.is_yaml(annotations):
            data = yolo_yaml.read(annotations)
            names, source, keypoints, notes = data.names, annotations, data.keypoints, data.notes
            files = _files_of(data, split, folder)
            has_lists = not all(entry.is_dir() for entry in data.entries.get(split, []))
        else:
            source, keypoints, notes, has_lists = self._class_file(annotations), 0, [], False
            names = _read_classes(source) if self.classes is None else self.classes
            files = [(name, annotations / Path(name).with_suffix(".txt")) for name in image_names(folder, True)]
        if not files:
            raise UserError(f"There is no image of {split} in {folder}; correct its path, or add the images.")
        classes = names if self.classes is None else [composed(name) for name in self.classes]
        check_classes(classes, str(source))
        rules = yolo_text.Rules(len(classes), str(source) if self.classes is None else "data.classes", keypoints)
        labels = self._read(folder, annotations, files, classes, rules)
        labels.notes = [*notes, *labels.notes, *([] if has_lists else _without_image(files))]
        return {split: (labels, classes)}

    def _read(
        self, folder: Path, annotations: Path, files: LabelFiles, classes: Sequence[str], rules: yolo_text.Rules
    ) -> Labels:
        sizes = HeaderSizes(
            annotations=annotations, folder=folder, exif=self.exif, remedy="correct the image, or remove it"
        )
        with ThreadPoolExecutor(READING_THREADS) as threads:
            shapes = list(threads.map(sizes.read, [name for name, _ in files]))  # of the images, (height, width)
        labels = Labels(images=[(name, *shape) for (name, _), shape in zip(files, shapes, strict=True)])
        missing: list[str] = []
        empty: list[str] = []
        polygons = poses = 0
        for image, ((name, path), (height, width)) in enumerate(zip(files, shapes, strict=True)):
            content = yolo_text.read(path, rules)
            if content is None or not content.boxes:
                (missing if content is None else empty).append(name)
                continue
            polygons, poses = polygons + content.polygons, poses + content.poses
            for (label, (x, y, w, h)), line in zip(content.boxes, content.lines, strict=True):
                xywh = ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
                labels.boxes.append(Box(image, classes[label], xywh, f"{path.name}, line {line}"))
        labels.notes = [
            *count_note("without objects", "image without a label file", missing),
            *count_note("without objects", "image with an empty label file", empty),
            *([f"read as the box around it: {polygons} x polygon or rotated box"] if polygons else []),
            *([f"left out: the keypoints of {poses} boxes"] if poses else []),
            *sizes.notes_on_turned(),
        ]
        return labels

    def _class_file(self, annotations: Path) -> Path:
        """Find classes.txt in the folder of labels, `annotations`, or in the nearest folder above it, up to `root`.

        If `root` is None, only the folder of labels and its parent are searched. If there is no classes.txt but
        `classes` is given, `annotations` is returned. Raises UserError if there is neither.
        """
        root = annotations.parent if self.root is None else Path(self.root)
        folders = [annotations, *(folder for folder in annotations.parents if folder == root or root in folder.parents)]
        existing = next((folder / CLASS_FILE for folder in folders if (folder / CLASS_FILE).exists()), None)
        if existing is None and self.classes is None:
            raise UserError(
                f"The classes of {annotations} have no names: there is no data.yaml and no {CLASS_FILE}; give "
                "data.classes=[NAME, ...] in the order of their numbers."
            )
        return existing or annotations


def _find_yaml(root: Path) -> Path | None:
    """Find the YAML file of a data set: `root`, data.yaml in `root`, or the only YAML file in `root` with `names:`.

    Returns None if there is none of these. If `root` has no data.yaml, all its YAML files are read. Raises UserError if
    one of them is invalid or does not hold a mapping, or if several of them have `names:`.
    """
    if root.is_file() and yolo_yaml.is_yaml(root):
        return root
    if (root / "data.yaml").exists():
        return root / "data.yaml"
    paths = sorted(path for path in root.glob("*.y*ml") if yolo_yaml.is_yaml(path) and "names" in yolo_yaml.load(path))
    if len(paths) > 1:
        raise UserError(f"data.root={root} holds {', '.join(path.name for path in paths)}; give one: {paths[0]}.")
    return paths[0] if paths else None


def _folder_layouts(root: Path) -> Iterator[tuple[str, dict[Split, SplitFiles]]]:
    """Yield the name of each layout without a YAML file, and its files in `root`.

    The files are {} if `root` does not have this layout.
    """
    splits = find_splits(root / "images", "{}")
    files = {split: (images, root / "labels" / images.name) for split, images in splits.items()}
    yield "YOLO with labels/ beside images/, by splits", _with_labels(files)
    splits = find_splits(root, "{}/images")
    files = {split: (images, images.parent / "labels") for split, images in splits.items()}
    yield "YOLO with images/ and labels/ in the folder of each split", _with_labels(files)
    splits = find_splits(root, "{}")
    yield "YOLO with label files beside the images, by splits", _with_labels({s: (p, p) for s, p in splits.items()})
    yield "YOLO with labels/ beside images/", _with_labels({"train": (root / "images", root / "labels")})
    yield "YOLO with label files beside the images", _with_labels({"train": (root, root)})


def _with_labels(files: dict[Split, SplitFiles]) -> dict[Split, SplitFiles]:
    """Select the splits with at least one image and at least one text file that may hold labels."""
    return {
        split: (images, labels)
        for split, (images, labels) in files.items()
        if next(image_names(images, images != labels), None) and next(_texts(labels, images != labels), None)
    }


def _texts(folder: Path, is_recursive: bool = False) -> Iterator[Path]:
    """Yield the text files in `folder` that may hold labels; if `is_recursive`, also those in its subfolders.

    Files with a name in NO_LABELS, or with a name that begins with "readme", are skipped.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = folders if is_recursive else []
        texts = (name for name in names if name.endswith(".txt") and name not in NO_LABELS)
        yield from (Path(parent, name) for name in texts if not name.lower().startswith("readme"))


def _files_of(data: yolo_yaml.DataYaml, split: Split, folder: Path) -> LabelFiles:
    """Return the images of a split and their label files; the path of an image in `folder` is relative to `folder`.

    The path of a label file is that of its image, with the suffix replaced by .txt. If the image lies in a folder
    images/, the last such folder in the path is replaced by labels/.

    Differs from Ultralytics: for an image in `folder`, only a folder images/ inside `folder` is replaced.
    """
    images = [image for entry in data.entries.get(split, []) for image in yolo_yaml.images_of(entry, data.folder)]
    top = f"{os.path.abspath(folder)}/"
    paths = dict.fromkeys(os.path.abspath(image) for image in images)
    names = [path.removeprefix(top) for path in paths]
    files = []
    for name in names:
        head, images_folder, tail = f"/{name}".rpartition("/images/")
        label = f"{head}/labels/{tail}" if images_folder else f"/{name}"
        label = label if name.startswith("/") else label[1:]
        files.append((name, (folder / label).with_suffix(".txt")))
    return files


def _read_classes(path: Path) -> list[str]:
    """Read the names of classes from a file with one name on each line.

    Raises UserError for an empty file, or for an empty line before a name.
    """
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if not all(names):
        raise UserError(f"{path}, line {names.index('') + 1} is empty; give the name of a class on each line.")
    return [composed(name) for name in names]


def _without_image(files: LabelFiles) -> list[str]:
    """Return a list with one note on the label files that belong to no image; the list is empty if there are none.

    Only the folders that hold the label files in `files` are searched.
    """
    used = {path for _, path in files}
    texts = [path for folder in sorted({path.parent for path in used}) for path in sorted(_texts(folder))]
    return count_note("left out", "label file without an image", [path for path in texts if path not in used])
