"""The detection task: set loss, detections in pixels of the original image, COCO's metrics."""

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.data.images import normalise
from common.errors import UserError
from common.machine.device import compute_dtype, constant
from common.task import Adopted, Answer, Batch, Split
from common.types import Positive
from detr.criterion.answers import (
    CLASS_AGNOSTIC,
    Matches,
    Outputs,
    Targets,
    detections,
    group_by_set,
    logit_count,
    probabilities,
    query_indices,
    unstack_layers,
)
from detr.criterion.boxes import to_cxcywh
from detr.criterion.distillation import DetectionDistillationOptions
from detr.criterion.masks import resize_logits
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions, sum_terms
from detr.criterion.terms import OnRequest
from detr.data.protocol import DetectionData
from detr.evaluation.coco_evaluators import Evaluator
from detr.evaluation.masks import instance_masks
from detr.evaluation.panoptic_metric import Segments
from detr.evaluation.panoptic_segments import panoptic
from detr.importing import deformable, dino, official
from detr.tasks.distillation import DistilledDetection
from detr.tasks.prediction import PredictOptions as PredictOptions

PROPOSAL_SETS = ("proposals", "selected")  # answer sets of two-stage detectors, beside "queries"


class Detection(DistilledDetection):
    """The task of object detection: boxes with classes.

    After `restore`, prediction opens no file of the data set `data`. `evaluator` is the package that computes COCO's
    metrics; all packages give identical values. With `masks`, the model also predicts a mask of each object. With
    `distillation`, it also learns from a teacher. A subclass may add terms and costs to `criterion`, and override
    `hints` and `answer_sets`.
    """

    offered: ClassVar[tuple[str, ...]] = ("logits",)  # passed to a model if its constructor has this argument

    def __init__(
        self,
        *,
        data: DetectionData,
        queries: Positive,
        loss: LossOptions,
        matcher: MatcherOptions,
        predict: PredictOptions,
        evaluator: Evaluator,
        masks: bool = False,
        distillation: DetectionDistillationOptions | None = None,  # users' tasks and yaml may be older than this key
    ):
        super().__init__(data=data, predict=predict, evaluator=evaluator)
        self.queries, self.classification = queries, loss.classification
        self.masks = masks
        if masks:
            self.request_masks()
        self.criterion = Criterion(loss, matcher, masks)
        self.use_distillation(distillation, loss, matcher)

    @property
    def panoptic(self) -> bool:
        """Whether the model segments whole images: it has masks, and some of its classes are stuff."""
        return self.masks and any(category.get("isthing") == 0 for category in self.categories)

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of classes, without "no object", and the number of logits of each query."""
        classes = len(self.categories)
        return {"classes": classes, "logits": logit_count(self.classification, classes)}

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Import an official file of DETR, Deformable DETR or DINO; its class index is the COCO category id."""
        if dino.recognises(tensors):
            return dino.adopt(tensors)
        return deformable.adopt(tensors) if deformable.recognises(tensors) else official.adopt(tensors, self.masks)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return what a batch adds to the divisor of each loss term of each answer set.

        The keys are "set.term", such as "queries.class"; see detr/criterion/set_loss.py.
        """
        sets = self.answer_sets(batch).items()
        normalisers = [self.criterion.normalisers(name, counts, rows) for name, (counts, rows) in sets]
        of_labels = {key: value for of_set in normalisers for key, value in of_set.items()}
        return of_labels | self.teacher_normalisers(batch["counts"])

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
        targets = Targets(batch["counts"], batch["labels"], to_cxcywh(batch["boxes"]) / scale)
        return targets._replace(masks=batch["masks"], sizes=batch["sizes"]) if self.masks else targets

    def hints(self, batch: Batch, targets: Targets) -> tuple[dict[str, Tensor], Matches] | None:
        """Return additional model inputs, which training builds from the targets, and the matches of their outputs.

        Returns None if there are no hints, as in this class. The model's outputs for the hints form the answer set
        "hints"; the matches pair these outputs with objects. The hints of a sample may depend on its own targets and
        its seed (`batch["seeds"]`), but not on other samples.
        """
        return None

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the set loss over all layers and answer sets, and its parts for the log.

        See `detr.criterion.set_loss.sum_terms` for the parts. With a teacher, there is also the part "teacher", the sum
        of its terms over all layers; it makes up the share `distillation.weight` of the loss, and the labels the rest.

        Raises UserError when the model's outputs do not fit the task's options.
        """
        targets = self.targets(batch)
        hints, matches = self.hints(batch, targets) or (None, None)
        outputs = self._forward(model, batch, hints)
        on_request = _masks_on_request(model, outputs[-1])
        self._check_outputs(outputs[-1].keys() | on_request.keys(), outputs[-1]["logits"].shape[1])
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
                on_request if name == "queries" else None,
            )
            for name, layers in sets.items()
        }
        of_labels, parts = sum_terms(terms)
        loss, of_teacher = self.add_teacher(of_labels, batch, sets["queries"], normalisers)
        return loss, parts | of_teacher

    def _check_outputs(self, outputs: Set[str], queries: int) -> None:
        """Raise UserError if model and task differ in the number of queries, or if a loss term lacks its output."""
        if queries != self.queries:
            raise UserError(
                f"task.queries={self.queries}, but the model has {queries} queries (model.queries); "
                "give both the same number."
            )
        if missing := [term.name for term in self.criterion.terms if term.reads not in outputs]:
            raise UserError(
                f"The loss has the terms {missing}, for which the model has no outputs ({sorted(outputs)})."
            )

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
                f'the model returns the answer set "{proposals[0]}", for which the task has no normalisers with '
                "task.loss.classification=softmax; use task.loss.classification=sigmoid, or add the set to the task's "
                "method answer_sets."
            )

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return a dict for each image: boxes (D, 4) xyxy in pixels of the original image, scores (D,), labels (D,).

        D is the number of queries, or with `detections_per_image` at most that number. With `masks`, a dict also has
        the boolean masks (D, H, W) in pixels of the original image and, if the model has classes of stuff, `segments`
        (`detr.evaluation.panoptic_metric.Segments`).

        With the option `attention`, the answer to a batch of `read` also has `attention`
        (`detr.evaluation.attention.Attended`): what the queries, and the encoder at the centres of boxes, attend to.
        """
        if self.options.attention and "names" in batch:  # not in evaluation
            return self._with_attention(self._detections, model, batch)
        return self._detections(model, batch)

    def _detections(self, model: nn.Module, batch: Batch) -> list[Answer]:
        last = self._forward(model, batch)[-1]
        self._check_classes(last)
        if self.masks and "masks" not in last:
            raise UserError("task.masks=true needs a model that predicts masks; give model.masks=true, or neither.")
        scores, labels, boxes = detections(self.classification, last, self.options.detections_per_image)
        scale = batch["original_sizes"].to(scores.device).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4) as w h w h
        columns = {"boxes": boxes * scale, "scores": scores, "labels": labels}
        if self.options.attention or self.masks:
            columns["queries"] = query_indices(self.classification, last, self.options.detections_per_image)
        rows = zip(*(column.cpu() for column in columns.values()), strict=True)
        answers = [dict(zip(columns, row, strict=True)) for row in rows]
        if self.masks:
            self._add_masks(answers, last, batch)
        return answers

    def _add_masks(self, answers: list[Answer], outputs: Outputs, batch: Batch) -> None:
        """Add the masks of the detections and, for a panoptic model, the segments of the images."""
        shape, logits = batch["images"].shape[-2:], outputs["masks"].float()  # (B, Q, H', W')
        scores, labels = probabilities(self.classification, outputs["logits"].float()).max(-1)  # (B, Q) each
        things = [category.get("isthing") != 0 for category in self.categories]
        for i, answer in enumerate(answers):
            size, original = batch["sizes"][i].tolist(), batch["original_sizes"][i].tolist()
            answer["masks"] = instance_masks(
                logits[i], answer["queries"].to(logits.device), shape, size, original
            ).cpu()
            if self.panoptic:
                kept = scores[i] > self.options.panoptic_threshold
                resized = resize_logits(logits[i][kept], shape, size)
                rule = self.options.panoptic_rule
                ids, segments = panoptic(rule, scores[i][kept], labels[i][kept], resized, things, original)
                infos = [{**s, "category_id": self.categories[s["label"]]["id"]} for s in segments]
                answer["segments"] = Segments(ids, infos)

    def _forward(self, model: nn.Module, batch: Batch, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        device = next(model.parameters()).device
        sizes = batch["sizes"].to(device)
        images = normalise(batch["images"].to(device), sizes, compute_dtype(device))
        inputs = (images, sizes if batch["padded"] else None)
        return unstack_layers(model(*inputs) if hints is None else model(*inputs, hints))

    def split_advice(self, split: Split) -> list[str]:
        """Return warnings about the annotations of `split`, and about images with more objects than queries."""
        warnings = super().split_advice(split)
        if hasattr(self.data, "query_advice"):
            warnings += self.data.query_advice(split, self.queries)
        return warnings

    def from_scratch(self, minimum: int) -> str:
        """Return what DETR learns from few images without pretrained weights, and what to do instead."""
        return (
            f"DETR learns next to nothing from fewer than {minimum:,} that way; start from checkpoint=FILE (an "
            "official COCO detector), or from model.backbone.weights=imagenet_v1 or a file, or train model=dino."
        )

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


def _masks_on_request(model: nn.Module, outputs: Outputs) -> OnRequest:
    """Take the entry "mask_queries" out of a detector's outputs; returns the function that computes their masks."""
    queries = outputs.pop("mask_queries", None)
    if queries is None:
        return {}
    read_masks: Any = model.read_masks
    return {"masks": lambda images, rows: read_masks(queries, (images, rows))}
