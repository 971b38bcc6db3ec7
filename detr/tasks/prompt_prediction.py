"""Prediction of masks for a user's prompts: reading images, and masks as records, pictures and files."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pycocotools import mask as rle
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from common.data.image_objects import exif_of, to_image
from common.data.images import read_image
from common.files.inputs import InputFile, read_each
from common.files.names import answer_file, printable
from common.files.output import write_answer
from common.report.pictures import pad_and_stack, write_picture
from common.report.records import Records, check_batch, draw_on, predict_each
from common.task import Answer, Batch
from detr.criterion.mask_maps import to_pixels
from detr.data.protocol import MaskData
from detr.evaluation.masks import encode
from detr.evaluation.prompt_pictures import draw_masks
from detr.tasks.prompting import ObjectPrompt, PromptOptions, as_tensors


class PromptPrediction(ABC):
    """The part of the task `PromptableMasks` that predicts for users' images and prompts."""

    data: MaskData
    options: PromptOptions
    unanswered: list[str]

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return an answer for each image: the masks for a user's prompts, as `prompted` returns them."""

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Predict masks for the prompts in the options; returns a list with the records of each object's masks.

        A record is {prompt, masks}; `masks` are {score, area, box, segmentation}, the highest score first, as in the
        files of predict.py. For several images, given as a list, a folder or a pattern, the result is a list with one
        such list per image. If `input` is a batch (a dict), the result is that of `answers`.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_each(input, partial(self._records, model))

    def _records(self, model: nn.Module, input: Any) -> Records:
        batch = self._view(to_image(input, exif_of(self.data)), Path("image"), "image")
        (answer,) = self.answers(model, batch)
        draw = partial(_draw, answer=answer, objects=batch["prompts"][0])
        return Records(_objects(answer, batch["prompts"][0]), draw=partial(draw_on, input, exif_of(self.data), draw))

    def read(self, input: str) -> Iterator[Batch]:
        """Read each image that `input` names as a batch of one image with its prompts.

        Besides the keys of `collate`, a batch has `names`, `originals` (the image before resizing, uint8 (3, H, W)) and
        `prompts`, each with a list of one item. Images that cannot be read, or that a prompt is outside of, are skipped
        if there are several, with the reason in `unanswered`; for a single image, UserError is raised. It is also
        raised if there is no prompt.
        """
        self.options.objects()
        return read_each(input, self._read_file, self.unanswered)

    def _read_file(self, file: InputFile) -> Iterator[Batch]:
        yield self._view(read_image(file.path, exif=exif_of(self.data), content=file.content), file.path, file.name)

    def _view(self, image: Tensor, path: Path, name: str) -> Batch:
        height, width = image.shape[1:]
        objects = self.options.objects()
        self.options.check(height, width, name)
        side = getattr(getattr(self.data, "augmentation", None), "max_size", max(height, width))
        sample = self.data.view(_with_longer_side(image, side), path) | {"original_size": (height, width)}
        return self.data.collate([sample]) | {"names": [name], "originals": [image], "prompts": [objects]}

    def prompted(self, model: Any, features: Tensor, batch: Batch) -> list[Answer]:
        """Return the answer to a batch of `read`, whose image has been encoded as `features`.

        A prompt that is a single point or box has three masks, any other prompt has one. The answer has `masks`, a list
        with a boolean tensor (k, H, W) in original pixels per object, the highest predicted IoU first, and `ious`, a
        list with the predicted IoUs (k,) per object.
        """
        ((height, width),) = sizes = batch["sizes"].tolist()
        ((full_height, full_width),) = batch["original_sizes"].tolist()
        scale = torch.tensor([width / full_width, height / full_height], device=features.device)
        (objects,) = batch["prompts"]
        outputs = model.decode(features, as_tensors(objects, scale))
        masks, ious = [], []
        for item, logits, scores in zip(objects, outputs["masks"].float(), outputs["ious"].float(), strict=True):
            kept = slice(1, None) if item.is_single else slice(0, 1)
            order = scores[kept].argsort(descending=True)
            pixels = to_pixels(logits[None, kept], tuple(sizes[0]), (full_height, full_width), model.image_size)[0]
            masks.append((pixels > 0)[order].cpu())
            ious.append(scores[kept][order].cpu())
        return [{"masks": masks, "ious": ious}]

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each image's masks as a picture, as numbers of objects (PNG) and as JSON; yield a line per image.

        In the PNG, a pixel has the value i if it is in the mask of object i (from 1) with the highest predicted IoU,
        and 0 if it is in none; later objects cover earlier ones. The JSON holds all masks as run-length codes.
        """
        parts = zip(batch["originals"], batch["names"], batch["files"], batch["prompts"], answers, strict=True)
        for image, name, file, objects, answer in parts:
            write_picture(_draw(image, answer, objects), answer_file(folder, name, ".prompted.jpg"))
            numbers = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
            for number, masks in enumerate(answer["masks"], 1):
                numbers[0, masks[0]] = min(number, 255)
            write_picture(numbers, answer_file(folder, name, ".prompted.png"))
            records = {"objects": _objects(answer, objects)}
            write_answer(answer_file(folder, name, ".prompted.json"), Path(file), records)
            scores = "; ".join(" or ".join(f"{iou:.2f}" for iou in ious.tolist()) for ious in answer["ious"])
            count = f"{len(objects)} object{'s' if len(objects) > 1 else ''}"
            yield f"{printable(name)}: {count}, predicted IoU {scores}"

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """Draw the first `count` images with the masks and clicks of an evaluation: uint8 (n, 3, H, W)."""
        pictures = []
        for image, size, answer in list(zip(batch["images"], batch["sizes"].tolist(), answers, strict=True))[:count]:
            points = [tuple(point) for point in answer["points"].flatten(0, 1).tolist()]
            pictures.append(draw_masks(image[:, : size[0], : size[1]].cpu(), answer["masks"], points))
        return pad_and_stack(pictures)


def _with_longer_side(image: Tensor, side: int) -> Tensor:
    """Resize an image uint8 (3, H, W) so that its longer side has `side` pixels, as the official code does."""
    height, width = image.shape[1:]
    scale = side / max(height, width)
    size = [max(1, int(length * scale + 0.5)) for length in (height, width)]
    resized: Tensor = image if size == [height, width] else functional.resize(image, size, antialias=True)
    return resized


def _objects(answer: Answer, objects: list[ObjectPrompt]) -> list[dict[str, Any]]:
    """Return a record {prompt, masks} for each object."""
    return [
        {"prompt": item.record(), "masks": [_mask_record(*pair) for pair in zip(masks, ious, strict=True)]}
        for item, masks, ious in zip(objects, answer["masks"], answer["ious"], strict=True)
    ]


def _mask_record(mask: Tensor, iou: Tensor) -> dict[str, Any]:
    (segmentation,) = encode(mask[None])
    x, y, width, height = rle.toBbox(segmentation).tolist()
    box = [x, y, x + width, y + height]
    return {"score": round(float(iou), 4), "area": int(mask.sum()), "box": box, "segmentation": segmentation}


def _draw(image: Tensor, answer: Answer, objects: list[ObjectPrompt]) -> Tensor:
    """Draw the mask of each object with the highest predicted IoU, with the prompts."""
    points = [(*point, label) for item in objects for label, group in ((1, item.points), (0, item.background))
              for point in group]  # fmt: skip
    boxes = [item.box for item in objects if item.box is not None]
    return draw_masks(image, torch.stack([masks[0] for masks in answer["masks"]]), points, boxes)
