"""The base class of detection tasks: classes, checkpoint state, COCO's metrics, and warnings on the data."""

import json
from abc import abstractmethod
from typing import Any, ClassVar, TypedDict

from common.data.names import composed
from common.errors import UserError
from common.task import Goal, Metric, Split
from common.types import SPLITS
from detr.data.protocol import DetectionData
from detr.evaluation.coco_evaluators import Evaluator
from detr.evaluation.coco_metric import CocoMetric
from detr.evaluation.coco_truth import check_masks
from detr.evaluation.combined_metric import CombinedMetric
from detr.evaluation.panoptic_metric import PanopticMetric
from detr.tasks.prediction import DetectionPrediction, PredictOptions

MIN_IMAGES_FROM_SCRATCH = 10_000  # the maintainers of official DETR recommend at least 10 to 15 thousand images


class NamedCategory(TypedDict):
    """A class: its category id in COCO's files, and its name."""

    id: int
    name: str


class Category(NamedCategory, total=False):
    """A class; in panoptic data, `isthing` is 1 for a thing and 0 for stuff."""

    isthing: int


class DetectionState(TypedDict, total=False):
    """The task's part of a checkpoint; empty if the class head was removed from the checkpoint, for fine-tuning."""

    categories: list[Category]


class DetectionTask(DetectionPrediction):
    """What all detection tasks share: the classes and their state, the metric, and warnings on the data.

    A subclass defines the loss, `answers`, `adopt` and `from_scratch`.

    After `restore`, prediction opens no file of the data set `data`. `evaluator` is the package that computes COCO's
    metrics; all packages give identical values.
    """

    masks = False  # True: the model predicts masks, too
    goal = Goal("AP", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ("classes",)
    state_schema = DetectionState

    def __init__(self, *, data: DetectionData, predict: PredictOptions, evaluator: Evaluator):
        self.data, self.options, self.evaluator = data, predict, evaluator
        self.unanswered: list[str] = []
        self._categories: list[dict[str, Any]] | None = None  # class index -> {"id", "name"}
        self._checked_masks: set[Split] = set()  # splits whose ground truth has a valid mask for each annotation

    @property
    def panoptic(self) -> bool:
        """Whether answers have `segments`, a panoptic segmentation of the image; False in this class."""
        return False

    @property
    def categories(self) -> list[dict[str, Any]]:
        """The classes in the order of class indices: the checkpoint's after `restore`, otherwise the data set's."""
        if self._categories is None:
            if not hasattr(self.data, "categories"):
                raise UserError(
                    f"data._target_={type(self.data).__name__} has no boxes with classes; give data=coco or "
                    "data=shapes, or a model of what the data have (model=lanes)."
                )
            self._categories = [_category(c) for c in self.data.categories()]
        return self._categories

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of classes."""
        return {"classes": len(self.categories)}

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

    def request_masks(self) -> None:
        """Ask the data for masks; raises UserError if they have none."""
        if not hasattr(self.data, "request_masks"):
            raise UserError(
                f"data._target_={type(self.data).__name__} has no masks, which task.masks=true needs; give data with "
                "masks (data=coco, coco_panoptic or shapes), or leave masks out (model.masks=false)."
            )
        self.data.request_masks()

    def metric(self, split: Split) -> Metric:
        """Create a metric for `split`: COCO's and, for a panoptic model and panoptic data, the panoptic quality."""
        coco = self._coco_metric(split)
        has_kinds = any("isthing" in category for category in self.data.categories())  # things and stuff
        if not self.panoptic or not has_kinds or not hasattr(self.data, "panoptic_truth"):
            return coco
        return CombinedMetric([coco, PanopticMetric(self.data.panoptic_truth(split))])

    def _coco_metric(self, split: Split) -> CocoMetric:
        """Create COCO's metric for `split`; its ground truth includes crowds and boxes without area.

        Raises UserError if the category id of an object is missing from the model's classes or has another name there,
        if a mask is missing or invalid, or if `evaluator` is not installed. Names are not compared if the model's are
        those of an imported file without names.
        """
        truth = self.data.ground_truth(split)
        names = {category["id"]: category["name"] for category in self.categories}
        unnamed = are_unnamed(self.categories)
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
        self._check_masks(split, truth)
        return CocoMetric(truth, self.categories, self.evaluator)

    def _check_masks(self, split: Split, truth: dict[str, Any]) -> None:
        """Raise UserError if the model predicts masks, and one that the metrics need is missing or invalid."""
        if self.masks and split not in self._checked_masks:
            check_masks(truth)
            self._checked_masks.add(split)

    def split_advice(self, split: Split) -> list[str]:
        """Return warnings about the annotations of `split`; raises UserError for a mask that cannot be evaluated.

        The masks of crowds are needed in val and test only. Those of panoptic data are checked when PNGs are read.
        """
        evaluated = split != "train" and self.data.count(split) > 0
        if self.masks and evaluated and not hasattr(self.data, "panoptic_truth"):
            self._check_masks(split, self.data.ground_truth(split))
        return list(self.data.advice(split)) if hasattr(self.data, "advice") else []

    @abstractmethod
    def from_scratch(self, minimum: int) -> str:
        """Return what happens with fewer than `minimum` images and no pretrained weights, and what to do instead."""

    def advice(self, pretrained: bool) -> list[str]:
        """Return warnings about the annotations, and about too few images to train without pretrained weights.

        For synthetic images (`data.drawn`), the number of images causes no warning, because they can be learnt without
        pretrained weights.
        """
        lines = [warning for split in SPLITS for warning in self.split_advice(split)]
        count = self.data.count("train")
        if pretrained or count >= MIN_IMAGES_FROM_SCRATCH or getattr(self.data, "drawn", False):
            return lines
        reason = f"the model starts without pretrained weights and there are only {count} training images"
        return [*lines, f"{reason}: {self.from_scratch(MIN_IMAGES_FROM_SCRATCH)}"]


def are_unnamed(categories: list[dict[str, Any]]) -> bool:
    """Whether the classes are those of an imported file without names: "class" and the id, or "class" and the index."""
    return all(c["name"] in (f"class {index}", f"class {c['id']}") for index, c in enumerate(categories))


def _category(category: dict[str, Any]) -> dict[str, Any]:
    """Keep of a category what a checkpoint stores."""
    stored = {"id": int(category["id"]), "name": str(category["name"])}
    return stored | ({"isthing": int(category["isthing"])} if "isthing" in category else {})
