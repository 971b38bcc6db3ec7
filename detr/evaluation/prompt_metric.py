"""The metrics of a promptable model: mean IoU after each click, and how well its predicted IoU is calibrated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.machine.distributed import gather_samples, is_main
from common.task import Answer, Batch

BINS = 10  # of the predicted IoU, in the table of its calibration


class PromptMetric:
    """The metrics of one split, averaged over all its objects. Each image must be evaluated exactly once, on any rank.

    `mIoU_n` is the mean IoU after n clicks, of the mask with the highest predicted IoU. `oracle_1` is that of the best
    of the masks for the first click. `iou_error_n` is the mean absolute difference between the predicted and the actual
    IoU after n clicks.
    """

    def __init__(self, images: int, clicks: int):
        """Create the metric.

        Args:
            images: the number of images of the split.
            clicks: the number of clicks on each object.
        """
        self.count, self.clicks = images, clicks
        self.rows: list[tuple[int, NDArray[np.float64]]] = []  # image id, and (n, 2 clicks + 1) values of its objects

    def update(self, batch: Batch, answers: list[Answer]) -> None:
        """Add the answers of a batch, which `detr.evaluation.interaction.interact` describes."""
        for image, answer in zip(batch["ids"], answers, strict=True):
            columns = [answer["ious"], answer["predicted"], answer["oracle"][:, None]]
            values = np.concatenate([np.asarray(column, dtype=np.float64) for column in columns], axis=1)
            self.rows.append((image, values.reshape(-1, 2 * self.clicks + 1)))

    def restrict(self, count: int) -> None:
        """Expect only `count` images of the split."""
        self.count = count

    def gather(self) -> None:
        """Gather the values of all ranks on every rank."""
        self.rows = gather_samples(self.rows, self.count)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; {} if no image has an object."""
        ious, predicted, oracle = self._columns()
        if not len(ious):
            return {}
        means, errors = ious.mean(0), np.abs(predicted - ious).mean(0)
        numbers = {f"mIoU_{n}": float(mean) for n, mean in enumerate(means, 1)}
        return {
            **numbers,
            "oracle_1": float(oracle.mean()),
            **{f"iou_error_{n}": float(error) for n, error in enumerate(errors, 1)},
        }

    def details(self) -> list[tuple[Any, ...]]:
        """Return the calibration: for masks whose predicted IoU is in a range, their number and the mean IoUs.

        The masks are those after each click. Predictions below 0 or above 1 are in the first or the last range.
        """
        ious, predicted = (columns.flatten() for columns in self._columns()[:2])
        bins = (predicted * BINS).astype(int).clip(0, BINS - 1)
        rows: list[tuple[Any, ...]] = [("predicted_from", "predicted_to", "masks", "mean_predicted", "mean_actual")]
        for number in range(BINS):
            inside = bins == number
            if inside.any():
                limits = (number / BINS, (number + 1) / BINS)
                rows.append((*limits, int(inside.sum()), float(predicted[inside].mean()), float(ious[inside].mean())))
        return rows

    def write(self, folder: Path) -> None:
        """Write the values of each image's objects to `prompts.json`, on rank 0."""
        if not is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        names = [*(f"iou_{n + 1}" for n in range(self.clicks)), *(f"predicted_{n + 1}" for n in range(self.clicks))]
        images = [
            {"image_id": image, "objects": [dict(zip([*names, "oracle_1"], row, strict=True)) for row in rows.tolist()]}
            for image, rows in self.rows
        ]
        (folder / "prompts.json").write_text(json.dumps(images), encoding="utf-8")

    def _columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Return the actual and the predicted IoU (T, clicks), and the oracle's IoU (T,), of all objects."""
        values = np.concatenate([np.zeros((0, 2 * self.clicks + 1)), *(rows for _, rows in self.rows)])
        return values[:, : self.clicks], values[:, self.clicks : -1], values[:, -1]
