"""TuSimple's metrics of lanes on one split, beside those of two straight baselines; and TuSimple's submission file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import UserError
from common.machine.distributed import gather_samples, is_main
from common.task import Answer, Batch
from detr.data.lane_labels import MISSING as MISSING
from detr.data.lane_labels import LaneLabels
from detr.evaluation.lane_scores import Lane, Scores, score
from detr.evaluation.straight_lanes import StraightLane, fit

MIN_SCORE = 0.5  # a query predicts a lane if a lane is more probable than none, as in the official code


class Predicted(NamedTuple):
    """The predicted lanes of one image."""

    lanes: list[Lane]
    run_time: float  # milliseconds


class LaneMetric:
    """Accuracy, and the shares of false positives and false negatives, of one split.

    Each image must be evaluated exactly once, on any rank; after a call of `restrict`, fewer images are evaluated. The
    ids of samples are indices in `labels`. The official limit of the run time is not applied, because the numbers would
    depend on the machine.
    """

    def __init__(self, labels: Sequence[LaneLabels], tolerance: float, road: Sequence[StraightLane]):
        """Store the arguments.

        Args:
            labels: the lanes of the split's images.
            tolerance: horizontal distance in pixels up to which a point is right; see `lane_scores.score`.
            road: the mean road of train, a baseline; an empty list = unknown.
        """
        self.labels, self.tolerance, self.road = labels, tolerance, road
        self.predicted: list[tuple[int, Predicted]] = []
        self.scores: list[tuple[int, Scores]] = []  # number of lanes of each image, and its scores
        self.count: int | None = None
        self.gathered = False

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the answers to a batch: lanes (Q, P) at the image's rows, scores (Q,), run_time in milliseconds.

        Raises UserError if a lane or a score is not finite.
        """
        for index, answer in zip(batch["ids"], answers, strict=True):
            lanes, scores = answer["lanes"].double().numpy(), answer["scores"].double().numpy()
            if not (np.isfinite(lanes).all() and np.isfinite(scores).all()):
                raise UserError(
                    f"image {self.labels[index].raw_file}: the model's lanes or scores are not finite; its weights are "
                    "not finite, or the precision is too low (try trainer.precision=fp32)."
                )
            self.predicted.append((index, Predicted(list(lanes[scores > MIN_SCORE]), answer["run_time"])))

    def restrict(self, count: int) -> None:
        """Expect only `count` images of the split."""
        self.count = count

    def gather(self) -> None:
        """Gather the ranks' predictions on all ranks, in the order of the labels."""
        self.predicted = gather_samples(self.predicted, len(self.labels) if self.count is None else self.count)
        self.gathered = True

    def compute(self) -> dict[str, float]:
        """Return accuracy, FP and FN, and the accuracies of the baselines; empty if the split has no labels.

        straight_accuracy is that of straight lines fitted to the same images' own lanes. mean_road_accuracy is that of
        the same straight lines, those of the mean road of train, in every image; it is missing if they are unknown.
        """
        assert self.gathered, "gather() comes before compute()"
        images = [(self.labels[index], predicted.lanes) for index, predicted in self.predicted]
        if any(image.lanes is None for image, _ in images):
            return {}
        self.scores = [(_count(image), self._score(lanes, image)) for image, lanes in images]
        numbers = dict(zip(("accuracy", "FP", "FN"), _means([row for _, row in self.scores]), strict=True))
        straight = [self._score([fit(lane, i.rows).at(i.rows) for lane in i.with_points()], i) for i, _ in images]
        numbers["straight_accuracy"] = _means(straight)[0]
        if self.road:
            road = [self._score([line.at(image.rows) for line in self.road], image) for image, _ in images]
            numbers["mean_road_accuracy"] = _means(road)[0]
        return numbers

    def _score(self, predicted: Sequence[Lane], image: LaneLabels) -> Scores:
        return score(predicted, _lanes(image), image.rows, self.tolerance)

    def details(self) -> list[tuple[Any, ...]]:
        """Return a table of the metrics of images by their number of lanes; only a header before `compute`."""
        counts = sorted({count for count, _ in self.scores})
        groups = [(count, [row for number, row in self.scores if number == count]) for count in counts]
        return [("lanes", "images", "accuracy", "FP", "FN")] + [
            (count, len(rows), *(round(value, 4) for value in _means(rows))) for count, rows in groups
        ]

    def write(self, folder: Path) -> None:
        """Write lanes.json, a submission to TuSimple's benchmark: a line of JSON for each image, on rank 0."""
        assert self.gathered, "gather() comes before write()"
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(submission(self.labels[index], predicted)) for index, predicted in self.predicted]
        (folder / "lanes.json").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def submission(image: LaneLabels, predicted: Predicted) -> dict[str, Any]:
    """Return an image's line of a submission: lanes at the rows of its label, and the run time in milliseconds.

    Values are not rounded, so the file has the same scores as `compute` returns.
    """
    lanes = [[x if x >= 0 else int(MISSING) for x in lane.tolist()] for lane in predicted.lanes]
    return {"raw_file": image.raw_file, "lanes": lanes, "run_time": round(predicted.run_time, 2)}


def _lanes(image: LaneLabels) -> list[Lane]:
    assert image.lanes is not None
    return list(image.lanes)


def _count(image: LaneLabels) -> int:
    return len(_lanes(image))


def _means(scores: Sequence[Scores]) -> tuple[float, float, float]:
    """Return the mean accuracy, false positives and false negatives of images."""
    accuracy, positives, negatives = np.array(scores, dtype=np.float64).reshape(-1, 3).mean(0).tolist()
    return accuracy, positives, negatives
