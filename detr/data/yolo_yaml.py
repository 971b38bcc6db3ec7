"""Read the file data.yaml of YOLO's format (Ultralytics' documentation, "Ultralytics YOLO format")."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.config.describe import shorten
from common.data.names import composed
from common.data.opening import read_bytes, read_names
from common.errors import UserError
from common.types import Split
from detr.data.converted import SPLIT_FOLDERS, image_names


@dataclass(frozen=True, kw_only=True)
class DataYaml:
    """The content of a data.yaml."""

    path: Path
    folder: Path  # the data set's folder, to which the paths in the file are relative
    names: list[str]  # of the classes, in the order of their numbers
    keypoints: int  # how many numbers describe the keypoints of an object; 0 if there are no keypoints
    entries: dict[Split, list[Path]]  # the existing paths of a split: folders of images, or text files that list images
    notes: list[str]  # for the start summary: how paths were read, and which splits are missing or equal to train


def is_yaml(path: Path) -> bool:
    """Whether a path has the suffix of a YAML file."""
    return path.suffix.lower() in (".yaml", ".yml")


def read(path: Path) -> DataYaml:
    """Read a data.yaml. Raises UserError for invalid content; the message names the file and, if possible, the key.

    The key `path:` names the folder of the data set, relative to the folder of data.yaml. The folder of data.yaml is
    used if this key is missing, or if none of the splits exists in the folder that it names, for example because the
    file was written on another computer.

    If the path of a split begins with ../ and does not exist, it is read without ../, because Roboflow writes such
    paths for folders inside the data set. If both paths exist and are different folders or files, UserError is raised.
    """
    content = load(path)
    keys = _split_keys(content, path)
    stated = content.get("path")
    folders = [*([path.parent / str(stated)] if stated else []), path.parent]
    for folder in folders:
        paths = {split: _existing(content[key], folder, f"{key}: of {path}") for split, key in keys.items()}
        entries = {split: existing for split, existing in paths.items() if existing}
        if entries:
            break
    else:
        listed = ", ".join(f"{key}: {shorten(str(content[key]))}" for key in keys.values()) or "no split"
        raise UserError(f"{path} has {listed}, of which nothing exists in {folders[0]}; correct its path: or train:.")
    moved = [f"path: {shorten(str(stated))} of {path.name} holds no split; the folder of {path.name} takes its place"]
    missing = [
        f"{path.name} has {keys[split]}: {shorten(str(content[keys[split]]))}, which does not exist; left out"
        for split in keys
        if split not in entries
    ]
    shared = [
        f"{path.name} has the same images for {split} as for train, so the numbers of {split} are those of images that "
        "were trained on"
        for split in entries
        if split != "train" and entries[split] == entries.get("train")
    ]
    return DataYaml(
        path=path,
        folder=folder,
        names=_names(content, path),
        keypoints=_keypoints(content, path),
        entries=entries,
        notes=[*(moved if folder != folders[0] else []), *missing, *shared],
    )


def load(path: Path) -> Mapping[Any, Any]:
    """Load a YAML file that holds a mapping; raises UserError for any other file."""
    text = read_bytes(path)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not YAML ({shorten(reason)}); correct it, or copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not the data.yaml of a data set; expected train:, val: and names: in it.")
    return content


def images_of(entry: Path, folder: Path) -> list[Path]:
    """Return the paths of the images that are in the folder `entry` at any depth, or that the text file `entry` lists.

    A line of the text file is a path relative to the data set's `folder` or, if there is no such file, to the folder of
    the text file. A line that begins with ./ is always relative to the folder of the text file. Raises UserError if an
    image that the text file lists is missing.
    """
    if entry.is_dir():
        return [entry / name for name in image_names(entry, is_recursive=True)]
    lines = read_names(entry)
    images = [_find(line, (entry.parent,) if line.startswith("./") else (folder, entry.parent)) for line in lines]
    missing = [line for line, image in zip(lines, images, strict=True) if image is None]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(lines)} images in {entry} are missing, the first is {shorten(missing[0])}; "
            "add them, or correct the list."
        )
    return [image for image in images if image is not None]


def _find(line: str, folders: Sequence[Path]) -> Path | None:
    names = dict.fromkeys((line, line.replace("\\", "/")))
    paths = (folder / name for name in names for folder in folders)
    return next((path for path in paths if os.path.isfile(path)), None)


def _split_keys(content: Mapping[Any, Any], path: Path) -> dict[Split, str]:
    keys: dict[Split, str] = {}
    for split, names in SPLIT_FOLDERS.items():
        present = [name for name in names if content.get(name)]
        if len(present) > 1:
            raise UserError(f"{path} has {present[0]}: and {present[1]}: for the split {split}; remove one of them.")
        if present:
            keys[split] = present[0]
    return keys


def _existing(value: Any, folder: Path, origin: str) -> list[Path]:
    """Return the paths that `value` names, if all of them exist; an empty list if none exists.

    `value` is a path or a list of paths, relative to `folder`. Raises UserError for any other value, and if only some
    of the paths exist. `origin` names the key and the file, for messages.
    """
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) and text and "\0" not in text for text in texts):
        raise UserError(f"{origin} is {shorten(str(value))}; expected a folder, a list in a .txt, or several of them.")
    paths = [path for path in (_resolve(text, folder, origin) for text in texts) if path is not None]
    if paths and len(paths) < len(texts):
        raise UserError(f"{origin}: only {len(paths)} of its {len(texts)} paths exist in {folder}; correct it.")
    return paths


def _resolve(text: str, folder: Path, origin: str) -> Path | None:
    outside, inside = folder / text, folder / re.sub(r"^(\.\./)+", "", text)
    existing = [path for path in dict.fromkeys((outside, inside)) if path.exists()]
    if len(existing) == 2 and not outside.samefile(inside):
        raise UserError(
            f"{origin} is {text}, which may be {outside.resolve()} or, as Roboflow means it, {inside}; write the one "
            "that you mean."
        )
    return existing[-1] if existing else None


def _names(content: Mapping[Any, Any], path: Path) -> list[str]:
    """Return the names of the classes.

    If `names:` is missing, the names are class_0, class_1 and so on, as in Ultralytics; `nc:` is their number.
    """
    names, count = content.get("names"), content.get("nc")
    if names is None and isinstance(count, int) and not isinstance(count, bool) and 0 < count < 100_000:
        return [f"class_{number}" for number in range(count)]
    if isinstance(names, dict):
        numbers = {int(key) if str(key).isdecimal() else None: name for key, name in names.items()}
        if sorted(key for key in numbers if key is not None) != list(range(len(names))):
            raise UserError(f"{path}: the numbers of names: are not 0 to {len(names) - 1}; correct them.")
        names = [numbers[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path} has no names: of the classes; add them as a list, or as number: name.")
    for number, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, str | int | float) or not str(name).strip():
            raise UserError(f"{path}: the name of class {number} is read as {shorten(str(name))}; put it in quotes.")
    if isinstance(count, int) and count != len(names):
        raise UserError(f"{path} has nc: {count}, but {len(names)} names:; correct one of them.")
    return [composed(str(name).strip()) for name in names]


def _keypoints(content: Mapping[Any, Any], path: Path) -> int:
    """Return how many numbers follow a box for its keypoints; 0 if there is no key `kpt_shape:`.

    The value of `kpt_shape:` is a list of two numbers: the number of keypoints, and the numbers per keypoint (2 or 3).
    Their product is returned.
    """
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 10_000 for n in shape):
        raise UserError(f"{path} has kpt_shape: {shorten(str(shape))}; expected the number of points and 2 or 3.")
    return int(shape[0] * shape[1])
