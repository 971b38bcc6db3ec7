"""Object detection as the trainer and the evaluator see it: set loss, boxes in pixels, COCO numbers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from common.data.images import list_images, normalise, read_image
from common.errors import UserError
from common.machine.device import compute_dtype, constant
from common.report.pictures import pad_and_stack, write_picture
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import Fraction, Positive
from detr.criterion.answers import Matches, Outputs, Targets, detections, group_by_set, logit_count, unstack_layers
from detr.criterion.boxes import to_cxcywh
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions, sum_terms
from detr.data.protocol import DetectionData
from detr.evaluation.coco_evaluators import Evaluator
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.pictures import draw
from detr.importing import official

MIN_IMAGES_FROM_SCRATCH = 10_000  # images; the official repository's maintainers name 10 to 15 thousand


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """threshold: the least score that is drawn and listed; evaluation keeps every query."""

    threshold: Fraction


class Detection:
    """Boxes with classes. `data` may stay unopened for prediction alone.

    `evaluator` names the program that counts COCO's numbers, which are the same. A subclass may add terms and costs to
    `criterion`, build `hints`, and name further `answer_sets`.
    """

    goal = Goal("AP", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("classes",)
    offered: ClassVar[tuple[str, ...]] = ("logits",)  # to a model whose constructor names it

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
        self._categories: list[dict[str, Any]] | None = None  # class index -> {"id", "name"}

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The data set's classes in order of index, or the checkpoint's once `restore` has been called."""
        if self._categories is None:
            self._categories = [{"id": int(c["id"]), "name": str(c["name"])} for c in self.data.categories()]
        return self._categories

    def model_arguments(self) -> dict[str, Any]:
        """The number of classes, without "no object", and how many logits a query answers with."""
        classes = len(self.categories)
        return {"classes": classes, "logits": logit_count(self.classification, classes)}

    def state(self) -> dict[str, Any]:
        """The classes, by index."""
        return {"categories": self.categories}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the classes from a checkpoint."""
        self._categories = state["categories"]

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Official facebookresearch/detr weights, whose class index is the COCO id."""
        return official.adopt(tensors)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """What each term of each set of answers is divided by; see Term.normaliser."""
        sets = self.answer_sets(batch).items()
        terms = [self.criterion.normalisers(name, counts, rows) for name, (counts, rows) in sets]
        return {key: value for of_set in terms for key, value in of_set.items()}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, which users' tasks may call for one version."""
        return self.normalisers(batch)

    def answer_sets(self, batch: Batch) -> dict[str, tuple[list[int], list[int]]]:
        """The sets of answers that the loss reads: how many objects and rows each image has there."""
        counts = batch["counts"]
        return {"queries": (counts, [self.queries] * len(counts))}

    def targets(self, batch: Batch) -> Targets:
        """The batch's objects, boxes relative to their images."""
        counts = constant(batch["counts"], like=batch["boxes"])
        image = torch.repeat_interleave(counts, output_size=len(batch["boxes"]))  # (T,) image of each object
        scale = batch["sizes"].flip(1).repeat(1, 2)[image]  # (T, 4) as w h w h
        return Targets(batch["counts"], batch["labels"], to_cxcywh(batch["boxes"]) / scale)

    def hints(self, batch: Batch, targets: Targets) -> tuple[dict[str, Tensor], Matches] | None:
        """What the model gets of the targets in training, and the objects that its answers to that belong to.

        Built from the targets and the samples' own seeds (`batch["seeds"]`), so that it never depends on the rest of
        the batch. The answers are the set "hints".
        """
        return None

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The set loss of all layers and sets of answers; see detr/criterion/set_loss.py."""
        targets = self.targets(batch)
        hints, pairs = self.hints(batch, targets) or (None, None)
        outputs = self._forward(model, batch, hints)
        self._check(outputs[-1])
        self._check_classes(outputs[-1])
        terms = {
            name: self.criterion(name, layers, targets, normalisers, pairs if name == "hints" else None)
            for name, layers in group_by_set(outputs).items()
        }
        return sum_terms(terms)

    def _check(self, outputs: Outputs) -> None:
        """Raise UserError when the last layer does not answer as the options say."""
        queries = outputs["logits"].shape[1]
        if queries != self.queries:
            raise UserError(
                f"task.queries={self.queries}, but the model has {queries} queries (model.queries); "
                "give both the same number."
            )
        if missing := [term.name for term in self.criterion.terms if term.reads not in outputs]:
            raise UserError(f"The loss has the terms {missing}, for which the model has no answers ({list(outputs)}).")

    def _check_classes(self, outputs: Outputs) -> None:
        """Raise UserError when a model that was not told the number of logits has another one."""
        logits = outputs["logits"].shape[-1]
        if self.classification == "sigmoid" and logits != len(self.categories):
            raise UserError(
                f"task.loss.classification=sigmoid needs a logit for each of the {len(self.categories)} classes, but "
                f"the model has {logits}; let its constructor take `logits`, which the task hands in."
            )

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """One answer per image: every query's box (Q, 4) xyxy in pixels of the original image, score and label (Q,)."""
        last = self._forward(model, batch)[-1]
        self._check_classes(last)
        scores, labels, boxes = detections(self.classification, last)
        scale = batch["original_sizes"].to(scores.device).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4) as w h w h
        answers = zip((boxes * scale).cpu(), scores.cpu(), labels.cpu(), strict=True)
        return [{"boxes": box, "scores": score, "labels": label} for box, score, label in answers]

    def _forward(self, model: nn.Module, batch: Batch, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        device = next(model.parameters()).device
        sizes = batch["sizes"].to(device)
        images = normalise(batch["images"].to(device), sizes, compute_dtype(device))
        inputs = (images, sizes if batch["padded"] else None)
        return unstack_layers(model(*inputs) if hints is None else model(*inputs, hints))

    def read(self, input: str) -> Iterator[Batch]:
        """One image file, or a folder of them, as batches of one, resized as in evaluation."""
        for path in list_images(Path(input)):
            yield self.data.collate([self.data.view(read_image(path), path)])

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each picture with its boxes, and a JSON list of {box (xyxy pixels), name, score}; one line each."""
        for path, answer in zip(batch["files"], answers, strict=True):
            objects = [
                {"box": [round(v, 2) for v in box.tolist()], "name": self._name(label), "score": round(float(score), 4)}
                for box, label, score in zip(*self._above_threshold(answer), strict=True)
            ]
            source, target = Path(path), folder / f"{Path(path).name}.boxes"  # never a name of the user's own pictures
            picture = self._draw(read_image(source), answer)
            write_picture(picture, target.with_name(f"{target.name}.jpg"))
            answer_file = target.with_name(f"{target.name}.json")
            answer_file.write_text(json.dumps({"file": str(source), "objects": objects}, indent=1))
            names = [item["name"] for item in objects]
            counted = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "nothing"
            yield f"{source.name}: {counted} (score >= {self.options.threshold})"

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """uint8 (B, 3, H, W) of the first `count` images with their boxes, for the log."""
        drawn = []
        for image, size, original, answer in list(
            zip(batch["images"], batch["sizes"], batch["original_sizes"], answers, strict=True)
        )[:count]:
            height, width = size.tolist()
            scale = (size.float() / original).flip(0).repeat(2).cpu()  # back to the pixels of the resized image
            drawn.append(self._draw(image[:, :height, :width].cpu(), {**answer, "boxes": answer["boxes"] * scale}))
        return pad_and_stack(drawn)

    def _draw(self, image: Tensor, answer: Answer) -> Tensor:
        boxes, labels, scores = self._above_threshold(answer)
        return draw(image, boxes, [self._name(label) for label in labels], scores, labels)

    def _above_threshold(self, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
        keep = answer["scores"] >= self.options.threshold
        return answer["boxes"][keep], answer["labels"][keep], answer["scores"][keep]

    def _name(self, label: Tensor) -> str:
        return str(self.categories[int(label)]["name"])

    def metric(self, split: Split) -> CocoMetric:
        """COCO average precision on the uncleaned ground truth of `split`.

        Raises UserError when the data's classes are not those that the model has learnt, or `evaluator` is not there.
        """
        truth = self.data.ground_truth(split)
        ours = {category["id"]: category["name"] for category in self.categories}
        used = {annotation["category_id"] for annotation in truth["annotations"]}
        for category in truth["categories"]:
            known = ours.get(category["id"])
            nameless = known is not None and known.startswith("class ")  # an imported file that names no classes
            if category["id"] in used and known != category["name"] and not nameless:
                raise UserError(
                    f'{split} has objects of category {category["id"]} "{category["name"]}", and this model knows '
                    f"{'none' if known is None else json.dumps(known)} by that id; evaluate it on data of its own "
                    "classes, or train on these data from checkpoint=FILE."
                )
        return CocoMetric(truth, self.categories, self.evaluator)

    def advice(self, pretrained: bool) -> list[str]:
        """What the data call for before the first step; the set that the project draws is made for a fresh start."""
        count = self.data.count("train")
        if pretrained or count >= MIN_IMAGES_FROM_SCRATCH or getattr(self.data, "drawn", False):
            return []
        return [
            f"the model starts from random weights with only {count} training images: from scratch, DETR learns next "
            f"to nothing from fewer than {MIN_IMAGES_FROM_SCRATCH:,}; start from checkpoint=FILE (an official COCO "
            "detector), or from model.backbone.weights=imagenet_v1 or a file."
        ]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """What the newest answers call for: the collapse in which all queries give nearly one box."""
        spread = [
            float(a["boxes"].std(0).mean() / (a["boxes"].abs().max() + 1e-6)) for a in answers if len(a["boxes"]) > 1
        ]
        if not spread or max(spread) > 0.01:
            return []
        return [
            "all queries predict nearly the same box (their spread is under 1 % of the image), so AP will stay near "
            "zero: train longer, start from pretrained weights (checkpoint=FILE or model.backbone.weights), or lower "
            "optimizer.lr."
        ]
