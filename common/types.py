"""Splits, and types with a range, so that a constructor's signature is its schema. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """The interval that a number must lie in, closed unless `above` is set; None leaves a side unbounded."""

    low: float | None = None
    high: float | None = None
    above: float | None = None  # an open lower end: value > above


Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Positive = Annotated[int, Range(low=1)]
Count = Annotated[int, Range(low=0)]
Fraction = Annotated[float, Range(low=0.0, high=1.0)]
PositiveFloat = Annotated[float, Range(above=0.0)]
NonNegativeFloat = Annotated[float, Range(low=0.0)]
