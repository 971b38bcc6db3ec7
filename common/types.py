"""Names of splits, and number types with a range.

A constructor's parameters are the keys of its config section, and these types state the values that the keys may have.
Nothing slow is imported here, because every program imports this file before it checks the config.
"""

from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """The interval in which a number must lie. A bound that is None does not apply."""

    low: float | None = None  # value >= low
    high: float | None = None  # value <= high
    above: float | None = None  # value > above

    def contains(self, value: float) -> bool:
        """Whether `value` lies in the interval. False for NaN if the interval has a bound."""
        low, high, above = self.low, self.high, self.above
        return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

MAX_COUNT = 2**31 - 1  # more than any number of files, steps, tokens or channels in use
MAX_INTEGER = 2**63 - 1  # the largest int64

Positive = Annotated[int, Range(low=1, high=MAX_COUNT)]
Count = Annotated[int, Range(low=0, high=MAX_COUNT)]
Seed = Annotated[int, Range(low=0, high=MAX_INTEGER)]
Layers = Annotated[int, Range(low=1, high=1000)]
Side = Annotated[int, Range(low=1, high=65_535)]  # of an image, in pixels; JPEG's limit
Fraction = Annotated[float, Range(low=0.0, high=1.0)]
Share = Annotated[float, Range(low=0.0, high=0.9)]  # the fraction of train's samples that becomes val or test
PositiveFloat = Annotated[float, Range(above=0.0)]
NonNegativeFloat = Annotated[float, Range(low=0.0)]
