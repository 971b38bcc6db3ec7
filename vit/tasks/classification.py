"""The task of image classification: loss, class names, predictions, metrics, and import of other programs' files."""

from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from common.data import batching
from common.data.names import composed, first_names
from common.errors import UserError
from common.nn.distillation import DistillationOptions, distillation_loss
from common.report.pictures import pad_and_stack
from common.report.tiles import add_caption
from common.task import Adopted, Answer, Batch, Goal, Split, Teacher
from common.types import SPLITS
from vit.criterion import cross_entropy as loss
from vit.criterion.cross_entropy import LossOptions
from vit.data.protocol import ImageData
from vit.evaluation.accuracy import ClassificationMetric, check_labels
from vit.evaluation.neighbours import NeighbourClassifier
from vit.importing import formats as importing
from vit.tasks.distillation import check_teacher, logits_of_heads, mean_logits, teacher_logits
from vit.tasks.prediction import ClassificationPrediction
from vit.tasks.prediction import PredictOptions as PredictOptions

# With fewer photographs and no pretrained weights, a warning is printed. In figure 4 of the ViT paper, training from
# scratch needs millions of images; later recipes use the 1.3 million of ImageNet.
MIN_IMAGES_FROM_SCRATCH = 100_000
MIN_PHOTOGRAPH_SIDE = 96  # pixels; no warning for smaller images, since small models learn them from scratch


class ClassificationState(TypedDict):
    """The content of `Classification.state`, which is stored in a checkpoint."""

    classes: list[str]  # names, by index


class Classification(ClassificationPrediction):
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

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(self._images(model, batch))
        return logits

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
