"""The masks of a split's training targets: stored as compressed run-length codes, decoded for one image at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import UserError
from detr.data import masks
from detr.data.annotations import CocoJson, name_annotation
from detr.data.arrays import SplitArrays

MIN_BOX_IOU = 0.5  # of a mask's extent and its box; in a sample of COCO's annotations, the lowest is 0.76


class TargetMasks(Protocol):
    """The masks of the targets in a `SplitArrays`."""

    @property
    def notes(self) -> list[str]:
        """Lines for the start summary."""

    def read(self, index: int) -> Tensor:
        """Return the masks of image `index`, in the order of its boxes: uint8 (n, H, W), 1 in the object."""


@dataclass(frozen=True, kw_only=True)
class EncodedMasks:
    """Masks as run-length codes in one array, which forked workers share with their parent process."""

    counts: NDArray[np.uint8]  # the codes of all objects, concatenated
    ends: NDArray[np.int64]  # (T + 1,) the code of object t is counts[ends[t] : ends[t + 1]]
    starts: NDArray[np.int64]  # (N + 1,) as in SplitArrays
    sizes: NDArray[np.int64]  # (N, 2) height, width of the images
    notes: list[str]

    def read(self, index: int) -> Tensor:
        """Return the masks of image `index`, in the order of its boxes: uint8 (n, H, W), 1 in the object."""
        size = self.sizes[index].tolist()
        objects = range(self.starts[index], self.starts[index + 1])
        if not objects:
            return torch.zeros(0, *size, dtype=torch.uint8)
        codes = [{"size": size, "counts": self.counts[self.ends[t] : self.ends[t + 1]].tobytes()} for t in objects]
        return torch.from_numpy(masks.decode(codes)).contiguous()


def encode_masks(coco_json: CocoJson, arrays: SplitArrays, path: Path) -> EncodedMasks:
    """Encode the masks of the targets `arrays`, which were made from `coco_json`, a part of the JSON at `path`.

    Raises UserError, which names the annotation, if a mask is missing, invalid or wholly outside its image.
    """
    codes: list[bytes] = []
    extents = np.zeros((len(arrays.positions), 4))  # x, y, width, height
    images = np.repeat(np.arange(len(arrays.ids)), np.diff(arrays.starts))  # (T,) image of each object
    for image, position, extent in zip(images.tolist(), arrays.positions.tolist(), extents, strict=True):
        annotation = coco_json["annotations"][position]
        height, width = arrays.sizes[image].tolist()
        try:
            code = masks.encode(annotation.get("segmentation"), height, width)
        except masks.MaskFault as fault:
            name = name_annotation(annotation, position)
            raise UserError(f"Annotation {name} of {path} {fault}.") from None
        codes.append(code["counts"])
        extent[:] = masks.extent(code)
    return EncodedMasks(
        counts=np.frombuffer(b"".join(codes), np.uint8),
        ends=np.cumsum([0, *map(len, codes)]),
        starts=arrays.starts,
        sizes=arrays.sizes,
        notes=_notes(coco_json, arrays, extents),
    )


def _notes(coco_json: CocoJson, arrays: SplitArrays, extents: NDArray[np.float64]) -> list[str]:
    """Describe masks without a pixel, and masks that lie elsewhere than their boxes; `extents` (T, 4) are in xywh."""
    empty = extents[:, 2] == 0
    corners = np.concatenate([extents[:, :2], extents[:, :2] + extents[:, 2:]], axis=1)  # (T, 4) xyxy
    elsewhere = ~empty & (_box_ious(corners, arrays.boxes.astype(np.float64)) < MIN_BOX_IOU)
    texts = {
        "masks without a pixel, whose polygons are too thin or not in pixels": empty,
        "masks that lie elsewhere than their boxes": elsewhere,
    }
    notes = []
    for text, chosen in texts.items():
        positions = arrays.positions[chosen].tolist()
        names = [name_annotation(coco_json["annotations"][position], position) for position in positions[:3]]
        examples = f"annotation {', '.join(names)}{', ...' if len(positions) > 3 else ''}"
        notes += [f"{text}: {len(positions)} ({examples})"] if positions else []
    return notes


def _box_ious(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the IoU (T,) of pairs of boxes (T, 4) xyxy in pixels, each enlarged by a pixel on all sides."""
    grown = np.array([-1, -1, 1, 1])
    first, second = first + grown, second + grown
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    common = sides.clip(min=0).prod(axis=1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    ious: NDArray[np.float64] = common / (areas[0] + areas[1] - common)
    return ious
