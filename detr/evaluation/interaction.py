"""Interactive evaluation of a promptable model: clicks that correct its masks one after the other."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.task import Answer
from detr.criterion.clicks import centre_of_error
from detr.criterion.mask_maps import to_pixels


class PromptDecoder(Protocol):
    """What the evaluation calls of a promptable model; see `detr.models.promptable.PromptableModel`."""

    image_size: int

    def decode(self, features: Tensor, prompts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return logits "masks" (N, 1 + k, M, M) and "ious" (N, 1 + k) of N prompts of encoded images (B, C, h, w)."""


def interact(
    model: PromptDecoder, features: Tensor, masks: Tensor, counts: Sequence[int], sizes: Tensor, clicks: int
) -> list[Answer]:
    """Prompt every object with `clicks` clicks, each at the centre of the largest error of the mask before it.

    The first click is at the centre of the object. Of the masks for it, the one with the highest predicted IoU is
    taken; with more clicks, there is only one mask. The logits of the mask are part of the next prompt. An object whose
    mask has no error keeps this mask. Objects without a pixel are left out.

    Args:
        model: the promptable model.
        features: (B, C, h, w) encoded images.
        masks: (T, H, W) boolean masks of the objects in the padded images; those of each image in turn.
        counts: the number of objects of each image.
        sizes: (B, 2) heights and widths of the images without padding.
        clicks: the number of clicks.

    Returns an answer for each image of n objects and height h and width w: `masks` (n, h, w) boolean after the last
    click; `ious` and `predicted` (n, clicks), the actual and the predicted IoU after each click; `oracle` (n,), the
    highest IoU of the masks for the first click; and `points` (n, clicks, 3), x, y and label of each click.
    """
    extents = [(int(height), int(width)) for height, width in sizes.tolist()]
    image_of = [image for image, count in enumerate(counts) for _ in range(count)]
    cropped = [mask[: extents[i][0], : extents[i][1]] for mask, i in zip(masks.cpu().numpy(), image_of, strict=True)]
    objects = [_Object(i, mask, clicks) for i, mask in zip(image_of, cropped, strict=True) if mask.any()]
    logits: Tensor | None = None
    for click in range(clicks if objects else 0):
        for item in objects:
            item.click(click)
        prompts = _prompts(objects, click, features, logits)
        outputs = model.decode(features, prompts)
        kept = slice(1, None) if click == 0 else slice(0, 1)
        maps, predicted = outputs["masks"][:, kept].float(), outputs["ious"][:, kept].float()
        best = predicted.argmax(1)
        logits = maps[torch.arange(len(maps), device=maps.device), best]
        for number, (item, scores) in enumerate(zip(objects, predicted.cpu().numpy(), strict=True)):
            size = item.target.shape
            pixels = to_pixels(maps[number : number + 1], size, size, model.image_size)[0] > 0
            item.answer(click, pixels.cpu().numpy(), scores)
    groups = [[item for item in objects if item.image == image] for image in range(len(extents))]
    return [_answer(group, extent, clicks) for group, extent in zip(groups, extents, strict=True)]


class _Object:
    """One object, its clicks so far and the model's answers to them."""

    def __init__(self, image: int, target: NDArray[np.bool_], clicks: int):
        self.image, self.target = image, target
        self.mask = np.zeros_like(target)
        self.points = np.zeros((clicks, 3), dtype=np.int64)
        self.ious, self.predicted = np.zeros(clicks), np.zeros(clicks)
        self.oracle = 0.0
        self.finished = False

    def click(self, number: int) -> None:
        point = centre_of_error(self.mask, self.target)
        self.finished = point is None
        # The prompt of a finished object is still decoded, since all prompts of a batch have one number of points.
        self.points[number] = self.points[0] if point is None else point

    def answer(self, number: int, masks: NDArray[np.bool_], predicted: NDArray[np.float32]) -> None:
        """Take the mask (k, h, w) with the highest predicted IoU (k,)."""
        if self.finished:
            self.ious[number], self.predicted[number] = self.ious[number - 1], self.predicted[number - 1]
            return
        ious = (masks & self.target).sum((1, 2)) / (masks | self.target).sum((1, 2))
        best = int(predicted.argmax())
        self.mask, self.ious[number], self.predicted[number] = masks[best], ious[best], predicted[best]
        if number == 0:
            self.oracle = float(ious.max())


def _prompts(objects: list[_Object], click: int, features: Tensor, logits: Tensor | None) -> dict[str, Tensor]:
    points = torch.from_numpy(np.stack([item.points[: click + 1] for item in objects])).to(features.device)
    image = torch.tensor([item.image for item in objects], device=features.device)
    prompts = {"image": image, "points": points[..., :2].float(), "labels": points[..., 2]}
    return prompts if logits is None else {**prompts, "masks": logits}


def _answer(objects: list[_Object], extent: tuple[int, int], clicks: int) -> Answer:
    def stack(arrays: list[Any], *shape: int) -> Tensor:
        return torch.from_numpy(np.stack(arrays)) if arrays else torch.zeros(0, *shape)

    return {
        "masks": stack([item.mask for item in objects], *extent).bool(),
        "ious": stack([item.ious for item in objects], clicks),
        "predicted": stack([item.predicted for item in objects], clicks),
        "oracle": torch.tensor([item.oracle for item in objects], dtype=torch.float64),
        "points": stack([item.points for item in objects], clicks, 3).long(),
    }
