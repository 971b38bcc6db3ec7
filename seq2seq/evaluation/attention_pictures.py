"""Draw the cross-attention between two sentences as an SVG file, with labels as text in any writing system."""

import math
import unicodedata
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from common.report.colours import BLUES, ramp

CELL, HEAD_CELL = 28, 8  # pixels of a cell's side, in the map of the mean over heads and in the map of one head
GAP, MARGIN = 18, 24  # pixels between two maps, and between the maps and the edge of the picture
FONT = 14  # font size in pixels
MAX_LABEL_WIDTH = 220  # pixels; a wider label of a token is cut
SCALE_WIDTH, SCALE_HEIGHT = 160, 12  # pixels of the colour scale
GRID, DARK, PALE = "#e2e7ee", "#1c2733", "#66727f"
JOINERS = "\u200c\u200d"  # invisible, but part of the spelling in many writing systems
LABEL_ANGLE = math.radians(50)  # of the labels above the map: steep enough that neighbours do not overlap

STYLE = f"""\
text {{ font-family: system-ui, "Noto Sans", "DejaVu Sans", Arial, sans-serif; font-size: {FONT}px; fill: {DARK}; }}
text.title {{ font-size: {FONT + 3}px; font-weight: 600; }}
text.pale {{ font-size: {FONT - 2}px; fill: {PALE}; }}
rect.frame {{ fill: none; stroke: {PALE}; stroke-width: 1; }}
rect:hover {{ stroke: #d9480f; stroke-width: 1.5; }}"""


def picture(attention: Tensor, source: Sequence[str], target: Sequence[str], title: str) -> str:
    """Draw the attention of each target token to the source tokens; returns the text of an SVG file.

    attention (h, T, S) in 0..1; `source` holds the S source tokens, `target` the T target tokens. A large map shows the
    mean over heads, with target tokens as rows and source tokens as columns. If there are several heads, there is a
    small map of each head beside the large one. In all maps, white is 0 and dark blue is 1. The tooltip of a cell gives
    its two tokens and its value. Small maps omit white cells.
    """
    heads = attention.detach().double().cpu().clamp(0, 1)
    assert heads.shape == (len(heads), len(target), len(source)) and heads.numel()
    rows, columns = [visible(token) for token in target], [visible(token) for token in source]
    left = max([_width("target ↓"), *(_width(_label(row)) for row in rows)]) + 10
    label_widths = [_width(_label(column)) for column in columns]
    above = max(label_widths) * math.sin(LABEL_ANGLE) + FONT + 6
    reach = max(i * CELL + n * math.cos(LABEL_ANGLE) for i, n in enumerate(label_widths, start=1))
    overhang = max(reach - CELL * len(columns), 0)
    x, y = MARGIN + left, MARGIN + 2 * FONT + max(above, 2.5 * FONT)  # upper left corner of the large map
    width, height = CELL * len(columns), CELL * len(rows)
    parts = [
        *_axes(x, y, rows, columns),
        *_map(heads.mean(0), x, y, CELL, rows, columns),
        *_scale(x, y + height + GAP),
    ]
    right, bottom = x + max(width + overhang, SCALE_WIDTH + 20), y + height + GAP + SCALE_HEIGHT + 2 * FONT
    if len(heads) > 1:
        head_parts, right, lower = _heads(heads, right + GAP, y, height, rows, columns)
        parts, bottom = parts + head_parts, max(bottom, lower)
    return _document(parts, math.ceil(right + MARGIN), math.ceil(bottom + MARGIN), title)


def visible(text: str) -> str:
    """Replace most characters that are invisible, and all characters that are invalid in XML.

    Spaces become U+2423, and ASCII control characters become Unicode's pictures of them (U+2400 to U+2421). Other
    control and format characters, line and paragraph separators, surrogates, and the noncharacters U+xFFFE and U+xFFFF
    become U+FFFD. JOINERS are kept.
    """
    return "".join(_visible_character(c) for c in text)


def hex_colours(values: Tensor) -> list[str]:
    """The colours of values (n,) in 0..1, from white for 0 to dark blue for 1, in the form #1e5fa5."""
    return [f"#{bytes(colour).hex()}" for colour in ramp(values, BLUES).T.tolist()]


def _visible_character(c: str) -> str:
    category = unicodedata.category(c)
    if category == "Zs":
        return "␣"
    if ord(c) < 32 or c == "\x7f":
        return "␡" if c == "\x7f" else chr(0x2400 + ord(c))
    invalid = category in ("Cc", "Cf", "Cs", "Zl", "Zp") or ord(c) & 0xFFFE == 0xFFFE  # U+xFFFE, U+xFFFF: noncharacters
    return "\ufffd" if invalid and c not in JOINERS else c


def _heads(
    heads: Tensor, x: float, y: float, height: float, rows: Sequence[str], columns: Sequence[str]
) -> tuple[list[str], float, float]:
    """Draw a small map of each head, with the head's name above it, in rows beside the large map.

    The upper left corner of the first head's name is at (`x`, `y`). `height` is the height of the large map. Returns
    the SVG elements, and the right and the lower edge of the small maps, in pixels.
    """
    step_x = max(HEAD_CELL * len(columns), _width("head 10")) + GAP
    step_y = HEAD_CELL * len(rows) + FONT + GAP
    maps_per_column = max(1, int((height + GAP) // step_y))
    maps_per_row = math.ceil(len(heads) / maps_per_column)
    parts: list[str] = []
    for i, head in enumerate(heads):
        at_x, at_y = x + i % maps_per_row * step_x, y + i // maps_per_row * step_y
        parts.append(_text(f"head {i + 1}", at_x, at_y + FONT - 4, style="pale"))
        parts += _map(head, at_x, at_y + FONT, HEAD_CELL, rows, columns, skip_white=True)
    return parts, x + maps_per_row * step_x - GAP, y + math.ceil(len(heads) / maps_per_row) * step_y - GAP


def _map(
    attention: Tensor,
    x: float,
    y: float,
    cell: int,
    rows: Sequence[str],
    columns: Sequence[str],
    skip_white: bool = False,
) -> list[str]:
    """Draw a heat map of attention (T, S): its upper left corner is at (x, y), the side of a cell is `cell` pixels.

    With `skip_white`, white cells are omitted.
    """
    stroke = f' stroke="{GRID}"' if cell == CELL else ""
    parts = [f'<g class="{"mean" if cell == CELL else "head"}" transform="translate({x:.1f} {y:.1f})"{stroke}>']
    for i, (row, values) in enumerate(zip(rows, attention, strict=True)):
        for j, (column, value, colour) in enumerate(zip(columns, values.tolist(), hex_colours(values), strict=True)):
            if skip_white and colour == "#ffffff":
                continue
            tooltip = f"<title>{escape(f'{column} → {row}: {value:.3f}')}</title>"
            geometry = f'x="{j * cell}" y="{i * cell}" width="{cell}" height="{cell}"'
            parts.append(f'<rect {geometry} fill="{colour}">{tooltip}</rect>')
    frame = f'width="{cell * len(columns)}" height="{cell * len(rows)}"'
    return [*parts, f'<rect class="frame" pointer-events="none" {frame}/>', "</g>"]


def _axes(x: float, y: float, rows: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The labels of the large map: target tokens at its left, slanted source tokens above it.

    The upper left corner of the map is (x, y).
    """
    parts = [_text("source →", x - 10, y - FONT - 14, "end", "pale"), _text("target ↓", x - 10, y - 10, "end", "pale")]
    for i, row in enumerate(rows):
        parts.append(_text(_label(row), x - 8, y + (i + 0.5) * CELL + FONT / 3, "end", "row"))
    for j, column in enumerate(columns):
        at_x, at_y = x + (j + 0.5) * CELL + FONT / 3, y - 6
        rotation = f' transform="rotate({-math.degrees(LABEL_ANGLE):.0f} {at_x:.1f} {at_y:.1f})"'
        parts.append(_text(_label(column), at_x, at_y, "start", "column", rotation))
    return parts


def _scale(x: float, y: float) -> list[str]:
    """The colour scale from 0 to 1, with its upper left corner at (x, y)."""
    colours = enumerate(hex_colours(torch.linspace(0, 1, 5)))
    stops = [f'<stop offset="{i / 4}" stop-color="{colour}"/>' for i, colour in colours]
    geometry = f'x="{x:.1f}" y="{y:.1f}" width="{SCALE_WIDTH}" height="{SCALE_HEIGHT}"'
    parts = ['<linearGradient id="scale">', *stops, "</linearGradient>"]
    parts.append(f'<rect class="key" {geometry} fill="url(#scale)" stroke="{GRID}"/>')
    below = y + SCALE_HEIGHT + FONT
    return parts + [_text(str(v), x + v * SCALE_WIDTH, below, "middle", "pale") for v in (0, 0.25, 0.5, 0.75, 1)]


def _document(parts: list[str], width: int, height: int, title: str) -> str:
    """The text of the file: a white background, the title, and `parts`."""
    title = visible(title).replace("␣", " ")
    geometry = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" {geometry}>',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<path d="M0 0H{width}V{height}H0z" fill="white"/>',
        _text(_cut(title, width - 2 * MARGIN, FONT + 3), MARGIN, MARGIN + FONT - 2, style="title"),
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _text(text: str, x: float, y: float, anchor: str = "start", style: str = "", more: str = "") -> str:
    """An SVG text element of the CSS class `style`; `more` holds further attributes."""
    alignment = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}"{alignment}{more}>{escape(text)}</text>'


def _label(token: str) -> str:
    return _cut(token, MAX_LABEL_WIDTH, FONT)


def _cut(text: str, width: float, font: float) -> str:
    """The text, cut with an ellipsis if it is wider than `width` pixels at the font size `font`."""
    if _width(text, font) <= width:
        return text
    return next((f"{text[:n]}…" for n in range(len(text), 0, -1) if _width(f"{text[:n]}…", font) <= width), "…")


def _width(text: str, font: float = FONT) -> int:
    """A generous estimate of a text's width in pixels; the exact width depends on the viewer's font."""
    return math.ceil(sum(_relative_width(c) for c in text) * font)


def _relative_width(c: str) -> float:
    """A character's estimated width in multiples of the font's size."""
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0.0
    return 1.05 if unicodedata.east_asian_width(c) in "WF" else 0.9 if c in "MWmw@%—…␣" else 0.62
