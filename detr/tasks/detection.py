"""The detection task: set loss, detections in pixels of the original image, COCO's metrics."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from common.data.images import normalise
from common.data.names import composed
from common.errors import UserError
from common.machine.device import compute_dtype, constant
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import SPLITS, Positive
from detr.criterion.answers import (
    CLASS_AGNOSTIC,
    Matches,
    Outputs,
    Targets,
    detections,
    group_by_set,
    logit_count,
    query_indices,
    unstack_layers,
)
from detr.criterion.boxes import to_cxcywh
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions, sum_terms
from detr.data.protocol import DetectionData
from detr.evaluation.coco_evaluators import Evaluator
from detr.evaluation.coco_metric import CocoMetric
from detr.importing import deformable, dino, official
from detr.tasks.prediction import DetectionPrediction
from detr.tasks.prediction import PredictOptions as PredictOptions

PROPOSAL_SETS = ("proposals", "selected")  # answer sets of two-stage detectors, beside "queries"
MIN_IMAGES_FROM_SCRATCH = 10_000  # the maintainers of official DETR recommend at least 10 to 15 thousand images


class Category(TypedDict):
    """A class: its category id in COCO's files, and its name."""

    id: int
    name: str


class DetectionState(TypedDict, total=False):
    """The task's part of a checkpoint; empty if the class head was removed from the checkpoint, for fine-tuning."""

    categories: list[Category]


class Detection(DetectionPrediction):
    """The task of object detection: boxes with classes.

    After `restore`, prediction opens no file of the data set `data`. `evaluator` is the package that computes COCO's
    metrics; all packages give identical values. A subclass may add terms and costs to `criterion`, and override `hints`
    and `answer_sets`.
    """

    goal = Goal("AP", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("classes",)
    offered: ClassVar[tuple[str, ...]] = ("logits",)  # passed to a model if its constructor has this argument
    state_schema = DetectionState

    def __init__(
        self,
        *,
        data: DetectionData,
        queries: Positive,
        loss: LossOptions,
        matcher: MatcherOptions,
        predict: PredictOptions,
        evaluator: Evaluator,
    ):
        self.data, self.queries, self.evaluator = data, queries, evaluator
        self.classification, self.options = loss.classification, predict
        self.criterion = Criterion(loss, matcher)
        self.unanswered: list[str] = []
        self._categories: list[dict[str, Any]] | None = None  # class index -> {"id", "name"}

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The classes in the order of class indices: the checkpoint's after `restore`, otherwise the data set's."""
        if self._categories is None:
            self._categories = [{"id": int(c["id"]), "name": str(c["name"])} for c in self.data.categories()]
        return self._categories

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of classes, without "no object", and the number of logits of each query."""
        classes = len(self.categories)
        return {"classes": classes, "logits": logit_count(self.classification, classes)}

    def state(self) -> dict[str, Any]:
        """Return the classes, in the order of class indices."""
        return {"categories": self.categories}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the classes from a checkpoint; raises UserError if it has none because its class head was removed."""
        if "categories" not in state:
            raise UserError(
                "The checkpoint has no class head (it was removed, for fine-tuning), so it detects no class; start a "
                "run from it (train.py checkpoint=FILE), or give a file with the head."
            )
        self._categories = state["categories"]

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Import an official file of DETR, Deformable DETR or DINO; its class index is the COCO category id."""
        if dino.recognises(tensors):
            return dino.adopt(tensors)
        return deformable.adopt(tensors) if deformable.recognises(tensors) else official.adopt(tensors)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return what a batch adds to the divisor of each loss term of each answer set.

        The keys are "set.term", such as "queries.class"; see detr/criterion/set_loss.py.
        """
        sets = self.answer_sets(batch).items()
        normalisers = [self.criterion.normalisers(name, counts, rows) for name, (counts, rows) in sets]
        return {key: value for of_set in normalisers for key, value in of_set.items()}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, kept for one version because users' tasks may call it."""
        return self.normalisers(batch)

    def answer_sets(self, batch: Batch) -> dict[str, tuple[list[int], list[int]]]:
        """Return, for each answer set that the loss reads, the numbers of objects and of output rows of each image.

        An answer set is a group of output rows that has its own matching and loss. The result maps the set's name to
        two lists with one number per image. With "sigmoid", no normaliser depends on the number of rows, so the sets of
        proposals are listed whether or not the model has them, each with as many rows as objects.
        """
        counts = batch["counts"]
        sets = {"queries": (counts, [self.queries] * len(counts))}
        return sets if self.classification == "softmax" else sets | dict.fromkeys(PROPOSAL_SETS, (counts, counts))

    def targets(self, batch: Batch) -> Targets:
        """Return the batch's objects, with boxes relative to the width and height of their images."""
        counts = constant(batch["counts"], like=batch["boxes"])
        image = torch.repeat_interleave(counts, output_size=len(batch["boxes"]))  # (T,) image of each object
        scale = batch["sizes"].flip(1).repeat(1, 2)[image]  # (T, 4) as w h w h
        return Targets(batch["counts"], batch["labels"], to_cxcywh(batch["boxes"]) / scale)

    def hints(self, batch: Batch, targets: Targets) -> tuple[dict[str, Tensor], Matches] | None:
        """Return additional model inputs, which training builds from the targets, and the matches of their outputs.

        Returns None if there are no hints, as in this class. The model's outputs for the hints form the answer set
        "hints"; the matches pair these outputs with objects. The hints of a sample may depend on its own targets and
        its seed (`batch["seeds"]`), but not on other samples.
        """
        return None

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the set loss over all layers and answer sets, and its parts for the log.

        See `detr.criterion.set_loss.sum_terms` for the parts.

        Raises UserError when the model's outputs do not fit the task's options.
        """
        targets = self.targets(batch)
        hints, matches = self.hints(batch, targets) or (None, None)
        outputs = self._forward(model, batch, hints)
        self._check_outputs(outputs[-1])
        self._check_classes(outputs[-1])
        sets = group_by_set(outputs)
        self._check_proposals(sets, normalisers)
        agnostic = targets._replace(labels=torch.zeros_like(targets.labels))
        terms = {
            name: self.criterion(
                name,
                layers,
                agnostic if name in CLASS_AGNOSTIC else targets,
                normalisers,
                matches if name == "hints" else None,
            )
            for name, layers in sets.items()
        }
        return sum_terms(terms)

    def _check_outputs(self, outputs: Outputs) -> None:
        """Raise UserError if model and task differ in the number of queries, or if a loss term lacks its output."""
        queries = outputs["logits"].shape[1]
        if queries != self.queries:
            raise UserError(
                f"task.queries={self.queries}, but the model has {queries} queries (model.queries); "
                "give both the same number."
            )
        if missing := [term.name for term in self.criterion.terms if term.reads not in outputs]:
            raise UserError(f"The loss has the terms {missing}, for which the model has no outputs ({list(outputs)}).")

    def _check_classes(self, outputs: Outputs) -> None:
        """Raise UserError if the classification is "sigmoid" and the number of logits is not that of the classes.

        This happens if the model's constructor has no argument `logits`, which the task passes.
        """
        logits = outputs["logits"].shape[-1]
        if self.classification == "sigmoid" and logits != len(self.categories):
            raise UserError(
                f"task.loss.classification=sigmoid needs a logit for each of the {len(self.categories)} classes, but "
                f"the model has {logits}; add the argument `logits`, which the task passes, to its constructor."
            )

    def _check_proposals(self, sets: Iterable[str], normalisers: Mapping[str, float]) -> None:
        """Raise UserError if the classification is "softmax" and there are proposals, for which it has no normaliser.

        A subclass may add the proposals to `answer_sets`.
        """
        proposals = [name for name in sets if name in PROPOSAL_SETS and f"{name}.class" not in normalisers]
        if self.classification == "softmax" and proposals:
            raise UserError(
                "task.loss.classification=softmax has no loss for the proposals of a two-stage detector; use "
                "task.loss.classification=sigmoid, or model.two_stage=false."
            )

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return a dict for each image: boxes (D, 4) xyxy in pixels of the original image, scores (D,), labels (D,).

        D is the number of queries, or with `detections_per_image` at most that number.

        With the option `attention`, the answer to a batch of `read` also has `attention`
        (`detr.evaluation.attention.Attended`): what the queries, and the encoder at the centres of boxes, attend to.
        """
        if self.options.attention and "names" in batch:  # not in evaluation
            return self._with_attention(self._detections, model, batch)
        return self._detections(model, batch)

    def _detections(self, model: nn.Module, batch: Batch) -> list[Answer]:
        last = self._forward(model, batch)[-1]
        self._check_classes(last)
        scores, labels, boxes = detections(self.classification, last, self.options.detections_per_image)
        scale = batch["original_sizes"].to(scores.device).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4) as w h w h
        columns = {"boxes": boxes * scale, "scores": scores, "labels": labels}
        if self.options.attention:
            columns["queries"] = query_indices(self.classification, last, self.options.detections_per_image)
        rows = zip(*(column.cpu() for column in columns.values()), strict=True)
        return [dict(zip(columns, row, strict=True)) for row in rows]

    def _forward(self, model: nn.Module, batch: Batch, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        device = next(model.parameters()).device
        sizes = batch["sizes"].to(device)
        images = normalise(batch["images"].to(device), sizes, compute_dtype(device))
        inputs = (images, sizes if batch["padded"] else None)
        return unstack_layers(model(*inputs) if hints is None else model(*inputs, hints))

    def metric(self, split: Split) -> CocoMetric:
        """Create a metric for `split`; its ground truth includes crowds and boxes without area.

        Raises UserError if the category id of an object is missing from the model's classes or has another name there,
        or if `evaluator` is not installed. Names are not compared if the model's are those that an imported file
        without names gets: "class 0", "class 1" and so on.
        """
        truth = self.data.ground_truth(split)
        names = {category["id"]: category["name"] for category in self.categories}
        unnamed = all(name == f"class {number}" for number, name in enumerate(names.values()))
        used = {annotation["category_id"] for annotation in truth.get("annotations", [])}
        for category in truth["categories"]:
            id = category["id"]
            name = names.get(id)
            same = name is not None and (unnamed or composed(name) == composed(category["name"]))
            if id in used and not same:
                ids = [model_id for model_id, model_name in names.items() if model_name == category["name"]]
                there = f' and "{category["name"]}" under id {ids[0]}' if ids else ""
                raise UserError(
                    f'{split} has objects of category {id} "{category["name"]}", but the model has '
                    f"{'no class' if name is None else json.dumps(name)} with that id{there}; evaluate the model on "
                    "data of its own classes, or train on these data from checkpoint=FILE."
                )
        return CocoMetric(truth, self.categories, self.evaluator)

    def split_advice(self, split: Split) -> list[str]:
        """Return warnings about the annotations of `split`, and about images with more objects than queries."""
        warnings = list(self.data.advice(split)) if hasattr(self.data, "advice") else []
        if hasattr(self.data, "query_advice"):
            warnings += self.data.query_advice(split, self.queries)
        return warnings

    def advice(self, pretrained: bool) -> list[str]:
        """Return warnings about the annotations, and about too few images to train without pretrained weights.

        For synthetic images (`data.drawn`), the number of images causes no warning, because they can be learnt without
        pretrained weights.
        """
        lines = [warning for split in SPLITS for warning in self.split_advice(split)]
        count = self.data.count("train")
        if pretrained or count >= MIN_IMAGES_FROM_SCRATCH or getattr(self.data, "drawn", False):
            return lines
        return [
            *lines,
            f"the model starts without pretrained weights and there are only {count} training images: DETR learns next "
            f"to nothing from fewer than {MIN_IMAGES_FROM_SCRATCH:,} that way; start from checkpoint=FILE (an official "
            "COCO detector), or from model.backbone.weights=imagenet_v1 or a file.",
        ]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return a warning if the model has collapsed: in every image, all queries predict nearly the same box."""
        spreads = [
            float(a["boxes"].std(0).mean() / (a["boxes"].abs().max() + 1e-6)) for a in answers if len(a["boxes"]) > 1
        ]
        if not spreads or max(spreads) > 0.01:
            return []
        return [
            "all queries predict nearly the same box (their spread is under 1 % of the image), so AP will stay near "
            "zero: train longer, start from pretrained weights (checkpoint=FILE or model.backbone.weights), or lower "
            "optimizer.lr."
        ]
