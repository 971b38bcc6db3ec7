"""The image on which assignments are shown, with its objects, and the boxes of a split for clusters of shapes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.files.names import printable
from common.task import Batch
from common.types import Split
from detr.criterion.boxes import to_cxcywh
from detr.data.protocol import DetectionData

MAX_NAME = 16  # characters of a class name


class Scene(NamedTuple):
    """An image, resized as in evaluation, and its T objects, without crowds and boxes without area."""

    id: int
    file: str
    image: Tensor  # uint8 (3, H, W)
    boxes: Tensor  # (T, 4) xyxy in pixels of `image`
    labels: Tensor  # (T,) class indices
    names: list[str]  # the objects' class names
    batch: Batch  # the image alone

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        height, width = self.image.shape[1:]
        return height, width

    @property
    def boxes_cxcywh(self) -> Tensor:
        """Centres and sizes of the boxes (T, 4), relative to the image."""
        return to_cxcywh(self.boxes) / torch.tensor(self.size).flip(0).repeat(2)


def load_scene(data: DetectionData, split: Split, image: str | None, categories: list[dict[str, Any]]) -> Scene:
    """Load the image of a split with the id or the file name `image`; None stands for the first image with an object.

    Raises UserError if there is no such split or image.
    """
    if not data.count(split):
        raise UserError(f"split={split}: the data set has no such split; give its files or another split.")
    truth = data.ground_truth(split)
    if "annotations" not in truth:
        raise UserError(f"split={split} has no annotations, so there are no objects to assign; give another split.")
    index = _find(truth, image, split)
    sample = data.sample(split, index, None)
    names = [printable(str(categories[label]["name"]))[:MAX_NAME] for label in sample["labels"].tolist()]
    batch = data.collate([sample])
    return Scene(sample["id"], sample["file"], sample["image"], sample["boxes"], sample["labels"], names, batch)


def _find(truth: dict[str, Any], image: str | None, split: Split) -> int:
    """Return the index of an image by its id or by the end of its file name; see `load_scene`."""
    images = truth["images"]
    if image is None:
        with_objects = {box["image_id"] for box in truth["annotations"] if _is_object(box)}
        return next((index for index, entry in enumerate(images) if entry["id"] in with_objects), 0)
    by_id = [index for index, entry in enumerate(images) if str(entry["id"]) == image]
    matches = by_id or [i for i, entry in enumerate(images) if f"/{entry['file_name']}".endswith(f"/{image}")]
    if len(matches) != 1:
        found = f"{len(matches)} images of {split} have" if matches else f"no image of {split} has"
        first = f"{images[0]['id']} or {images[0]['file_name']}"
        raise UserError(f"image={image}: {found} this id or file name; give one such as {printable(first)}.")
    return matches[0]


def relative_sizes(data: DetectionData, split: Split) -> tuple[Tensor, Split]:
    """Return the widths and heights (N, 2), relative to their images, of the objects of train, and the name "train".

    If train cannot be read on this machine, the objects of `split` are used in its place. Raises UserError if there is
    no object.
    """
    try:
        source: Split = "train"
        truth = data.ground_truth(source)
    except UserError:
        source, truth = split, data.ground_truth(split)
    extents = {entry["id"]: (entry["width"], entry["height"]) for entry in truth["images"]}
    boxes = [(box["bbox"], extents[box["image_id"]]) for box in truth.get("annotations", []) if _is_object(box)]
    if not boxes:
        raise UserError(f"The split {source} has no boxes, so anchor shapes cannot be computed; give other data.")
    sizes = [(box[2] / width, box[3] / height) for box, (width, height) in boxes]
    return torch.tensor(sizes, dtype=torch.float32).clamp(max=1), source


def _is_object(box: dict[str, Any]) -> bool:
    """Whether an annotation is a training target: no crowd, and with an area."""
    return not box["iscrowd"] and box["bbox"][2] > 0 and box["bbox"][3] > 0
