"""Drawn pictures of figures that are nested or touch each other, so that a click may mean several objects."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.task import Split
from common.types import Positive, Range
from detr.data.shapes import (
    MIN_COLOUR_DISTANCE,
    NAMES,
    NOISE_STD,
    Shapes,
    corners_of,
    coverage_of,
    sample_background,
    sample_colour,
    sample_coverage,
    sample_ramp,
)

Mask = NDArray[np.bool_]

CLASSES = (*NAMES, "figure", "group")
FIGURE, GROUP = len(NAMES), len(NAMES) + 1  # labels of a shape with the shape in it, and of shapes that touch
OUTER = ("circle", "square")  # shapes that have another shape in them, or touch others
KINDS, SHARES = ("single", "nested", "group"), (0.5, 0.25, 0.25)  # of figures
GAP = 2  # pixels between figures, so that only the members of a group touch
MIN_MEMBER_FRACTION = 0.6  # of the pixels of a group's member; the other members hide the rest


class Drawing(NamedTuple):
    """A figure: the layers that are painted in order, and its objects."""

    layers: list[NDArray[np.float64]]  # the fraction of each pixel (S, S) that a layer covers
    masks: list[Mask]  # of the objects (S, S)
    labels: list[int]  # of the objects


class NestedShapes(Shapes):
    """Images of one to three figures on the backgrounds of `Shapes`, with the masks of their objects.

    A figure is one of three kinds. "single" is a shape of `Shapes`. "nested" is a circle or square with a smaller shape
    in it; its objects are the visible part of the outer shape, the inner shape, and the whole figure. "group" is two or
    three circles or squares that touch; its objects are the visible part of each member, and the whole group. A click
    on a nested figure or on a group therefore has two right answers. Figures do not touch each other.
    """

    style: ClassVar[str] = "-nested"  # append a number when a change of this file changes the pictures

    def __init__(
        self,
        *,
        root: str,
        image_size: Annotated[int, Range(low=32, high=4096)],
        train_count: Annotated[int, Range(low=1, high=10_000_000)],
        val_count: Annotated[int, Range(low=0, high=10_000_000)],
        test_count: Annotated[int, Range(low=1, high=10_000_000)],
        seed: int,
        flip: bool,
        batch_size: Positive,
        cache: bool,
    ):
        """Store the arguments, which are described in `Shapes`; the pictures are drawn at first use."""
        super().__init__(
            root=root,
            image_size=image_size,
            train_count=train_count,
            val_count=val_count,
            test_count=test_count,
            seed=seed,
            plain=False,
            flip=flip,
            batch_size=batch_size,
            cache=cache,
        )

    def draw_picture(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], list[Mask], list[int]]:
        """See `Shapes.draw_picture`; the masks of a picture overlap."""
        return draw(rng, self.image_size, self.plain)

    def _draw_split(self, split: Split, count: int, folder: Path) -> dict[str, Any]:
        categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(CLASSES, 1)]
        return {**super()._draw_split(split, count, folder), "categories": categories}


def draw(rng: np.random.Generator, size: int, plain: bool) -> tuple[NDArray[np.uint8], list[Mask], list[int]]:
    """Draw a picture; returns its pixels (size, size, 3), and the masks (size, size) and labels of its objects.

    With `plain`, the background and each shape have a single colour, and there is no noise.
    """
    from scipy import ndimage  # slow to import

    canvas = np.full((size, size, 3), rng.uniform(0, 255, 3)) if plain else sample_background(rng, size)
    taken = np.zeros((size, size), dtype=bool)  # pixels where no further figure may lie
    masks: list[Mask] = []
    labels: list[int] = []
    count, drawn = int(rng.integers(1, 4)), 0
    for _ in range(20 * count):  # attempts; a figure that lies on an earlier one is rejected
        figure = _sample_figure(rng, size)
        covered: Mask = np.any(figure.masks, axis=0)
        if (covered & taken).any():
            continue
        canvas = _paint(rng, canvas, figure.layers, plain)
        taken |= ndimage.binary_dilation(covered, iterations=GAP)
        masks += figure.masks
        labels += figure.labels
        drawn += 1
        if drawn == count:
            break
    if not plain:
        canvas = canvas + rng.normal(0, NOISE_STD, canvas.shape)
    return canvas.clip(0, 255).round().astype(np.uint8), masks, labels


def _paint(
    rng: np.random.Generator, canvas: NDArray[np.float64], layers: list[NDArray[np.float64]], plain: bool
) -> NDArray[np.float64]:
    """Paint the layers of a figure in colours that differ from each other and from what they cover."""
    colours: list[NDArray[np.float64]] = []
    for layer in layers:
        background = canvas[layer > 0.5].mean(axis=0)
        colour = sample_colour(rng, background)
        while any(np.linalg.norm(colour - earlier) < MIN_COLOUR_DISTANCE for earlier in colours):
            colour = sample_colour(rng, background)
        colours.append(colour)
        fill = colour if plain else colour + sample_ramp(rng, len(canvas), 25.0)
        canvas = canvas * (1 - layer[..., None]) + fill * layer[..., None]
    return canvas


def _sample_figure(rng: np.random.Generator, size: int) -> Drawing:
    kind = rng.choice(KINDS, p=SHARES)
    if kind == "single":
        label = int(rng.integers(len(NAMES)))
        layer = sample_coverage(rng, size, label)
        return Drawing([layer], [layer > 0.5], [label])
    return _sample_nested(rng, size) if kind == "nested" else _sample_group(rng, size)


def _sample_nested(rng: np.random.Generator, size: int) -> Drawing:
    """Sample a circle or square, a third to a half of the picture long, with another shape in it."""
    outer, inner = NAMES.index(str(rng.choice(OUTER))), int(rng.integers(len(NAMES)))
    radius, centre = _sample_place(rng, size, outer, rng.uniform(size / 3, size / 2))
    room = radius * _inradius(outer)  # radius of the largest circle in the outer shape
    inner_radius = room * rng.uniform(0.5, 0.75)
    angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.8 * (room - inner_radius))
    shift = distance * np.array([np.cos(angle), np.sin(angle)])
    layers = [
        coverage_of(corners_of(outer) * radius + centre, size),
        coverage_of(corners_of(inner) * inner_radius + centre + shift, size),
    ]
    whole, part = layers[0] > 0.5, layers[1] > 0.5
    return Drawing(layers, [whole & ~part, part, whole | part], [outer, inner, FIGURE])


def _sample_group(rng: np.random.Generator, size: int) -> Drawing:
    """Sample two or three circles or squares, an eighth to a quarter of the picture long, that touch."""
    while True:
        labels = [NAMES.index(str(name)) for name in rng.choice(OUTER, int(rng.integers(2, 4)))]
        radii = [rng.uniform(size / 8, size / 4) / np.ptp(corners_of(label), axis=0).max() for label in labels]
        centres = [np.zeros(2)]
        for i in range(1, len(labels)):
            angle = rng.uniform(0, 2 * np.pi)
            distance = 0.95 * sum(radii[j] * _inradius(labels[j]) for j in (i - 1, i))
            centres.append(centres[-1] + distance * np.array([np.cos(angle), np.sin(angle)]))
        outlines = [corners_of(label) * r + c for label, r, c in zip(labels, radii, centres, strict=True)]
        low = np.min([outline.min(axis=0) for outline in outlines], axis=0)
        high = np.max([outline.max(axis=0) for outline in outlines], axis=0)
        if (high - low > size).any():
            continue
        shift = rng.uniform(0, size - (high - low)) - low
        layers = [coverage_of(outline + shift, size) for outline in outlines]
        group = _group_of(layers, labels)
        if group is not None:
            return group


def _group_of(layers: list[NDArray[np.float64]], labels: list[int]) -> Drawing | None:
    """Return the group of these layers; None if it is in several pieces, or if a member is hidden too much."""
    from scipy import ndimage  # slow to import

    members = [layer > 0.5 for layer in layers]
    visible = [mask & ~np.any(members[i + 1 :], axis=0) for i, mask in enumerate(members)]
    union: Mask = np.any(members, axis=0)
    hidden = any(part.sum() < MIN_MEMBER_FRACTION * mask.sum() for part, mask in zip(visible, members, strict=True))
    if hidden or ndimage.label(union)[1] != 1:
        return None
    return Drawing(layers, [*visible, union], [*labels, GROUP])


def _sample_place(rng: np.random.Generator, size: int, label: int, length: float) -> tuple[float, NDArray[np.float64]]:
    """Sample a centre (2,) so that a shape whose longer side is `length` fits; returns the radius and the centre."""
    outline = corners_of(label)
    radius = length / np.ptp(outline, axis=0).max()
    low, high = outline.min(axis=0) * radius, outline.max(axis=0) * radius
    return radius, rng.uniform(-low, size - high)


def _inradius(label: int) -> float:
    """Return the radius of the largest circle in the shape NAMES[label] of radius 1, a circle or square."""
    return 1.0 if NAMES[label] == "circle" else float(np.sqrt(0.5))
