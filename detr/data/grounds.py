"""Grounds of drawn pictures: regions of stuff, each with the pattern of its class, which fill the whole picture."""

import numpy as np
from numpy.typing import NDArray

NAMES = ("specks", "stripes", "checks")  # the classes of stuff
MEAN_LEVEL = 90.0  # of a ground, as of the background of pictures without stuff
CONTRAST = (35.0, 60.0)  # range of the distance between a pattern's levels and its mean, in levels (0 to 255)
PERIOD = (5.0, 9.0)  # range of the width of two stripes or two squares, in pixels of a picture of 64
MIN_SHARE = 0.2  # of the picture, for each of two grounds


def draw_grounds(
    rng: np.random.Generator, size: int, specks: NDArray[np.float64]
) -> tuple[NDArray[np.float64], list[NDArray[np.bool_]], list[int]]:
    """Draw one or two grounds of different classes; returns the canvas (size, size, 3), their masks and their labels.

    Two grounds meet in a straight line. A label is an index in NAMES. `specks` (size, size, 3) is the pattern of the
    class "specks".
    """
    labels = rng.permutation(len(NAMES))[: rng.integers(1, 3)].tolist()
    first = np.ones((size, size), dtype=bool) if len(labels) == 1 else _sample_side(rng, size)
    masks = [first, ~first][: len(labels)]
    canvas = np.zeros((size, size, 3))
    for mask, label in zip(masks, labels, strict=True):
        pattern = specks if NAMES[label] == "specks" else _sample_pattern(rng, size, NAMES[label])
        canvas[mask] = pattern[mask]
    return canvas, masks, labels


def _sample_side(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """Sample a straight line; returns the mask (size, size) of one side, a share of MIN_SHARE to 1 - MIN_SHARE."""
    y, x = np.mgrid[:size, :size]
    angle = rng.uniform(0, 2 * np.pi)
    distance = x * np.cos(angle) + y * np.sin(angle)
    side: NDArray[np.bool_] = distance < np.quantile(distance, rng.uniform(MIN_SHARE, 1 - MIN_SHARE))
    return side


def _sample_pattern(rng: np.random.Generator, size: int, name: str) -> NDArray[np.float64]:
    """Sample stripes or checks (size, size, 3) of two colours, with a random direction, period and phase."""
    y, x = np.mgrid[:size, :size] * (64 / size)
    angle, period = rng.uniform(0, np.pi), rng.uniform(*PERIOD)
    phases = rng.uniform(0, 2 * np.pi, 2)
    along = np.sin(2 * np.pi / period * (x * np.cos(angle) + y * np.sin(angle)) + phases[0])
    across = np.sin(2 * np.pi / period * (y * np.cos(angle) - x * np.sin(angle)) + phases[1])
    sign = np.sign(along if name == "stripes" else along * across)[..., None]
    contrast = rng.uniform(*CONTRAST) * rng.choice([-1, 1], 3)  # (3,) of the channels
    mean = MEAN_LEVEL + rng.uniform(-25, 25, 3)
    pattern: NDArray[np.float64] = mean + sign * contrast
    return pattern
