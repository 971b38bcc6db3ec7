"""Prediction for users' images: options, reading of images, and detections as records, pictures and files."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from common.data.image_objects import exif_of, to_image
from common.errors import UserError
from common.files.inputs import InputFile
from common.files.names import answer_file, printable
from common.files.output import write_answer
from common.report.pictures import pad_and_stack, write_picture
from common.report.records import Records, check_batch, draw_on, predict_each
from common.task import Answer, Batch
from common.types import Fraction, Positive
from detr.data.protocol import DetectionData
from detr.evaluation.attention import Attended, attended, record, rows
from detr.evaluation.attention_pictures import Object, draw_encoder, draw_queries
from detr.evaluation.masks import colours_of, encode, number_pixels
from detr.evaluation.panoptic_segments import Rule
from detr.evaluation.pictures import colour, draw, tint
from detr.tasks.image_input import ImageInput, describe_input, is_video


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """The options of prediction. Evaluation uses `detections_per_image` and those of panoptic segmentation.

    detections_per_image: number of detections of an image, which are then the pairs of a query and a class with the
        highest scores; None = one detection for each query, as in DETR.
    threshold: minimum score of detections that are drawn and listed.
    nms: if two boxes of a class have an IoU above `nms`, the one with the lower score is dropped; None = no box is
        dropped, as in DETR.
    attention: whether pictures of attention are drawn for images, too.
    panoptic_threshold: minimum score of a query in a panoptic segmentation.
    panoptic_rule: how pixels are assigned to queries, as in DETR or as in MaskFormer
        (`detr.evaluation.panoptic_segments.panoptic`).
    """

    threshold: Fraction
    # These have a default, because users' older config files lack them.
    detections_per_image: Positive | None = None
    nms: Fraction | None = None
    attention: bool = False
    panoptic_threshold: Fraction = 0.85
    panoptic_rule: Rule = "detr"


class DetectionPrediction(ImageInput, ABC):
    """The part of the task `Detection` that predicts for users' inputs."""

    data: DetectionData
    options: PredictOptions
    unanswered: list[str]

    @property
    @abstractmethod
    def categories(self) -> list[dict[str, Any]]:
        """The classes in the order of class indices."""

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return a dict for each image: boxes (Q, 4) xyxy in pixels of the original image, scores (Q,), labels (Q,)."""

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Detect the objects of an image; returns a list of {box, name, score}, the highest score first.

        A box is xyxy in pixels of the image. A detector with masks also gives `mask`, a boolean array (H, W). `input`
        is an image that `common.data.image_objects.to_image` accepts. For several images, which are given as a list, a
        folder or a pattern such as photos/*.jpg, the result is a list with one such list per image. Jupyter shows the
        result as pictures, with the option `attention` as pictures of what the queries attend to. If `input` is a batch
        (a dict), the result is that of `answers`.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_each(input, partial(self._records, model))

    def _records(self, model: nn.Module, input: Any) -> Records:
        image = to_image(input, exif_of(self.data))
        batch = self.data.collate([self.data.view(image, Path("image"))]) | {"names": ["image"]}
        (answer,) = self.answers(model, batch)
        boxes, labels, scores = self._selected(answer)
        objects, masks = self._objects(boxes, labels, scores), self._masks(answer)
        names = [record["name"] for record in objects]
        picture = partial(draw, boxes=boxes, names=names, scores=scores, labels=labels, masks=masks)
        if masks is not None:
            for record, mask in zip(objects, masks.numpy(), strict=True):
                record["mask"] = mask
        if "attention" in answer:
            picture = partial(self._draw_attention, answer=answer)
        objects.sort(key=lambda record: -record["score"])
        return Records(objects, draw=partial(draw_on, input, exif_of(self.data), picture))

    def _read_batches(self, file: InputFile) -> Iterator[Batch]:
        if self.options.attention and is_video(file):
            raise UserError(
                f"task.predict.attention=true draws the attention in images, and {file.path} is a video; leave it out, "
                "or give an image."
            )
        return super()._read_batches(file)

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each image with its boxes, and its objects {box (xyxy), name, score} as JSON; yield a line per image.

        With masks, an object also has `mask` (COCO's run-length code), and .masks.png numbers the pixels of the objects
        from 1, in the order of the JSON file: the number is R + 256 G + 65536 B, and 0 where there is no object. For a
        panoptic model, .panoptic.png has the ids of `segments` in the JSON file in the same way.
        The frames of a video are written to one video, and their objects to one file with a line of JSON per frame.
        These two files are complete when the iterator of `read` is exhausted. If the answer to an image has
        `attention`, that of the queries is drawn as .attention.png, and that of the encoder as .encoder.png.
        """
        files = [InputFile(Path(path), Path(path).name) for path in batch["files"]]
        # The method `read` of a user's task may omit the keys "names" and "originals".
        names = batch.get("names") or [file.name for file in files]
        originals = batch.get("originals") or map(self._read_image, files)
        for i, (image, name, file, answer) in enumerate(zip(originals, names, files, answers, strict=True)):
            objects = self._objects(*self._selected(answer))
            for item in objects:
                item |= {"box": [round(side, 2) for side in item["box"]], "score": round(item["score"], 4)}
            if (masks := self._masks(answer)) is not None:
                for item, code in zip(objects, encode(masks), strict=True):
                    item["mask"] = code
            picture = self._draw(image, answer)
            if "frames" in batch:
                frame, video = batch["frames"][i], answer_file(folder, name, ".boxes.mp4")
                batch["videos"][i].add(video, file.path, frame, picture, {"objects": objects})
            else:
                write_picture(picture, answer_file(folder, name, ".boxes.jpg"))  # overwrites no image of the user
                content = {"objects": objects} | self._write_segments(folder, name, image, answer)
                write_answer(answer_file(folder, name, ".boxes.json"), file.path, content)
                if masks is not None:
                    numbers = number_pixels(masks, self._selected(answer)[2])
                    write_picture(colours_of(numbers), answer_file(folder, name, ".masks.png"))
                if "attention" in answer:
                    for ending, sheet in self._attention_pictures(image, answer).items():
                        write_picture(sheet, answer_file(folder, name, ending))
            counts = Counter(str(item["name"]) for item in objects)
            summary = ", ".join(f"{count} {printable(label)}" for label, count in counts.items()) or "nothing"
            yield f"{describe_input(batch, i, name)}: {summary} (score >= {self.options.threshold:g})"

    def _write_segments(self, folder: Path, name: str, image: Tensor, answer: Answer) -> dict[str, Any]:
        """Write the segments of a panoptic answer as ids and as a picture; returns their records for the JSON file."""
        if "segments" not in answer:
            return {}
        ids, segments = answer["segments"]
        write_picture(colours_of(ids), answer_file(folder, name, ".panoptic.png"))
        masks = torch.stack([ids == s["id"] for s in segments]) if segments else ids.new_zeros(0, *ids.shape).bool()
        picture = tint(image, masks, [colour(s["label"]) for s in segments])
        write_picture(picture, answer_file(folder, name, ".panoptic.jpg"))
        keys = ("id", "category_id", "area")
        records = [
            {**{key: s[key] for key in keys}, "name": self._name(s["label"]), "score": round(s["score"], 4)}
            for s in segments
        ]
        return {"segments": records}

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """Draw the first `count` images of the batch with their boxes, for the log.

        Returns uint8 (n, 3, H, W); n is `count`, or the number of images if there are fewer.
        """
        pictures = []
        for image, size, original, answer in list(
            zip(batch["images"], batch["sizes"], batch["original_sizes"], answers, strict=True)
        )[:count]:
            height, width = size.tolist()
            scale = (size.float() / original).flip(0).repeat(2).cpu()  # to pixels of the resized image
            pictures.append(self._draw(image[:, :height, :width].cpu(), {**answer, "boxes": answer["boxes"] * scale}))
        return pad_and_stack(pictures)

    def _draw(self, image: Tensor, answer: Answer) -> Tensor:
        boxes, labels, scores = self._selected(answer)
        return draw(image, boxes, [self._name(label) for label in labels], scores, labels, self._masks(answer))

    def _with_attention(
        self, detect: Callable[[nn.Module, Batch], list[Answer]], model: nn.Module, batch: Batch
    ) -> list[Answer]:
        """Return `detect(model, batch)`, and what was attended to under the key `attention`.

        If a query can give several detections, the answer must have `queries` (D,), each detection's index of a query.

        Raises UserError if the model's attention cannot be recorded, or if the batch has several images.
        """
        if (count := len(batch["names"])) != 1:
            raise UserError(
                f"task.predict.attention=true draws one image a batch, and {type(self).__name__}.read gave {count}; "
                "give batches of one image, or task.predict.attention=false."
            )
        with record(model) as recorded:
            (answer,) = detect(model, batch)
        height, width = batch["original_sizes"][0].tolist()
        boxes = answer["boxes"] / answer["boxes"].new_tensor([width, height, width, height])
        sizes = (tuple(batch["sizes"][0].tolist()), tuple(batch["images"].shape[-2:]))
        return [{**answer, "attention": attended(model, recorded, boxes, answer.get("queries"), *sizes)}]

    def _attention_pictures(self, image: Tensor, answer: Answer) -> dict[str, Tensor]:
        """Draw the attention of the detections, the highest score first: ending of the file -> uint8 (3, H, W)."""
        keep = self._kept(answer)
        keep = keep[answer["scores"][keep].argsort(descending=True, stable=True)]
        boxes, labels, scores = (answer[key][keep].tolist() for key in ("boxes", "labels", "scores"))
        objects = [
            Object(box, f"{self.categories[label]['name']} {score:.2f}", colour(label))
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        seen: Attended = answer["attention"]
        pictures = {".attention.png": draw_queries(image, rows(seen.queries, keep), objects)}
        if seen.centres is not None:
            pictures[".encoder.png"] = draw_encoder(image, rows(seen.centres, keep), objects)
        return pictures

    def _draw_attention(self, image: Tensor, answer: Answer) -> Tensor:
        return self._attention_pictures(image, answer)[".attention.png"]

    def _objects(self, boxes: Tensor, labels: Tensor, scores: Tensor) -> list[dict[str, Any]]:
        """Return the records {box, name, score} of the n detections that `_selected` returns."""
        return [
            {"box": box, "name": self._name(label), "score": score}
            for box, label, score in zip(boxes.tolist(), labels, scores.tolist(), strict=True)
        ]

    def _selected(self, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes (n, 4), labels (n,) and scores (n,) of the detections that are drawn and listed."""
        keep = self._kept(answer)
        return answer["boxes"][keep], answer["labels"][keep], answer["scores"][keep]

    def _masks(self, answer: Answer) -> Tensor | None:
        """Return the masks (n, H, W) of the detections that are drawn and listed; None without masks."""
        return answer["masks"][self._kept(answer)] if "masks" in answer else None

    def _kept(self, answer: Answer) -> Tensor:
        """Return the indices (n,) of the detections that are drawn and listed, in ascending order.

        Their scores are at least `threshold`. If `nms` is not None, non-maximum suppression within each class, with the
        IoU limit `nms`, is applied to these detections.
        """
        keep: Tensor = (answer["scores"] >= self.options.threshold).nonzero()[:, 0]  # (n,)
        if self.options.nms is not None:
            boxes, scores, labels = (answer[key][keep] for key in ("boxes", "scores", "labels"))
            keep = keep[batched_nms(boxes.float(), scores.float(), labels, self.options.nms).sort().values]
        return keep

    def _name(self, label: Tensor | int) -> str:
        return str(self.categories[int(label)]["name"])
