"""Tables as plain text, for consoles and log files."""

import math
from collections.abc import Sequence
from typing import Any

from common.files.names import printable


def table(title: str, rows: Sequence[Sequence[Any]]) -> str:
    """Format a table: columns of numbers are aligned right, all others left.

    Floats are shown with four decimals, and NaN and infinity as a dash. The first of `rows` is the header. Without
    further rows, the text is "`title`: none".
    """
    if len(rows) < 2:
        return f"{title}: none"
    cells = [[_cell(value) for value in row] for row in rows]
    columns = []
    for values, texts in zip(zip(*rows[1:], strict=True), zip(*cells, strict=True), strict=True):
        align = str.rjust if all(isinstance(value, int | float) for value in values) else str.ljust
        columns.append([align(text, max(map(len, texts))) for text in texts])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    return "\n".join([title, lines[0], "  ".join("-" * len(column[0]) for column in columns), *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "-"
    return printable(str(value))


def tables(title: str, rows: Sequence[Sequence[Any]], width: int) -> str:
    """Format a table in lines of at most `width` characters; `width` must be at least 20.

    A table that is too wide is split into several tables, which all begin with the first column. A single text that is
    too long, such as the path of a run, is shortened in its middle. Numbers are not shortened, so a line with a very
    long number may be wider.
    """
    first = min(max(len(_cell(row[0])) for row in rows), width // 2)
    limits = [first, *[width - first - 2] * (len(rows[0]) - 1)]
    cells = [[_shortened(value, limit) for value, limit in zip(row, limits, strict=True)] for row in rows]
    widths = [max(len(_cell(row[column])) for row in cells) for column in range(len(limits))]
    blocks = [[0]]
    for column in range(1, len(widths)):
        if sum(widths[i] + 2 for i in blocks[-1]) + widths[column] > width:
            blocks.append([0])
        blocks[-1].append(column)
    titles = [title, *[f"{title} (continued)"] * (len(blocks) - 1)]
    parts = [[[row[i] for i in block] for row in cells] for block in blocks]
    return "\n\n".join(table(_shortened(title, width), part) for title, part in zip(titles, parts, strict=True))


def _shortened(value: Any, length: int) -> Any:
    """Replace the middle of a text longer than `length` by three dots; numbers are returned unchanged."""
    text = _cell(value)
    if isinstance(value, int | float) or len(text) <= length:
        return value
    tail = (length - 3) * 2 // 3  # the end of a path says more than its beginning
    return f"{text[: length - 3 - tail]}...{text[len(text) - tail :]}"
