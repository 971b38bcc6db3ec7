"""Compare translators by the length of the source: tables, and a picture as SVG."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UserError
from common.files.records import read_record

SCORES = ("bleu", "exact_match")
FIELDS = ("sentences", *SCORES)
REMEDY = "delete it, and the run is left out"
WIDTH, HEIGHT = 520, 260  # of a plot, in pixels
LEFT, TOP, GAP = 60, 44, 70  # pixels left of and above the plot, and between two plots
LINE = 20  # height of a line of the legend
COLOURS = ("#1e5fa5", "#d9480f", "#2b8a3e", "#862e9c", "#c92a2a", "#0b7285", "#5c940d", "#495057")
TITLES = {"bleu": "BLEU", "exact_match": "exact match, %"}


class Curve(NamedTuple):
    """A run's scores on test by the length of the source."""

    run: str  # the folder
    label: str  # the model's class, or the run's folder if several runs have the same
    unit: str  # words or characters
    groups: dict[str, dict[str, float]]  # lengths such as 3-4 -> sentences, bleu and exact_match


def read_curves(folders: Sequence[Path], classes: Sequence[str]) -> list[Curve]:
    """Read the scores by source length of runs, in this order; runs that have none are left out.

    `classes` are the names of the models' classes. Raises UserError if no run has such scores, a file is damaged, or
    lengths are counted in different units.
    """
    curves = []
    for folder, name in zip(folders, classes, strict=True):
        label = name if classes.count(name) == 1 else str(folder)
        file = folder / "predictions" / "scores.json"
        content = read_record(file, REMEDY) if file.is_file() else {}
        if part := content.get("by_source_length"):
            try:
                groups = {group["lengths"]: {name: float(group[name]) for name in FIELDS} for group in part["groups"]}
                curves.append(Curve(str(folder), label, part["unit"], groups))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{file} is damaged (scores by source length: {error!r}); {REMEDY}.") from error
    if not curves:
        raise UserError(
            f"--by-length: none of {len(folders)} runs has predictions/scores.json with scores by source length; "
            "finish the run of a translator with this version."
        )
    first_run_of: dict[str, str] = {}
    for curve in curves:
        first_run_of.setdefault(curve.unit, curve.run)
    if len(first_run_of) > 1:
        found = " and ".join(f"{unit} in {run}" for unit, run in first_run_of.items())
        raise UserError(f"--by-length: the length of a source is counted in {found}; compare runs of one language.")
    return curves


def length_table(curves: Sequence[Curve], score: str) -> list[list[Any]]:
    """Make the rows of a table of `score`: a line for each run, and a column for each group of lengths.

    The first row is the header, the second the number of sentences in each group of the first run that has it.
    """
    names = _group_names(curves)
    sentences = [next(int(c.groups[name]["sentences"]) for c in curves if name in c.groups) for name in names]
    rows = [[c.run, *(c.groups[name][score] if name in c.groups else math.nan for name in names)] for c in curves]
    return [["run", *names], ["sentences", *sentences], *rows]


def length_picture(curves: Sequence[Curve]) -> str:
    """Draw BLEU and exact match over the length of the source, a line for each run; returns the text of an SVG file."""
    names = _group_names(curves)
    width, height = 2 * (LEFT + WIDTH) + GAP, TOP + HEIGHT + 60 + LINE * len(curves)
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>']
    parts += ["<style>text { font-family: system-ui, Arial, sans-serif; font-size: 13px; fill: #1c2733; }</style>"]
    parts += [f'<path d="M0 0H{width}V{height}H0z" fill="white"/>']
    for number, score in enumerate(SCORES):
        parts += _plot(curves, names, score, LEFT + number * (LEFT + WIDTH + GAP / 2))
    for number, curve in enumerate(curves):
        y = TOP + HEIGHT + 60 + LINE * number
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<path d="M{LEFT} {y - 4}h24" stroke="{colour}" stroke-width="2.5"/>')
        parts.append(_text(curve.label, LEFT + 32, y))
    return "\n".join([*parts, "</svg>", ""])


def _plot(curves: Sequence[Curve], names: Sequence[str], score: str, x: float) -> list[str]:
    """One plot with its left edge at x: scores from 0 to 100 over the groups of lengths, at equal distances."""
    axes = f'<path d="M{x:.1f} {TOP}v{HEIGHT}h{WIDTH}" stroke="#66727f" fill="none"/>'
    parts = [_text(TITLES[score], x, TOP - 14), axes]
    places = [x + WIDTH * (i + 0.5) / len(names) for i in range(len(names))]
    for value in range(0, 101, 20):
        y = _height(value)
        parts.append(f'<path d="M{x:.1f} {y:.1f}h{WIDTH}" stroke="#e2e7ee"/>')
        parts.append(_text(str(value), x - 8, y + 4, "end"))
    parts += [_text(name, at, TOP + HEIGHT + 18, "middle") for name, at in zip(names, places, strict=True)]
    unit = escape(curves[0].unit)
    parts.append(_text(f"{unit} of the source", x + WIDTH / 2, TOP + HEIGHT + 36, "middle"))
    for number, curve in enumerate(curves):
        at, factor = dict(zip(names, places, strict=True)), 100 if score == "exact_match" else 1
        points = [(at[name], factor * curve.groups[name][score]) for name in names if name in curve.groups]
        line = " ".join(f"{left:.1f},{_height(value):.1f}" for left, value in points)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
    return parts


def _height(value: float) -> float:
    """The vertical position of a value from 0 to 100, in pixels."""
    return TOP + HEIGHT * (1 - value / 100)


def _text(text: str, x: float, y: float, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _group_names(curves: Sequence[Curve]) -> list[str]:
    """The groups of lengths of all runs, shortest first."""
    names = {name for curve in curves for name in curve.groups}
    return sorted(names, key=lambda name: int(name.strip("+").split("-")[0]))
