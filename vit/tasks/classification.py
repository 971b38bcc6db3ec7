"""The task of image classification: loss, class names, predictions, metrics, and import of other programs' files."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn

from common.data import batching
from common.data.image_objects import exif_of, to_image
from common.data.images import read_image
from common.data.names import composed, first_names
from common.errors import UserError
from common.files.inputs import InputFile, read_each
from common.files.names import answer_file, printable
from common.files.output import write_answer
from common.nn.distillation import DistillationOptions, distillation_loss
from common.report.pictures import pad_and_stack, write_picture
from common.report.records import Records, check_batch, draw_on, predict_each
from common.report.tiles import add_caption
from common.task import Adopted, Answer, Batch, Goal, Split, Teacher
from common.types import SPLITS, Count, Positive
from vit.criterion import cross_entropy as loss
from vit.criterion.cross_entropy import LossOptions
from vit.data.protocol import ImageData
from vit.evaluation import attention_maps, pictures, window_maps, word_attention
from vit.evaluation.accuracy import ClassificationMetric, check_labels
from vit.evaluation.neighbours import NeighbourClassifier
from vit.importing import formats as importing
from vit.tasks.distillation import check_teacher, logits_of_heads, mean_logits, teacher_logits

# With fewer photographs and no pretrained weights, a warning is printed. In figure 4 of the ViT paper, training from
# scratch needs millions of images; later recipes use the 1.3 million of ImageNet.
MIN_IMAGES_FROM_SCRATCH = 100_000
MIN_PHOTOGRAPH_SIDE = 96  # pixels; no warning for smaller images, since small models learn them from scratch


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


class ClassificationState(TypedDict):
    """The content of `Classification.state`, which is stored in a checkpoint."""

    classes: list[str]  # names, by index


class Classification:
    """Classification of images that belong to one class each.

    Prediction from a checkpoint opens no file of `data`, unless `predict.neighbours` is above 0.
    """

    goal = Goal("top1", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("classes", "channels", "image_size")
    state_schema = ClassificationState

    def __init__(
        self,
        *,
        data: ImageData,
        loss: LossOptions,
        predict: PredictOptions,
        distillation: DistillationOptions | None = None,  # users' tasks and their yaml may be older than this key
    ):
        self.data, self.loss_options, self.options = data, loss, predict
        self.distillation = distillation
        self.teacher: Teacher | None = None
        self._classes: list[str] | None = None
        self.unanswered: list[str] = []
        self._neighbours: NeighbourClassifier | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index: those of the data or, after `restore`, those of the checkpoint."""
        if self._classes is None:
            self._classes = list(self.data.classes())
        return self._classes

    @property
    def teacher_file(self) -> str | None:
        """The checkpoint of the teacher (`distillation.teacher`); None without distillation."""
        return self.distillation.teacher if self.distillation else None

    def set_teacher(self, teacher: Teacher) -> list[str]:
        """Store the teacher for `loss`; returns notes for the log.

        Raises UserError if the teacher has other classes or needs other images; see vit/tasks/distillation.py.
        """
        notes = check_teacher(teacher, self.classes, self.data)
        self.teacher = teacher
        return notes

    def model_arguments(self) -> dict[str, Any]:
        """Return the model's arguments that the data determine: number of classes, channels, (height, width)."""
        return {
            "classes": len(self.classes),
            "channels": self.data.channels,
            "image_size": tuple(self.data.image_size),
        }

    def state(self) -> dict[str, Any]:
        """Return {"classes": the names of the classes, by index}."""
        return {"classes": self.classes}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the classes of a checkpoint.

        Raises UserError if there are none, as in an imported file without a head.
        """
        self._classes = list(state["classes"])
        if not self._classes:
            raise UserError(
                "The checkpoint has no head and no classes; first train a head on your images from it (train.py "
                "checkpoint=FILE)."
            )
        if hasattr(self.data, "set_learnt_classes"):
            self.data.set_learnt_classes(self._classes)

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Convert the weights in a file of Google, torchvision, timm or transformers; see vit/importing/formats.py.

        If the task's classes are known and the file's head has as many outputs, the outputs are assumed to be these
        classes in the same order.
        """
        height, width = self.data.image_size
        return importing.adopt(tensors, self._classes, (height, width))

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return {"images": the number of images in the batch}.

        The loss is divided by the sum of this number over all batches of a step. Raises UserError for a label outside
        the classes, since on a GPU the loss would fail without naming the sample.
        """
        check_labels(batch["ids"], batch["labels"], len(self.classes))
        if "other_labels" in batch:
            check_labels(batch["ids"], batch["other_labels"], len(self.classes), "the partner of sample")
        return {"images": float(len(batch["labels"]))}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """Return `normalisers(batch)`. This is its former name, which users' tasks may still call in this version."""
        return self.normalisers(batch)

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the batch's part of the step's mean cross-entropy, in nats; see vit/criterion/cross_entropy.py.

        This part is the sum over the batch divided by the number of images of the whole step. Without a teacher, the
        returned dict is empty, because the loss has no other terms. With a teacher, its parts are "labels", the
        cross-entropy, and "teacher", the loss of distillation, each divided in the same way and without its weight
        (common/nn/distillation.py). The class head learns from the labels and the distillation head from the teacher; a
        model with one head learns from both. Without a teacher, the mean of both heads' logits learns from the labels.
        """
        images = self._images(model, batch)
        outputs = model(images)
        logits, student = logits_of_heads(outputs) if self.teacher else (mean_logits(outputs),) * 2
        targets = (batch["labels"], batch.get("other_labels"), batch.get("shares"))
        of_labels = loss.cross_entropy(self.loss_options, logits, *targets) / normalisers["images"]
        if self.teacher is None or self.distillation is None:
            assert self.teacher_file is None, "assembly provides the teacher before the first step"
            return of_labels, {}
        teacher = teacher_logits(self.teacher, images)
        of_teacher = distillation_loss(self.distillation, student, teacher).sum() / normalisers["images"]
        weight = self.distillation.weight
        parts = {"labels": of_labels.detach(), "teacher": of_teacher.detach()}
        return (1 - weight) * of_labels + weight * of_teacher, parts

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return one answer (a dict) for each image.

        An answer has log_probabilities (K,) in nats, and label (index), name and probability of the most probable
        class. If the option `attention` is "maps" or "rollout", it also has maps (1 or heads, h, w) and, for a model
        with windows, edges: the rows and columns of the maps at which a window begins. With "words", it has maps
        (W, side, side) and the `place` of their patch (vit/evaluation/word_attention.py); with "bias", it has bias
        (heads, 2 h - 1, 2 w - 1). If `neighbours` is not 0, it also has nearest, the index of the class that the
        nearest neighbours predict, or -1 if the image's features are not finite.
        """
        logits = self._forward(model, batch)
        scores = logits.float().log_softmax(dim=-1).cpu()  # (B, K)
        labels = scores.argmax(dim=-1).tolist()
        answers: list[Answer] = [
            {"log_probabilities": s, "label": k, "name": self.classes[k], "probability": float(s[k].exp())}
            for s, k in zip(scores, labels, strict=True)
        ]
        extra: dict[str, Any] = {}
        if self.options.attention != "none":
            extra |= self._attention(model, batch)
        if self.options.neighbours:
            extra["nearest"] = self._nearest_classes(model, batch).tolist()
        return [answer | {key: extra[key][i] for key in extra} for i, answer in enumerate(answers)]

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

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(self._images(model, batch))
        return logits

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

    def _nearest_classes(self, model: nn.Module, batch: Batch) -> Tensor:
        """Predict the class of each image from its nearest training images in feature space: int64 (B,).

        The features of all training images are computed at the first call and stored until `metric` is called.
        """
        if self._neighbours is None:
            size = self.data.batch_size
            batches = batching.evaluation(self.data, "train", batch_size=size, rank=0, world=1, workers=0)
            pairs = [(self._features(model, training), training["labels"]) for training in batches]
            features, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
            self._neighbours = NeighbourClassifier(features, labels.to(features.device), len(self.classes))
        return self._neighbours.classify(self._features(model, batch), self.options.neighbours)

    def _features(self, model: Any, batch: Batch) -> Tensor:
        if getattr(model, "features", None) is None:
            raise UserError(f"task.predict.neighbours: {type(model).__name__} has no method features(images); use 0.")
        features: Tensor = model.features(self._images(model, batch))
        return features.float()

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

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """Draw the first `count` images with their predicted classes, for the log: uint8 (n, 3, H, W)."""
        images, labels = self.data.thumbnails(batch, count), batch["labels"].tolist()
        captioned = []
        for image, label, answer in zip(images, labels, answers, strict=False):
            text = f"{answer['name']} {answer['probability']:.2f}"
            captioned.append(add_caption(image, text, None if label < 0 else answer["label"] == label))
        return pad_and_stack(captioned)

    def metric(self, split: Split) -> ClassificationMetric:
        """Return an empty metric of accuracy, loss and confusion matrix for `split`.

        Raises UserError unless the data have the classes of the model in the same order. If an imported model has no
        class names, it is sufficient that the number of classes is the same.
        """
        self._neighbours = None  # the stored features are out of date if the weights have changed
        classes = list(self.data.classes())
        names, learnt = ([composed(name) for name in part] for part in (classes, self.classes))
        same = names == learnt
        reordered = not same and sorted(names) == sorted(learnt)
        if reordered and hasattr(self.data, "class_order"):
            raise UserError(
                f"The data have the classes of this model in another order ({first_names(classes)} instead of "
                f"{first_names(self.classes)}); give data.class_order as it was in training, string or natural."
            )
        if not same and not (self._is_nameless() and len(classes) == len(self.classes)):
            raise UserError(
                f"The data have {len(classes)} classes ({first_names(classes)}), and this model has learnt "
                f"{len(self.classes)} ({first_names(self.classes)}); evaluate it on data of its own classes, or train "
                "on these data from checkpoint=FILE."
            )
        return ClassificationMetric(classes, self.data.count(split))

    def evaluation_notes(self) -> list[str]:
        """Return notes on the classes of an imported model without class names; otherwise an empty list.

        The notes list the class names of the data, which are assumed to be those of the model.
        """
        notes: list[str] = getattr(self.data, "class_notes", list)() if self._is_nameless() else []
        return notes

    def _is_nameless(self) -> bool:
        return all(name == f"class {i}" for i, name in enumerate(self.classes))  # importing.classes gives these names

    def split_advice(self, split: Split) -> list[str]:
        """Return the data's warnings about `split`."""
        return list(self.data.advice(split)) if hasattr(self.data, "advice") else []

    def advice(self, pretrained: bool) -> list[str]:
        """Return the data's warnings, and one about too few photographs if the model has no pretrained weights."""
        warnings = [warning for split in SPLITS for warning in self.split_advice(split)]
        count = self.data.count("train")
        if pretrained or count >= MIN_IMAGES_FROM_SCRATCH or max(self.data.image_size) < MIN_PHOTOGRAPH_SIDE:
            return warnings
        return [
            *warnings,
            f"the model starts without pretrained weights and there are only {count:,} training images: a ViT learns "
            f"little from fewer than {MIN_IMAGES_FROM_SCRATCH:,} photographs from scratch; start from checkpoint=FILE "
            "(weights of Google, torchvision, timm or transformers).",
        ]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return a warning if all `answers` predict the same class; otherwise an empty list.

        There is no warning for fewer than 10 answers.
        """
        if len(answers) < 10 or len({answer["label"] for answer in answers}) > 1:
            return []
        return [
            f'all images are classified as "{answers[0]["name"]}": lower optimizer.lr, give schedule.warmup more '
            "steps, or start from checkpoint=FILE."
        ]


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
