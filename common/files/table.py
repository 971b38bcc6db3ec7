"""Tables as plain text, for consoles and log files."""

import math
from collections.abc import Sequence
from typing import Any

from common.files.names import printable


def table(title: str, rows: Sequence[Sequence[Any]]) -> str:
    """Format a table with text aligned left and numbers right; floats have four decimals, NaN and infinity are a dash.

    The first of `rows` is the header; without further rows the text is "`title`: none".
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
