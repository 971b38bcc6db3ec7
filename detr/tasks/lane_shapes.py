"""The task of LSTR: lanes as curves (Liu et al. 2021, arXiv 2011.04233), and TuSimple's metrics."""

import time
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from common.data.images import normalise
from common.errors import UserError
from common.machine.device import compute_dtype
from common.task import Adopted, Answer, Batch, Goal, Split
from common.types import SPLITS, Positive
from detr.criterion.answers import Outputs, Targets, unstack_layers
from detr.criterion.curves import LOWER, UPPER, LaneCriterion, LaneLossOptions, evaluate, lane_targets
from detr.criterion.set_loss import sum_terms
from detr.data.protocol import LaneData
from detr.evaluation.lane_metric import MIN_SCORE, MISSING, LaneMetric
from detr.evaluation.straight_lanes import StraightLane, mean_road
from detr.tasks.lane_prediction import LanePrediction
from detr.tasks.lane_prediction import LanePredictOptions as LanePredictOptions


class LaneState(TypedDict, total=False):
    """The task's part of a checkpoint: the mean road of train, whose lanes have intercept, slope, top and bottom."""

    mean_road: list[list[float]]


class LaneShapes(LanePrediction):
    """The task of finding the lanes of a road, each as a curve.

    A model returns, for each layer, logits (B, Q, 2) of "lane" and "no lane", and curves (B, Q, 8); see
    detr/models/lstr.py. The loss does not depend on how a step is split into micro-batches.
    """

    goal = Goal("accuracy", higher_is_better=True)
    handed_on: ClassVar[tuple[str, ...]] = ()
    state_schema = LaneState

    def __init__(self, *, data: LaneData, queries: Positive, loss: LaneLossOptions, predict: LanePredictOptions):
        if not hasattr(data, "tolerance"):
            raise UserError(
                f"data._target_={type(data).__name__} has no lanes, which model=lstr and model=lanes need; give "
                "data=tusimple or data=lanes, or another model."
            )
        self.data, self.queries, self.options = data, queries, predict
        self.criterion = LaneCriterion(loss)
        self.unanswered: list[str] = []
        self._road: list[StraightLane] | None = None

    @property
    def road(self) -> list[StraightLane]:
        """The mean road of train: the checkpoint's after `restore`, otherwise the data set's."""
        if self._road is None:
            self._road = mean_road(self.data.ground_truth("train"))
        return self._road

    def model_arguments(self) -> dict[str, Any]:
        """Return no arguments."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return the mean road of train."""
        return {"mean_road": [list(lane) for lane in self.road]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the mean road from a checkpoint; it is unknown if the checkpoint has none."""
        self._road = [StraightLane(*lane) for lane in state.get("mean_road", [])]

    def adopt(self, tensors: dict[str, Any], folder: Path | None = None) -> Adopted:
        """Raise UserError, because files of other programs are not supported."""
        raise UserError("it is no checkpoint of this program, and lanes have no other format; give a run's checkpoint.")

    def normalisers(self, batch: Batch) -> dict[str, float]:
        """Return what a batch adds to the divisor of each loss term: its queries or its lanes."""
        counts = batch["counts"]
        return self.criterion.normalisers("queries", counts, [self.queries] * len(counts))

    def targets(self, batch: Batch) -> Targets:
        """Return the batch's lanes, relative to the width and height of their images."""
        sizes = batch["sizes"].repeat_interleave(
            torch.tensor(batch["counts"], device=batch["sizes"].device), 0, output_size=len(batch["points"])
        )  # (T, 2) heights and widths
        points = batch["points"] / sizes.flip(1)[:, None]
        return lane_targets(points, batch["valid"], batch["counts"])

    def loss(self, model: nn.Module, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss over all layers, and the parts of the last layer for the log.

        Raises UserError when the model returns no curves, or when it has another number of queries than the task.
        """
        outputs = self._forward(model, batch)
        if (queries := outputs[-1]["logits"].shape[1]) != self.queries:
            raise UserError(
                f"task.queries={self.queries}, but the model has {queries} queries (model.queries); "
                "give both the same number."
            )
        return sum_terms({"queries": self.criterion("queries", outputs, self.targets(batch), normalisers)})

    def _forward(self, model: nn.Module, batch: Batch) -> list[Outputs]:
        device = next(model.parameters()).device
        sizes = batch["sizes"].to(device)
        images = normalise(batch["images"].to(device), sizes, compute_dtype(device))
        outputs = unstack_layers(model(images, sizes if batch["padded"] else None))
        if "curves" not in outputs[-1]:
            raise UserError(
                f"model._target_={type(model).__name__} returns no curves ({', '.join(outputs[-1])}); the task "
                "LaneShapes needs a model of lanes (model=lstr or model=lanes)."
            )
        return outputs

    @torch.no_grad()
    def answers(self, model: nn.Module, batch: Batch) -> list[Answer]:
        """Return a dict for each image, with an entry for each of Q queries.

        curves: (Q, 8) parameters relative to the image.
        scores: (Q,) probabilities of a lane.
        rows: (P,) the rows of the image in `batch`, in pixels of the original image.
        lanes: (Q, P) x at these rows in pixels of the original image; -2 beyond a lane's ends and outside of the image.
        run_time: milliseconds of computation, divided by the number of images of the batch.

        Differs: in the official code, x is not limited to the image, and a row must lie between the ends. The ends of
        labels are rows, so with an end that is off by the least amount, the last row would be lost.
        """
        start = time.perf_counter()
        last = self._forward(model, batch)[-1]
        scores = last["logits"].float().softmax(-1)[..., 0].cpu()  # (B, Q)
        curves = last["curves"].cpu().double()
        sizes = batch["original_sizes"].tolist()
        lanes = [_lanes(c, rows, *size) for c, rows, size in zip(curves, batch["rows"], sizes, strict=True)]
        run_time = 1000 * (time.perf_counter() - start) / max(1, len(lanes))
        return [
            {"curves": c, "scores": s, "rows": rows, "lanes": x, "run_time": run_time}
            for c, s, rows, x in zip(curves, scores, batch["rows"], lanes, strict=True)
        ]

    def metric(self, split: Split) -> LaneMetric:
        """Create a metric for `split`, with the mean road of train as a baseline."""
        return LaneMetric(self.data.ground_truth(split), self.data.tolerance, self.road)

    def split_advice(self, split: Split) -> list[str]:
        """Return a warning about images of `split` with more lanes than queries."""
        return list(self.data.query_advice(split, self.queries)) if hasattr(self.data, "query_advice") else []

    def advice(self, pretrained: bool) -> list[str]:
        """Return the warnings of all splits."""
        return [warning for split in SPLITS for warning in self.split_advice(split)]

    def alarms(self, answers: list[Answer]) -> list[str]:
        """Return a warning if no image has a lane that is more probable than none."""
        if not answers or any(bool((answer["scores"] > MIN_SCORE).any()) for answer in answers):
            return []
        return ["the model finds no lane in the first validation images: train longer, or lower optimizer.lr."]


def _lanes(curves: Tensor, rows: Tensor, height: int, width: int) -> Tensor:
    """Compute x (Q, P) of curves (Q, 8) at `rows` (P,), in pixels; MISSING beyond the ends and outside of the image.

    A lane's ends are those of its annotation, which lie in rows. So a predicted end means the row nearest to it.
    """
    y = rows.to(curves) / height
    half = (y[-1] - y[0]) / (2 * max(1, len(y) - 1))  # of the distance of two rows
    x = evaluate(curves, y) * width
    between_ends = (y >= curves[:, UPPER, None] - half) & (y <= curves[:, LOWER, None] + half)
    inside = between_ends & (x >= 0) & (x <= width)
    return x.masked_fill(~inside & ~x.isnan(), MISSING)
