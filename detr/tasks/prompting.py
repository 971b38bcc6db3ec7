"""Prompts that a user gives for images: options of predict.py, and their check against an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from detr.criterion.clicks import BACKGROUND, BOTTOM_RIGHT, OBJECT, PADDING, TOP_LEFT


class ObjectPrompt(NamedTuple):
    """The prompt of one object, in pixels of the original image."""

    points: list[tuple[float, float]]  # x, y on the object
    background: list[tuple[float, float]]  # x, y beside the object
    box: list[float] | None  # x, y, x, y

    @property
    def is_single(self) -> bool:
        """Whether the prompt is a single point or box, which may mean several objects."""
        return len(self.points) + len(self.background) + (self.box is not None) == 1

    def record(self) -> dict[str, Any]:
        """Return the prompt in plain types, without what it lacks."""
        record = {"points": self.points, "background": self.background, "box": self.box}
        return {key: value for key, value in record.items() if value}


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """The prompts for the images of predict.py, in pixels; x counts from the left and y from the top.

    points: x, y of each point on the object, one after the other.
    background: x, y of each point beside the object.
    boxes: x, y, x, y (left, top, right, bottom) of each box. With points, at most one box, which is around the same
        object; otherwise each box is around an object of its own.

    Raises UserError for a list of another length, for a box without an area, and for points with several boxes.
    """

    points: list[float]
    background: list[float]
    boxes: list[float]

    def __post_init__(self) -> None:
        for key, size, what in (("points", 2, "x,y"), ("background", 2, "x,y"), ("boxes", 4, "x,y,x,y")):
            values = getattr(self, key)
            if len(values) % size:
                raise UserError(f"{key}={_listed(values)}: {len(values)} numbers; expected {what} for each of them.")
        for left, top, right, bottom in _groups(self.boxes, 4):
            if right <= left or bottom <= top:
                raise UserError(
                    f"boxes={_listed([left, top, right, bottom])} has no area; give left, top, right and bottom."
                )
        if len(self.boxes) > 4 and (self.points or self.background):
            raise UserError(
                f"{len(self.boxes) // 4} boxes stand for as many objects, and points= and background= for one; give "
                "one box with the points, or boxes alone."
            )
        if self.background and not self.points and not self.boxes:
            raise UserError(
                f"background={_listed(self.background)} says only where the object is not; add points= or boxes=."
            )

    def objects(self) -> list[ObjectPrompt]:
        """Return the prompt of each object; raises UserError if there is no prompt."""
        if not self.points and not self.boxes:
            raise UserError(
                "This model predicts the mask of an object that a prompt points to: give points=x,y or boxes=x,y,x,y, "
                "in pixels."
            )
        points, background = ([(x, y) for x, y in _groups(v, 2)] for v in (self.points, self.background))
        boxes: list[list[float] | None] = [*_groups(self.boxes, 4)]
        return [ObjectPrompt(points, background, box) for box in boxes or [None]]

    def check(self, height: int, width: int, name: str) -> None:
        """Raise UserError if a prompt is outside the image `name` of this height and width."""
        for key, size in (("points", 2), ("background", 2), ("boxes", 4)):
            for values in _groups(getattr(self, key), size):
                if not all(0 <= x <= width for x in values[0::2]) or not all(0 <= y <= height for y in values[1::2]):
                    raise UserError(
                        f"{key}={_listed(values)} is outside of {name}, which has {width} x {height} pixels; give x "
                        f"from 0 to {width} and y from 0 to {height}."
                    )


def as_tensors(objects: Sequence[ObjectPrompt], scale: Tensor) -> dict[str, Tensor]:
    """Convert the prompts of one image to the tensors that the model reads, on the device of `scale`.

    `scale` (2,) is the factor from original to resized pixels, of x and of y.
    """
    rows: list[list[tuple[float, float, int]]] = []
    for item in objects:
        row = [(x, y, OBJECT) for x, y in item.points] + [(x, y, BACKGROUND) for x, y in item.background]
        if item.box is not None:
            left, top, right, bottom = item.box
            row += [(left, top, TOP_LEFT), (right, bottom, BOTTOM_RIGHT)]
        rows.append(row)
    longest = max(map(len, rows))
    padded = torch.tensor([row + [(0.0, 0.0, PADDING)] * (longest - len(row)) for row in rows], device=scale.device)
    return {
        "image": torch.zeros(len(rows), dtype=torch.int64, device=scale.device),
        "points": padded[..., :2] * scale,
        "labels": padded[..., 2].long(),
    }


def _groups(values: Sequence[float], size: int) -> list[list[float]]:
    return [list(values[i : i + size]) for i in range(0, len(values), size)]


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
