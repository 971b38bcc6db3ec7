"""The task of classifying texts, such as by topic or sentiment, with an encoder-only model."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.nn.padding import is_real
from common.report.records import Records
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import Fraction, Positive
from seq2seq.data.protocol import LabelledTextData
from seq2seq.evaluation.text_classes import TextClassMetric
from seq2seq.importing import bert as importing
from seq2seq.tasks.fitting_data import refuse_other_data
from seq2seq.tasks.single_texts import SingleTextTask, on_device_of
from seq2seq.tokenizers.stored import restore_vocabulary


@dataclass(frozen=True, kw_only=True)
class ClassLossOptions:
    """Options of the loss.

    smoothing: label smoothing (Szegedy et al. 2016, arXiv 1512.00567): the fraction of each target that is distributed
        over all classes.
    """

    smoothing: Fraction


@dataclass(frozen=True, kw_only=True)
class ClassPredictOptions:
    """Options of prediction.

    top: number of most probable classes to list.
    """

    top: Positive


class SentenceClassificationState(TypedDict, total=False):
    """The task's part of a checkpoint; both may be missing if the weights were imported."""

    tokenizer: str  # as JSON
    classes: list[str]  # names, by index


class SentenceClassification(SingleTextTask):
    """Classification of texts that belong to one class each."""

    data: LabelledTextData
    goal = Goal("accuracy", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("vocabulary", "classes")
    state_schema = SentenceClassificationState

    def __init__(self, *, data: LabelledTextData, loss: ClassLossOptions, predict: ClassPredictOptions):
        """Make the task.

        Args:
            data: texts with classes.
            loss: see ClassLossOptions.
            predict: see ClassPredictOptions.
        """
        refuse_other_data(data, "classes", "texts with classes, which classifiers need", "data=text_classes")
        self.data, self.loss_options, self.options = data, loss, predict
        self.unanswered: list[str] = []  # see OptionalTask
        self._classes: list[str] | None = None

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by index: those of the data or, after `restore`, those of the checkpoint."""
        if self._classes is None:
            self._classes = list(self.data.classes())
        return self._classes

    def model_arguments(self) -> dict[str, Any]:
        """The number of entries of the vocabulary, and that of classes."""
        return {"vocabulary": self.data.text_tokenizer().size, "classes": len(self.classes)}

    def state(self) -> dict[str, Any]:
        """The tokenizer as JSON, and the names of the classes."""
        return {"tokenizer": self.data.text_tokenizer().state(), "classes": self.classes}

    def restore(self, state: dict[str, Any]) -> None:
        """Use the tokenizer and the classes of a checkpoint; raises UserError if it lacks one of them."""
        if "tokenizer" not in state:
            raise UserError(
                "The checkpoint contains no tokenizer, which gives its token ids a text; put the tokenizer's files "
                "(tokenizer.json, vocab.txt, or vocab.json and merges.txt) beside it."
            )
        if not state.get("classes"):
            raise UserError(
                "The checkpoint has no classifier and no classes; first train one on your texts from it (train.py "
                "checkpoint=FILE model=bert_classifier data.train=FILE)."
            )
        self.inherit(state)
        self._classes = list(state["classes"])
        self.data.set_learnt_classes(self._classes)

    def inherit(self, state: dict[str, Any]) -> None:
        """Use the tokenizer in `state`, if any, before the model is built, since the weights have learnt its tokens.

        `state` may be that of a masked language model.
        """
        if "tokenizer" in state:
            self.data.use(restore_vocabulary(state["tokenizer"]))

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Convert a BERT or RoBERTa of transformers with the tokenizer in its folder; see seq2seq/importing/bert.py."""
        return importing.adopt(tensors, folder, classifies=True)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """The number of texts, under the key "texts"."""
        return {"texts": float(len(batch["labels"]))}

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy in nats, summed over the batch and divided by the number of texts in the step. No parts."""
        self.refuse_long_samples(model, batch)
        logits, labels = self._logits(model, batch), on_device_of(model, batch["labels"])
        nats = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.loss_options.smoothing)
        return nats / normalisers["texts"], {}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits of the classes in at least fp32, (B, K)."""
        tokens, lengths = (on_device_of(model, batch[name]) for name in ("tokens", "lengths"))
        logits: Tensor = model(tokens, is_real(lengths, tokens.shape[1]))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer for each text.

        An answer has log_probabilities (K,) in nats, and label (index), name and share (probability) of the most
        probable class. In a batch of `read`, a text that cannot be answered has only `problem`, the reason.
        """
        if "problems" in batch:
            return self.user_answers(model, batch)
        self.refuse_long_samples(model, batch)
        return self.text_answers(model, batch)

    def text_answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """The classes of the texts of a batch, see `answers`."""
        scores = self._logits(model, batch).log_softmax(1).cpu()
        return [
            {"log_probabilities": row, "label": k, "name": self.classes[k], "share": float(row[k].exp())}
            for row, k in zip(scores, scores.argmax(1).tolist(), strict=True)
        ]

    def is_text(self, input: str) -> bool:
        """Whether `input` has a space, as paths rarely have."""
        return " " in input

    def record(self, text: str, answer: Answer) -> Records:
        """The most probable classes of a text as records {name, share}."""
        classes = self._top(answer)
        rows = "<br>".join(f"{escape(entry['name'])} <small>{entry['share']:.4f}</small>" for entry in classes)
        return Records(classes, text=f"<p>{escape(text)}<br>{rows}</p>")

    def _top(self, answer: Answer) -> list[dict[str, Any]]:
        shares, labels = answer["log_probabilities"].exp().topk(min(self.options.top, len(self.classes)))
        return [
            {"name": self.classes[label], "share": share}
            for label, share in zip(labels.tolist(), shares.tolist(), strict=True)
        ]

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Yield a line for each text: its most probable classes, each with its share, separated by tabs.

        A text that was not answered gives an empty line.
        """
        for answer in answers:
            top = [] if "problem" in answer else self._top(answer)
            yield "\t".join(f"{entry['name']} {entry['share']:.4f}" for entry in top)

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> None:
        """Return None, because the log shows no pictures of texts."""

    def metric(self, split: Split) -> TextClassMetric:
        """A metric of accuracy and macro F1 of `split`."""
        return TextClassMetric(self.classes, self.data.count(split))

    def advice(self, pretrained: bool) -> list[str]:
        """Return a warning if the data have a single class."""
        if len(self.classes) > 1:
            return []
        return [f"all texts have the class {self.classes[0]!r}, so there is nothing to learn: give texts of others."]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return a warning if at least ten answers are given, and all predict the same class."""
        if len(answers) < 10 or len({answer["label"] for answer in answers}) > 1:
            return []
        return [
            f'all texts are classified as "{answers[0]["name"]}": lower optimizer.lr, give schedule.warmup more steps, '
            "or start from checkpoint=FILE."
        ]
