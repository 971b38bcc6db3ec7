"""Cross-attention between two sentences as a picture: an SVG file, whose letters of any script the viewer draws."""

import math
import unicodedata
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from common.report.colours import BLUES, ramp

CELL, SMALL = 28, 8  # pixels of a cell's side, in the mean over heads and in a single head
GAP, EDGE = 18, 24  # pixels between pictures, and around all of them
FONT = 14  # pixels
MAX_LABEL_WIDTH = 220  # pixels of a token's label, of which more is cut
KEY_WIDTH, KEY_HEIGHT = 160, 12  # pixels of the colour scale
GRID, INK, PALE = "#e2e7ee", "#1c2733", "#66727f"
JOINERS = "\u200c\u200d"  # invisible, but letters of many scripts join by them
LABEL_ANGLE = math.radians(50)  # of the labels above: steep enough that neighbours stay apart

STYLE = f"""\
text {{ font-family: system-ui, "Noto Sans", "DejaVu Sans", Arial, sans-serif; font-size: {FONT}px; fill: {INK}; }}
text.title {{ font-size: {FONT + 3}px; font-weight: 600; }}
text.pale {{ font-size: {FONT - 2}px; fill: {PALE}; }}
rect.frame {{ fill: none; stroke: {PALE}; stroke-width: 1; }}
rect:hover {{ stroke: #d9480f; stroke-width: 1.5; }}"""


def picture(weights: Tensor, source: Sequence[str], target: Sequence[str], title: str) -> str:
    """Draw where each target token looked: the text of an SVG file.

    weights (h, T, S) in 0..1; source and target are the S and T tokens. The mean over heads is large, with target
    tokens as rows and source tokens as columns; each head stands small beside it. White is 0 and dark blue is 1 in
    all of them, whatever the largest weight. Pointing at a cell tells its tokens and its weight; a head's cells that
    would be white are left out, which most are.
    """
    heads = weights.detach().double().cpu().clamp(0, 1)
    assert heads.shape == (len(heads), len(target), len(source)) and heads.numel()
    rows, columns = [visible(token) for token in target], [visible(token) for token in source]
    left = max([_width("target ↓"), *(_width(_label(row)) for row in rows)]) + 10
    leaning = [_width(_label(column)) for column in columns]
    above = max(leaning) * math.sin(LABEL_ANGLE) + FONT + 6
    beyond = max(
        max(i * CELL + n * math.cos(LABEL_ANGLE) for i, n in enumerate(leaning, start=1)) - CELL * len(columns), 0
    )
    x, y = EDGE + left, EDGE + 2 * FONT + max(above, 2.5 * FONT)  # the mean's corner
    wide, high = CELL * len(columns), CELL * len(rows)
    parts = [
        *_axes(x, y, rows, columns),
        *_map(heads.mean(0), x, y, CELL, rows, columns),
        *_scale(x, y + high + GAP),
    ]
    right, bottom = x + max(wide + beyond, KEY_WIDTH + 20), y + high + GAP + KEY_HEIGHT + 2 * FONT
    if len(heads) > 1:
        few, right, low = _heads(heads, right + GAP, y, high, rows, columns)
        parts, bottom = parts + few, max(bottom, low)
    return _sheet(parts, math.ceil(right + EDGE), math.ceil(bottom + EDGE), title)


def visible(text: str) -> str:
    """The text as it can be seen and stand in an XML file: spaces as U+2423, control characters as their pictures."""
    return "".join(_seen(c) for c in text)


def hex_colours(weights: Tensor) -> list[str]:
    """The colours of weights (n,) in 0..1, from white to dark blue, as in #1e5fa5."""
    return [f"#{bytes(colour).hex()}" for colour in ramp(weights, BLUES).T.tolist()]


def _seen(c: str) -> str:
    kind = unicodedata.category(c)
    if kind == "Zs":
        return "␣"
    if ord(c) < 32 or c == "\x7f":
        return "␡" if c == "\x7f" else chr(0x2400 + ord(c))
    wrong = kind in ("Cc", "Cf", "Cs", "Zl", "Zp") or ord(c) & 0xFFFE == 0xFFFE  # the last are no characters
    return "\ufffd" if wrong and c not in JOINERS else c


def _heads(
    heads: Tensor, x: float, y: float, high: float, rows: Sequence[str], columns: Sequence[str]
) -> tuple[list[str], float, float]:
    """Each head under its name, in as many rows as fit beside the mean; then where they end, right and below."""
    step_x = max(SMALL * len(columns), _width("head 10")) + GAP
    step_y = SMALL * len(rows) + FONT + GAP
    down = max(1, int((high + GAP) // step_y))
    across = math.ceil(len(heads) / down)
    parts: list[str] = []
    for i, head in enumerate(heads):
        at_x, at_y = x + i % across * step_x, y + i // across * step_y
        parts.append(_text(f"head {i + 1}", at_x, at_y + FONT - 4, kind="pale"))
        parts += _map(head, at_x, at_y + FONT, SMALL, rows, columns, drop=True)
    return parts, x + across * step_x - GAP, y + math.ceil(len(heads) / across) * step_y - GAP


def _map(
    weights: Tensor, x: float, y: float, cell: int, rows: Sequence[str], columns: Sequence[str], drop: bool = False
) -> list[str]:
    """A heat map of weights (T, S) with its upper left corner at (x, y); `drop` leaves out cells that stay white."""
    line = f' stroke="{GRID}"' if cell == CELL else ""
    parts = [f'<g class="{"mean" if cell == CELL else "head"}" transform="translate({x:.1f} {y:.1f})"{line}>']
    for i, (row, values) in enumerate(zip(rows, weights, strict=True)):
        for j, (column, value, colour) in enumerate(zip(columns, values.tolist(), hex_colours(values), strict=True)):
            if drop and colour == "#ffffff":
                continue
            said = f"<title>{escape(f'{column} → {row}: {value:.3f}')}</title>"
            place = f'x="{j * cell}" y="{i * cell}" width="{cell}" height="{cell}"'
            parts.append(f'<rect {place} fill="{colour}">{said}</rect>')
    frame = f'width="{cell * len(columns)}" height="{cell * len(rows)}"'
    return [*parts, f'<rect class="frame" pointer-events="none" {frame}/>', "</g>"]


def _axes(x: float, y: float, rows: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The tokens: the target's at the left of the map whose corner is (x, y), the source's leaning above it."""
    parts = [_text("source →", x - 10, y - FONT - 14, "end", "pale"), _text("target ↓", x - 10, y - 10, "end", "pale")]
    for i, row in enumerate(rows):
        parts.append(_text(_label(row), x - 8, y + (i + 0.5) * CELL + FONT / 3, "end", "row"))
    for j, column in enumerate(columns):
        at_x, at_y = x + (j + 0.5) * CELL + FONT / 3, y - 6
        turn = f' transform="rotate({-math.degrees(LABEL_ANGLE):.0f} {at_x:.1f} {at_y:.1f})"'
        parts.append(_text(_label(column), at_x, at_y, "start", "column", turn))
    return parts


def _scale(x: float, y: float) -> list[str]:
    """What the colours mean, with its upper left corner at (x, y)."""
    colours = enumerate(hex_colours(torch.linspace(0, 1, 5)))
    stops = [f'<stop offset="{i / 4}" stop-color="{colour}"/>' for i, colour in colours]
    place = f'x="{x:.1f}" y="{y:.1f}" width="{KEY_WIDTH}" height="{KEY_HEIGHT}"'
    parts = ['<linearGradient id="weights">', *stops, "</linearGradient>"]
    parts.append(f'<rect class="key" {place} fill="url(#weights)" stroke="{GRID}"/>')
    below = y + KEY_HEIGHT + FONT
    return parts + [_text(str(v), x + v * KEY_WIDTH, below, "middle", "pale") for v in (0, 0.25, 0.5, 0.75, 1)]


def _sheet(parts: list[str], width: int, height: int, title: str) -> str:
    """The whole file: white paper, the title, and everything on it."""
    words = visible(title).replace("␣", " ")
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<title>{escape(words)}</title>",
        f"<style>{STYLE}</style>",
        f'<path d="M0 0H{width}V{height}H0z" fill="white"/>',
        _text(_cut(words, width - 2 * EDGE, FONT + 3), EDGE, EDGE + FONT - 2, kind="title"),
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _text(words: str, x: float, y: float, anchor: str = "start", kind: str = "", more: str = "") -> str:
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{side}{more}>{escape(words)}</text>'


def _label(token: str) -> str:
    return _cut(token, MAX_LABEL_WIDTH, FONT)


def _cut(text: str, width: float, font: float) -> str:
    """The text, with an ellipsis for its end where it would be wider than `width` pixels."""
    if _width(text, font) <= width:
        return text
    return next((f"{text[:n]}…" for n in range(len(text), 0, -1) if _width(f"{text[:n]}…", font) <= width), "…")


def _width(text: str, font: float = FONT) -> int:
    """About how many pixels a text takes, on the safe side; only the viewer knows its letters."""
    return math.ceil(sum(_share(c) for c in text) * font)


def _share(c: str) -> float:
    """A letter's width in multiples of the font's size."""
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0.0
    return 1.05 if unicodedata.east_asian_width(c) in "WF" else 0.9 if c in "MWmw@%—…␣" else 0.62
