"""The panoptic ground truth of a split: for each image, its segments and a PNG with the segment of each pixel."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from detr.data.annotations import CocoJson
from detr.data.arrays import SplitArrays, decode, encode
from detr.data.panoptic_json import PNG_KEY
from detr.data.panoptic_png import VOID, read_ids


class Segment(NamedTuple):
    """A segment of the ground truth."""

    id: int  # the colour of its pixels; unique in its image
    category: int  # category id
    area: float  # in pixels, as the JSON states it
    is_crowd: bool


@dataclass(frozen=True, kw_only=True)
class PanopticTruth:
    """The panoptic ground truth of one split. The pixels of an image are read on demand."""

    categories: list[dict[str, Any]]  # {"id", "name", "isthing"}, sorted by id; things are countable, stuff is not
    sizes: dict[int, tuple[int, int]]  # image id -> height, width
    segments: dict[int, list[Segment]]  # image id -> its segments, in the order of the file; empty without annotations
    files: dict[int, Path]  # image id -> PNG; empty without annotations

    def read(self, image: int) -> NDArray[np.uint32]:
        """Return the segment ids (H, W) of an image; VOID (0) where a pixel has no label.

        Raises UserError if the PNG is missing or invalid, or if its ids are not those of the JSON.
        """
        listed = [segment.id for segment in self.segments[image]]
        return read_segments(self.files[image], self.sizes[image], listed, image)


def panoptic_truth(coco_json: CocoJson, folder: Path) -> PanopticTruth:
    """Return the ground truth in a panoptic JSON that was converted by `panoptic_json.to_coco`, checked and completed.

    `folder` holds the PNGs.
    """
    images = coco_json["images"]
    categories = [{key: c[key] for key in ("id", "name", "isthing")} for c in coco_json["categories"]]
    segments: dict[int, list[Segment]] = {image["id"]: [] for image in images} if "annotations" in coco_json else {}
    for a in coco_json.get("annotations", []):
        segments[a["image_id"]].append(Segment(a["id"], a["category_id"], a["area"], bool(a["iscrowd"])))
    return PanopticTruth(
        categories=sorted(categories, key=lambda category: category["id"]),
        sizes={image["id"]: (image["height"], image["width"]) for image in images},
        segments=segments,
        files={image["id"]: folder / image[PNG_KEY] for image in images} if segments else {},
    )


def read_segments(file: Path, size: tuple[int, int], listed: Sequence[int], image: int) -> NDArray[np.uint32]:
    """Read the segment ids (H, W) of an image from its PNG, and compare them with those that the JSON lists.

    Raises UserError if the PNG is missing or invalid, or if the ids differ.
    """
    ids = read_ids(file, size)
    counts = [int(np.count_nonzero(ids == id)) for id in (VOID, *listed)]
    if sum(counts) != ids.size:
        unlisted = int(np.setdiff1d(ids, [VOID, *listed])[0])
        raise UserError(
            f"The PNG {file} has pixels of segment {unlisted}, which the JSON does not list for image {image}; list "
            "it, or paint them with 0."
        )
    if absent := [id for id, count in zip(listed, counts[1:], strict=True) if not count]:
        raise UserError(
            f"The JSON lists the segment {absent[0]} for image {image}, but the PNG {file} has no pixel of it; remove "
            "it there, or correct the PNG."
        )
    return ids


def check_files(folder: Path, coco_json: CocoJson) -> None:
    """Raise UserError if `folder` lacks a PNG that is named in a converted panoptic JSON; no PNG is opened."""
    names = [image[PNG_KEY] for image in coco_json["images"] if PNG_KEY in image]
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    if missing := [name for name in names if name not in present and not os.path.exists(folder / name)]:
        raise UserError(
            f"{len(missing)} of {len(names)} PNGs of segment ids are missing, the first is {folder / missing[0]}; put "
            "them into the folder that has the name of the JSON."
        )


@dataclass(frozen=True, kw_only=True)
class PanopticMasks:
    """The masks of a split's training targets, which are segments (see `detr.data.target_masks.TargetMasks`).

    They are stored as arrays, which forked workers share with their parent process.
    """

    folder: Path  # of the PNGs
    files: NDArray[np.bytes_]  # (N,) names of the PNGs in UTF-8
    images: NDArray[np.int64]  # (N,) image ids
    sizes: NDArray[np.int64]  # (N, 2) height, width
    listed: NDArray[np.int64]  # (S,) ids of all segments, those of crowds included
    listed_starts: NDArray[np.int64]  # (N + 1,) listed[listed_starts[i] : listed_starts[i + 1]] are those of image i
    segments: NDArray[np.int64]  # (T,) segment id of each target
    starts: NDArray[np.int64]  # (N + 1,) as in SplitArrays
    notes: list[str]

    def read(self, index: int) -> Tensor:
        """Return the masks of image `index`, in the order of its boxes: uint8 (n, H, W), 1 in the segment."""
        height, width = self.sizes[index].tolist()
        if not self.files[index]:  # a test set that is published without annotations
            return torch.zeros(0, height, width, dtype=torch.uint8)
        listed = self.listed[self.listed_starts[index] : self.listed_starts[index + 1]].tolist()
        file = self.folder / decode(self.files[index])
        ids = read_segments(file, (height, width), listed, int(self.images[index]))
        targets = self.segments[self.starts[index] : self.starts[index + 1]].astype(np.uint32)
        return torch.from_numpy((ids == targets[:, None, None]).astype(np.uint8))


def target_masks(coco_json: CocoJson, arrays: SplitArrays, folder: Path) -> PanopticMasks:
    """Return the masks of the targets `arrays`, which were made from `coco_json`, a converted panoptic JSON.

    Raises UserError if a PNG is missing in `folder`.
    """
    check_files(folder, coco_json)
    index_of = {id: index for index, id in enumerate(arrays.ids.tolist())}
    annotations = coco_json.get("annotations", [])
    owners = np.array([index_of[a["image_id"]] for a in annotations], dtype=np.int64)
    ids = np.array([a["id"] for a in annotations], dtype=np.int64)
    return PanopticMasks(
        folder=folder,
        files=np.array([encode(image.get(PNG_KEY, "")) for image in coco_json["images"]]),
        images=arrays.ids,
        sizes=arrays.sizes,
        listed=ids[np.argsort(owners, kind="stable")],
        listed_starts=np.cumsum([0, *np.bincount(owners, minlength=len(arrays.ids))]),
        segments=ids[arrays.positions],
        starts=arrays.starts,
        notes=[],
    )
