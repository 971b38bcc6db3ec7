"""Samples of detection data: one image with its objects, augmented, and batches of such samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.task import Batch
from detr.data.transforms import Augmentation, Objects, as_bounding_boxes, augment


def make_sample(
    number: int,
    file: Path,
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    options: Augmentation,
    generator: torch.Generator | None,
) -> dict[str, Any]:
    """Make a sample from an image and its objects, augmented at random; if `generator` is None, it is only resized.

    Args:
        number: the image's id.
        file: the image's path.
        image: uint8 (3, H, W).
        boxes: float32 (n, 4) xyxy in pixels.
        labels: int64 (n,) class indices.
        masks: uint8 (n, H, W), 1 in the object; None = the sample has no masks.
        options: the augmentation.
        generator: the source of randomness.

    Returns a dict with the keys of `detr.data.coco.Coco.sample`.
    """
    original_size = tuple(image.shape[1:])
    image, objects = augment(image, Objects(as_bounding_boxes(image, boxes), labels, masks), options, generator)
    sample = {
        "id": number,
        "file": str(file),
        "image": image,
        "original_size": original_size,
        "boxes": objects.boxes.as_subclass(Tensor),
        "labels": objects.labels,
    }
    return sample if objects.masks is None else sample | {"masks": objects.masks.view(torch.bool)}


def collate(samples: Sequence[dict[str, Any]], pad_to: int) -> Batch:
    """Collate samples; images and masks are padded at the bottom and right to a common size, with zeros and False.

    The common height H and width W are multiples of `pad_to`. The returned dict has these keys:

    ids, files: lists of the images' ids and paths.
    images: uint8 (B, 3, H, W).
    sizes: (B, 2) heights and widths without padding.
    original_sizes: (B, 2) heights and widths before resizing.
    boxes: (T, 4) xyxy in pixels of the resized images; the boxes of all images, concatenated.
    labels: (T,) class indices of the boxes.
    masks: bool (T, H, W), True in the object of each box; this key is missing if the samples have no masks.
    counts: a list of the number of boxes of each image.
    padded: whether any image has padding.
    """
    sizes = torch.tensor([sample["image"].shape[1:] for sample in samples])  # (B, 2)
    height, width = (-(-length // pad_to) * pad_to for length in sizes.amax(dim=0).tolist())
    images = torch.empty(len(samples), 3, height, width, dtype=torch.uint8, memory_format=torch.channels_last).zero_()
    for image, sample in zip(images, samples, strict=True):
        image[:, : sample["image"].shape[1], : sample["image"].shape[2]] = sample["image"]
    batch = {
        "ids": [sample["id"] for sample in samples],
        "files": [sample["file"] for sample in samples],
        "images": images,
        "sizes": sizes,
        "padded": bool((sizes != torch.tensor([height, width])).any()),
        "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
        "boxes": torch.cat([sample["boxes"] for sample in samples]),
        "labels": torch.cat([sample["labels"] for sample in samples]),
        "counts": [len(sample["labels"]) for sample in samples],
    }
    if "masks" in samples[0]:
        batch["masks"] = _pad([sample["masks"] for sample in samples], height, width)
    return batch


def _pad(masks: Sequence[Tensor], height: int, width: int) -> Tensor:
    """Concatenate the masks (n, h, w) of each image as (T, height, width), with False in the padding."""
    padded = torch.zeros(sum(map(len, masks)), height, width, dtype=torch.bool)
    for part, of_image in zip(padded.split([len(m) for m in masks]), masks, strict=True):
        part[:, : of_image.shape[1], : of_image.shape[2]] = of_image
    return padded
