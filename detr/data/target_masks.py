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
    codes, without_pixel = [], []
    images = np.repeat(np.arange(len(arrays.ids)), np.diff(arrays.starts))  # (T,) image of each object
    for image, position in zip(images.tolist(), arrays.positions.tolist(), strict=True):
        annotation = coco_json["annotations"][position]
        name = name_annotation(annotation, position)
        height, width = arrays.sizes[image].tolist()
        try:
            code = masks.encode(annotation.get("segmentation"), height, width)
        except masks.MaskFault as fault:
            raise UserError(f"Annotation {name} of {path} {fault}.") from None
        codes.append(code["counts"])
        if not masks.has_pixels(code):
            without_pixel.append(name)
    return EncodedMasks(
        counts=np.frombuffer(b"".join(codes), np.uint8),
        ends=np.cumsum([0, *map(len, codes)]),
        starts=arrays.starts,
        sizes=arrays.sizes,
        notes=_describe(without_pixel),
    )


def _describe(without_pixel: list[str]) -> list[str]:
    if not without_pixel:
        return []
    examples = f"annotation {', '.join(without_pixel[:3])}{', ...' if len(without_pixel) > 3 else ''}"
    return [f"masks without a pixel, because their polygons are too thin: {len(without_pixel)} ({examples})"]
