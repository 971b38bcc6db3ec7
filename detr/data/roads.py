"""Draw pictures of roads with lanes, whose curves are those of a road seen by a camera above it.

A lane is x(y) = k / (y - f)^2 + m / (y - f) + n + b (y - f), relative to the width and height of the picture, as in Liu
et al. 2021 (arXiv 2011.04233, section 3.1). f is the horizon of a flat road, m its curvature, and k the change of the
curvature. n is where a straight road would reach the horizon, and b a lane's distance from the camera's path.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SUBPIXELS = 3  # along each side of a pixel, for antialiasing
NOISE_STD = 14.0  # of the noise of each pixel and channel, in levels (0 to 255)
ROWS = np.arange(8, 32) / 32  # relative y of the annotated rows; at 64 pixels, every second one
MIN_ROWS = 6  # annotated rows in which a lane must be inside of the picture
MARGIN = 0.05  # between the upper end of a lane and the sides of the picture
MIN_GAP = 0.06  # between two lanes at their upper ends

Floats = NDArray[np.float64]


class Road(NamedTuple):
    """The lanes of a picture, in relative coordinates."""

    shared: tuple[float, float, float, float]  # k, f, m, n
    slopes: Floats  # (n,) b of each lane, from left to right
    top: float  # y of the upper ends

    def x(self, y: Floats) -> Floats:
        """Compute x of each lane at the heights y (P,): (n, P)."""
        k, f, m, n = self.shared
        distance = y - f
        curves: Floats = k / distance**2 + m / distance + n + self.slopes[:, None] * distance
        return curves


def draw(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Draw a road; returns its pixels (size, size, 3), the annotated rows (P,) and x of each lane (n, P) in pixels.

    Positions are continuous: the pixel i covers the interval from i to i + 1. x is -2 where a lane has no point.
    """
    road = _sample_road(rng)
    x = road.x(ROWS)
    inside = (road.top <= ROWS) & (x >= 0) & (x < 1)
    return _paint(rng, road, size), ROWS * size, np.where(inside, (x * size).round(3), -2.0)


def _sample_road(rng: np.random.Generator) -> Road:
    """Sample a road with two to five lanes."""
    while True:
        f = rng.uniform(0.1, 0.25)
        top = f + rng.uniform(0.12, 0.2)
        # At 64 pixels, straight lines that are fitted to these lanes are right within 2 pixels in 0.89 of the rows.
        m, k = rng.uniform(0.05, 0.12) * rng.choice([-1, 1]), rng.uniform(-0.006, 0.006)
        n = rng.uniform(0.35, 0.65) - 2 * m  # keeps the curved road in the picture
        count, spacing = int(rng.integers(2, 6)), rng.uniform(0.5, 0.9)
        middle = rng.uniform(0.3, 0.7) * (count - 1)  # the camera's position between the lanes
        slopes: Floats = spacing * (np.arange(count, dtype=np.float64) - middle)
        road = Road((k, f, m, n), slopes, top)
        ends = road.x(np.array([top]))[:, 0]
        x = road.x(ROWS)
        visible = ((top <= ROWS) & (x >= 0) & (x < 1)).sum(1)
        road = road._replace(slopes=slopes[visible >= MIN_ROWS])
        ends = ends[visible >= MIN_ROWS]
        if len(ends) >= 2 and ends.min() > MARGIN and ends.max() < 1 - MARGIN and np.diff(ends).min() > MIN_GAP:
            return road


def _paint(rng: np.random.Generator, road: Road, size: int) -> NDArray[np.uint8]:
    """Paint the sky, the ground, the road, its lanes and up to two cars that hide parts of them."""
    side = size * SUBPIXELS
    y, x = (np.arange(side) + 0.5) / side, (np.arange(side) + 0.5) / side
    ground, asphalt = rng.uniform(60, 150, 3), rng.uniform(50, 110) + rng.uniform(-10, 10, 3)
    canvas = np.broadcast_to(ground, (side, side, 3)).copy()
    horizon = road.shared[1] + 0.04
    curves = road.x(np.maximum(y, horizon))  # (n, side)
    depth = np.maximum(y - road.shared[1], 0.04)  # grows towards the camera
    left, right = curves[0] - 0.25 * depth, curves[-1] + 0.25 * depth
    canvas[(x > left[:, None]) & (x < right[:, None])] = asphalt
    for curve in curves:
        canvas[_stroke(rng, curve, depth, x) & (y >= road.top)[:, None]] = _paint_colour(rng)
    for _ in range(int(rng.integers(0, 3))):
        _paint_car(rng, canvas, road)
    canvas[y < horizon] = rng.uniform(120, 230, 3)
    canvas *= 1 + rng.uniform(-0.25, 0.25) * (y[:, None, None] - 0.5) + rng.uniform(-0.2, 0.2)  # light and shadow
    picture = canvas.reshape(size, SUBPIXELS, size, SUBPIXELS, 3).mean(axis=(1, 3))
    picture = picture + rng.normal(0, NOISE_STD, picture.shape)
    pixels: NDArray[np.uint8] = picture.clip(0, 255).round().astype(np.uint8)
    return pixels


def _stroke(rng: np.random.Generator, curve: Floats, depth: Floats, x: Floats) -> NDArray[np.bool_]:
    """Return the mask (side, side) of a painted lane, solid or dashed; it is wider near the camera."""
    half = 0.006 + rng.uniform(0.015, 0.03) * depth  # (side,)
    mask: NDArray[np.bool_] = np.abs(x - curve[:, None]) < half[:, None]
    if rng.random() < 0.5:
        period, phase = rng.uniform(0.8, 1.6), rng.random()  # in units of the distance along the road, 1 / depth
        dashes: NDArray[np.bool_] = (1 / depth / period + phase) % 1 < rng.uniform(0.55, 0.75)
        mask &= dashes[:, None]
    return mask


def _paint_colour(rng: np.random.Generator) -> Floats:
    """Sample white or yellow, more or less worn."""
    colour = np.array([225.0, 225.0, 225.0]) if rng.random() < 0.7 else np.array([220.0, 190.0, 70.0])
    worn: Floats = colour * rng.uniform(0.75, 1.1)
    return worn


def _paint_car(rng: np.random.Generator, canvas: Floats, road: Road) -> None:
    """Paint a box of one colour on the road, whose sides grow towards the camera."""
    side = len(canvas)
    bottom = rng.uniform(road.top + 0.1, 0.95)
    depth = bottom - road.shared[1]
    lane = road.x(np.array([bottom]))[int(rng.integers(len(road.slopes))), 0]
    width, height = rng.uniform(0.15, 0.3) * depth + 0.03, rng.uniform(0.12, 0.25) * depth + 0.03
    left = lane + rng.uniform(-1.2, 0.2) * width
    rows = slice(max(0, int((bottom - height) * side)), max(0, int(bottom * side)))
    columns = slice(max(0, int(left * side)), max(0, int((left + width) * side)))
    canvas[rows, columns] = rng.uniform(20, 200, 3)
