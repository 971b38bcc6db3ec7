"""The detection task: set loss, detections in pixels of the original image, COCO's numbers."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from common.data.image_objects import to_image
from common.data.images import Exif, normalise, read_image
from common.data.names import composed
from common.errors import UserError
from common.files.inputs import InputFile, read_each
from common.files.names import answer_file, printable
from common.files.output import write_answer
from common.machine.device import compute_dtype, constant
from common.report.pictures import pad_and_stack, write_picture
from common.report.records import Records, draw_on, predict_each
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import SPLITS, Fraction, Positive
from detr.criterion.answers import Matches, Outputs, Targets, detections, group_by_set, logit_count, unstack_layers
from detr.criterion.boxes import to_cxcywh
from detr.criterion.matcher import MatcherOptions
from detr.criterion.set_loss import Criterion, LossOptions, sum_terms
from detr.data.protocol import DetectionData
from detr.evaluation.coco_evaluators import Evaluator
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.pictures import draw
from detr.importing import official

MIN_IMAGES_FROM_SCRATCH = 10_000  # the maintainers of the official repository say 10 to 15 thousand


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of prediction; evaluation keeps every query.

    threshold: minimum score of detections that are drawn and listed.
    nms: IoU above which the box with the lower score of two boxes of a class is dropped; None = keep all, as in DETR.
    """

    threshold: Fraction
    nms: Fraction | None = None  # has a default, since users' yaml files may be older


class Category(TypedDict):
    """A class: its category id in COCO's files, and its name."""

    id: int
    name: str


class DetectionState(TypedDict, total=False):
    """The task's part of a checkpoint; files for fine-tuning, without a class head, have no categories."""

    categories: list[Category]


class Detection:
    """The task of object detection: boxes with classes. Prediction reads no file of `data`.

    `evaluator` is the package that computes COCO's numbers; all packages give the same numbers. A subclass may add
    terms and costs to `criterion`, build `hints`, and return further `answer_sets`.
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
        """The number of classes, without "no object", and the number of logits of each query."""
        classes = len(self.categories)
        return {"classes": classes, "logits": logit_count(self.classification, classes)}

    def state(self) -> dict[str, Any]:
        """The classes, in the order of class indices."""
        return {"categories": self.categories}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the classes from a checkpoint; raises UserError if it has none, since its class head was removed."""
        if "categories" not in state:
            raise UserError(
                "The checkpoint has no class head (it was removed, for fine-tuning), so it detects no class; start a "
                "run from it (train.py checkpoint=FILE), or give a file with the head."
            )
        self._categories = state["categories"]

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Import an official facebookresearch/detr file, in which the class index is the COCO category id."""
        return official.adopt(tensors)

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """The divisor of each term of each answer set; see Term.normaliser."""
        sets = self.answer_sets(batch).items()
        normalisers = [self.criterion.normalisers(name, counts, rows) for name, (counts, rows) in sets]
        return {key: value for of_set in normalisers for key, value in of_set.items()}

    def sizes(self, batch: Batch) -> dict[str, float]:
        """The former name of `normalisers`, kept for one version because users' tasks may call it."""
        return self.normalisers(batch)

    def answer_sets(self, batch: Batch) -> dict[str, tuple[list[int], list[int]]]:
        """The answer sets that the loss reads: name -> each image's number of objects, and of output rows."""
        counts = batch["counts"]
        return {"queries": (counts, [self.queries] * len(counts))}

    def targets(self, batch: Batch) -> Targets:
        """The batch's objects, with boxes relative to their images."""
        counts = constant(batch["counts"], like=batch["boxes"])
        image = torch.repeat_interleave(counts, output_size=len(batch["boxes"]))  # (T,) image of each object
        scale = batch["sizes"].flip(1).repeat(1, 2)[image]  # (T, 4) as w h w h
        return Targets(batch["counts"], batch["labels"], to_cxcywh(batch["boxes"]) / scale)

    def hints(self, batch: Batch, targets: Targets) -> tuple[dict[str, Tensor], Matches] | None:
        """Additional model inputs that training builds from the targets, and the matches of their outputs; or None.

        Their outputs form the answer set "hints". The hints of a sample may depend on its own targets and its seed
        (`batch["seeds"]`), but not on the rest of the batch.
        """
        return None

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """The set loss over all layers and answer sets; see detr/criterion/set_loss.py.

        Raises UserError when the model's outputs do not fit the task's options.
        """
        targets = self.targets(batch)
        hints, matches = self.hints(batch, targets) or (None, None)
        outputs = self._forward(model, batch, hints)
        self._check_outputs(outputs[-1])
        self._check_classes(outputs[-1])
        terms = {
            name: self.criterion(name, layers, targets, normalisers, matches if name == "hints" else None)
            for name, layers in group_by_set(outputs).items()
        }
        return sum_terms(terms)

    def _check_outputs(self, outputs: Outputs) -> None:
        """Raise UserError when the model has another number of queries than the task, or no output for a loss term."""
        queries = outputs["logits"].shape[1]
        if queries != self.queries:
            raise UserError(
                f"task.queries={self.queries}, but the model has {queries} queries (model.queries); "
                "give both the same number."
            )
        if missing := [term.name for term in self.criterion.terms if term.reads not in outputs]:
            raise UserError(f"The loss has the terms {missing}, for which the model has no outputs ({list(outputs)}).")

    def _check_classes(self, outputs: Outputs) -> None:
        """Raise UserError for a wrong number of sigmoid logits, as from a model that has no argument `logits`."""
        logits = outputs["logits"].shape[-1]
        if self.classification == "sigmoid" and logits != len(self.categories):
            raise UserError(
                f"task.loss.classification=sigmoid needs a logit for each of the {len(self.categories)} classes, but "
                f"the model has {logits}; add the argument `logits`, which the task passes, to its constructor."
            )

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """For each image, the queries' boxes (Q, 4) xyxy in pixels of the original image, scores (Q,), labels (Q,)."""
        last = self._forward(model, batch)[-1]
        self._check_classes(last)
        scores, labels, boxes = detections(self.classification, last)
        scale = batch["original_sizes"].to(scores.device).flip(1).repeat(1, 2)[:, None]  # (B, 1, 4) as w h w h
        answers = zip((boxes * scale).cpu(), scores.cpu(), labels.cpu(), strict=True)
        return [{"boxes": box, "scores": score, "labels": label} for box, score, label in answers]

    def predict(self, model: nn.Module, input: Any) -> Any:
        """The objects of an image as a list of {box (xyxy in its pixels), name, score}, the highest score first.

        `input` is what `to_image` takes, or a list of such images, a folder or a pattern, which give a list of lists.
        In Jupyter, the lists show themselves as pictures. For a batch, it returns `answers`.
        """
        if isinstance(input, dict):
            return self.answers(model, input)
        return predict_each(input, partial(self._records, model))

    def _records(self, model: nn.Module, input: Any) -> Records:
        image = to_image(input, self._exif)
        (answer,) = self.answers(model, self.data.collate([self.data.view(image, Path("image"))]))
        boxes, labels, scores = self._selected(answer)
        objects = self._objects(boxes, labels, scores)
        picture = partial(draw, boxes=boxes, names=[o["name"] for o in objects], scores=scores, labels=labels)
        objects.sort(key=lambda record: -record["score"])
        return Records(objects, draw=partial(draw_on, input, self._exif, picture))

    @property
    def _exif(self) -> Exif:
        """Whether the user's images are turned by their EXIF tags."""
        exif: Exif = getattr(self.data, "exif", "auto")
        return exif

    def _forward(self, model: nn.Module, batch: Batch, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        device = next(model.parameters()).device
        sizes = batch["sizes"].to(device)
        images = normalise(batch["images"].to(device), sizes, compute_dtype(device))
        inputs = (images, sizes if batch["padded"] else None)
        return unstack_layers(model(*inputs) if hints is None else model(*inputs, hints))

    def read(self, input: str) -> Iterator[Batch]:
        """Read each image that `input` names as a batch of one image, resized as in evaluation.

        The batch also holds `names`, by which `show` names the answers, and `originals`, the image before resizing.
        Of several images, one that cannot be read is skipped, and the reason is added to `unanswered`.
        """
        return read_each(input, self._read_batch, self.unanswered)

    def _read_batch(self, file: InputFile) -> Batch:
        image = self._read_image(file)
        batch = self.data.collate([self.data.view(image, file.path)])
        return batch | {"names": [file.name], "originals": [image]}

    def _read_image(self, file: InputFile) -> Tensor:
        return read_image(file.path, exif=self._exif, content=file.content)

    def show(self, batch: Batch, answers: list[Answer], folder: Path) -> Iterator[str]:
        """Write each image with its boxes, and its objects {box (xyxy), name, score} as JSON; yield a line of text."""
        files = [InputFile(Path(path), Path(path).name) for path in batch["files"]]
        names = batch.get("names") or [file.name for file in files]  # a user's `read` may give neither
        originals = batch.get("originals") or map(self._read_image, files)
        for image, name, file, answer in zip(originals, names, files, answers, strict=True):
            objects = self._objects(*self._selected(answer))
            for item in objects:
                item |= {"box": [round(side, 2) for side in item["box"]], "score": round(item["score"], 4)}
            write_picture(self._draw(image, answer), answer_file(folder, name, ".boxes.jpg"))  # a name of its own
            write_answer(answer_file(folder, name, ".boxes.json"), file.path, {"objects": objects})
            counts = Counter(str(item["name"]) for item in objects)
            summary = ", ".join(f"{count} {printable(label)}" for label, count in counts.items()) or "nothing"
            yield f"{printable(name)}: {summary} (score >= {self.options.threshold:g})"

    def pictures(self, batch: Batch, answers: list[Answer], count: int) -> Tensor:
        """Draw the first `count` images with their boxes for the log: uint8 (B, 3, H, W)."""
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
        return draw(image, boxes, [self._name(label) for label in labels], scores, labels)

    def _objects(self, boxes: Tensor, labels: Tensor, scores: Tensor) -> list[dict[str, Any]]:
        """The records {box, name, score} of the n detections that `_selected` returns."""
        return [
            {"box": box, "name": self._name(label), "score": score}
            for box, label, score in zip(boxes.tolist(), labels, scores.tolist(), strict=True)
        ]

    def _selected(self, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
        """The detections with at least the minimum score, after suppression if it is on: boxes, labels, scores."""
        keep = (answer["scores"] >= self.options.threshold).nonzero()[:, 0]  # (n,)
        if self.options.nms is not None:
            boxes, scores, labels = (answer[key][keep] for key in ("boxes", "scores", "labels"))
            keep = keep[batched_nms(boxes.float(), scores.float(), labels, self.options.nms).sort().values]
        return answer["boxes"][keep], answer["labels"][keep], answer["scores"][keep]

    def _name(self, label: Tensor) -> str:
        return str(self.categories[int(label)]["name"])

    def metric(self, split: Split) -> CocoMetric:
        """An empty metric of COCO's numbers for `split`; its ground truth includes crowds and degenerate boxes.

        Raises UserError when the data's classes are not those of the model, or `evaluator` is not installed.
        """
        truth = self.data.ground_truth(split)
        names = {category["id"]: category["name"] for category in self.categories}
        used = {annotation["category_id"] for annotation in truth.get("annotations", [])}
        for category in truth["categories"]:
            id = category["id"]
            name = names.get(id)
            unnamed = name is not None and name.startswith("class ")  # an imported file has no class names
            same = name is not None and composed(name) == composed(category["name"])
            if id in used and not same and not unnamed:
                ids = [model_id for model_id, model_name in names.items() if model_name == category["name"]]
                there = f' and "{category["name"]}" under id {ids[0]}' if ids else ""
                raise UserError(
                    f'{split} has objects of category {id} "{category["name"]}", but the model has '
                    f"{'no class' if name is None else json.dumps(name)} with that id{there}; evaluate the model on "
                    "data of its own classes, or train on these data from checkpoint=FILE."
                )
        return CocoMetric(truth, self.categories, self.evaluator)

    def split_advice(self, split: Split) -> list[str]:
        """Warnings about the annotations of `split`, and about images with more objects than queries."""
        warnings = list(self.data.advice(split)) if hasattr(self.data, "advice") else []
        if hasattr(self.data, "query_advice"):
            warnings += self.data.query_advice(split, self.queries)
        return warnings

    def advice(self, pretrained: bool) -> list[str]:
        """Warnings about the annotations, and about too few images to train without pretrained weights.

        Generated pictures are never too few, since they are meant to be learnt without pretrained weights.
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
        """A warning if the model has collapsed: all queries of an image predict nearly the same box."""
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
