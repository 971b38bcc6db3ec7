"""The part of image classification that predicts for users' images: records, files, and pictures of attention."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.data.image_objects import exif_of, to_image
from common.data.images import read_image
from common.errors import UserError
from common.files.inputs import InputFile, read_each
from common.files.names import answer_file, printable
from common.files.output import write_answer
from common.report.pictures import write_picture
from common.report.records import Records, check_batch, draw_on, predict_each
from common.report.tiles import add_caption
from common.task import Answer, Batch
from common.types import Count, Positive
from vit.data.protocol import ImageData
from vit.evaluation import attention_maps, pictures, window_maps, word_attention


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of prediction.

    top: number of most probable classes to list.
    attention: pictures of attention: "none", "maps" (of each head in the layer `layer`), "rollout" (over the layers
        from the first to `layer`), "words" (of a TNT, inside one patch in the layer `layer`) or "bias" (the relative
        position bias of each head in `layer`, in a Swin Transformer).
    layer: number of a layer, from 0; negative numbers count from the last layer, -1.
    neighbours: k of an additional classification by the k nearest training images in feature space; 0 = none.
    """

    top: Positive
    attention: Literal["none", "maps", "rollout", "words", "bias"]
    layer: int
    neighbours: Count


class ClassificationPrediction(ABC):
    """The part of the task `Classification` that predicts for users' images."""

    data: ImageData
    options: PredictOptions
    unanswered: list[str]

    @property
    @abstractmethod
    def classes(self) -> list[str]:
        """The names of the classes, by index."""

    @abstractmethod
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return a dict for each image; see Classification."""

    def predict(self, model: nn.Module, input: Any) -> Any:
        """Return an image's most probable classes as a list of {name, share}, the most probable first.

        `share` is the probability of the class. `input` is an image that `common.data.image_objects.to_image` accepts.
        For several images (a list, a folder, or a pattern such as photos/*.jpg), the result is a list of such lists.
        Jupyter displays the result for one image as a picture. For a batch (a dict), the result is `answers(model,
        input)`.
        """
        if isinstance(input, dict):
            check_batch(input)
            return self.answers(model, input)
        return predict_each(input, partial(self._records, model))

    def _records(self, model: nn.Module, input: Any) -> Records:
        batch = self.data.collate([self.data.view(to_image(input, exif_of(self.data)), Path("image"))])
        (answer,) = self.answers(model, batch)
        classes = self._top_classes(answer)
        if _has_attention(answer):
            return Records(classes, draw=partial(_draw_attention, self.data.thumbnails(batch, 1)[0], answer))
        text = ", ".join(f"{record['name']} {record['share']:.2f}" for record in classes)
        return Records(
            classes,
            draw=partial(draw_on, input, exif_of(self.data), partial(add_caption, text=text, correct=None)),
        )

    def _top_classes(self, answer: Answer) -> list[dict[str, Any]]:
        """Return the records {name, share} of the `top` most probable classes, the most probable first."""
        scores = answer["log_probabilities"]
        best = scores.argsort(descending=True, stable=True)[: self.options.top].tolist()
        return [{"name": self.classes[k], "share": float(scores[k].exp())} for k in best]

    def read(self, input: str) -> Iterator[Batch]:
        """Yield a batch of one image, resized and cropped as in evaluation, for each image that `input` names.

        The batch also has `names`, from which `show` derives the names of the files that it writes. If `input` is a
        single file or standard input, UserError is raised if it cannot be read. If `input` is a folder or a pattern,
        images that cannot be read are skipped, and the reasons are added to `unanswered`.
        """
        return read_each(input, self._read_batches, self.unanswered)

    def _read_batches(self, file: InputFile) -> Iterator[Batch]:
        image = read_image(file.path, exif=exif_of(self.data), content=file.content)
        yield self.data.collate([self.data.view(image, file.path)]) | {"names": [file.name]}

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each answer under `folder` and yield a line of text for it.

        An answer is written as a JSON file. It has `classes`, a list of {name, probability} with the most probable
        first. With nearest neighbours, it also has `nearest`, the name of the class that they predict, or null if the
        image's features are not finite. An answer with maps is also drawn as a picture of attention.
        """
        names = batch.get("names") or [Path(path).name for path in batch["files"]]  # a user's `read` may omit `names`
        for i, (name, path, answer) in enumerate(zip(names, batch["files"], answers, strict=True)):
            top = self._top_classes(answer)
            classes = [{"name": record["name"], "probability": round(record["share"], 4)} for record in top]
            content: dict[str, Any] = {"classes": classes}
            line = ", ".join(f"{printable(c['name'])} {c['probability']:.3f}" for c in classes)
            line = f"{printable(name)}: {line}"
            if "nearest" in answer:
                content["nearest"] = self.classes[answer["nearest"]] if answer["nearest"] >= 0 else None
                line += f"; nearest training images: {printable(str(content['nearest']))}"
            write_answer(answer_file(folder, name, ".classes.json"), Path(path), content)  # an ending that no image has
            if _has_attention(answer):
                picture = _draw_attention(self.data.thumbnails(batch, i + 1)[i], answer)
                write_picture(picture, answer_file(folder, name, ".attention.png"))
            yield line

    def _images(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the model's input without autocast, since half precision would round the sampling points of crops."""
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            images: Tensor = self.data.inputs(batch, device)
        return images

    def _attention(self, model: Any, batch: Batch) -> dict[str, Any]:
        """Compute what pictures of attention need: lists and tensors by name, with an entry for each image."""
        if self.options.attention == "bias":
            return {"bias": [window_maps.bias_maps(model, self.options.layer)] * len(batch["ids"])}
        if self.options.attention == "words":
            return dict(zip(("maps", "place"), self._word_attention(model, batch), strict=True))
        if not hasattr(model, "window_layout"):
            return {"maps": self._maps(model, batch)}
        if self.options.attention == "rollout":
            raise UserError(
                f"task.predict.attention=rollout: the layers of {type(model).__name__} have different tokens, which "
                "rollout cannot combine; use task.predict.attention=maps."
            )
        maps, edges = window_maps.window_maps(model, self._images(model, batch), self.options.layer)
        return {"maps": maps.cpu(), "edges": [edges] * len(maps)}

    def _maps(self, model: Any, batch: Batch) -> Tensor:
        """Compute the attention to each patch from the class token or, without one, on average from all patches.

        Returns (B, heads, h, w), the attention in the layer `layer`, or (B, 1, h, w), the rollout over the layers up to
        this one. Raises UserError if the model lacks an attribute by which patches are located, or if it has no layer
        of this number.
        """
        if not all(hasattr(model, name) for name in ("patches", "pooling", "before_patches")):
            raise UserError(
                f"task.predict.attention={self.options.attention}: {type(model).__name__} lacks patches, pooling or "
                "before_patches, which maps need to find the patches; use task.predict.attention=none."
            )
        images = self._images(model, batch)
        attentions = attention_maps.attention_up_to_layer(model, images, self.options.layer)
        grid = model.patches.grid(images.shape[-2], images.shape[-1])
        tokens = (model.before_patches, model.pooling == "token", grid)
        if self.options.attention == "rollout":
            return attention_maps.rollout(attentions, *tokens)[:, None].cpu()
        return attention_maps.attention_map(attentions[-1], *tokens).cpu()

    def _word_attention(self, model: Any, batch: Batch) -> word_attention.WordAttention:
        """Compute the attention of words inside one patch of each image, in the layer `layer`.

        Raises UserError if the model has no words, or if it has no layer of this number.
        """
        if not hasattr(model, "words"):
            raise UserError(
                f"task.predict.attention=words: the patches of {type(model).__name__} have no words, as those of a TNT "
                "have; use maps or rollout."
            )
        return word_attention.attention_inside_patches(model, self._images(model, batch), self.options.layer)


def _has_attention(answer: Answer) -> bool:
    return "maps" in answer or "bias" in answer


def _draw_attention(image: Tensor, answer: Answer) -> Tensor:
    """Draw an answer's map (1, h, w) beside the image, or a sheet of heads, of the words of a patch, or of biases."""
    if "bias" in answer:
        return pictures.draw_biases(answer["bias"])
    maps, edges = answer["maps"], answer.get("edges")
    if "place" in answer:
        return word_attention.draw_word_attention(image, maps, answer["place"])
    if edges is None and len(maps) == 1:
        return pictures.draw_heat_map(image, maps[0])
    return pictures.draw_attention_sheet(image, maps, edges or ((), ()))
