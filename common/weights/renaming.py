"""Names of another program's tensors and ours for the same tensors, in tables that are read in both directions."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

Row = tuple[str, str]  # (theirs, ours)

FIELD_PATTERNS = {"i": r"\d+", "leaf": "weight|bias", "path": ".+", "qkv": "[qkv]", "statistic": "mean|var"}
MATCHES_NOTHING = "(?!)"  # a regular expression that nothing matches


class RenameResult(NamedTuple):
    """Tensors under their new names, and the old names of those that have none."""

    tensors: dict[str, Tensor]
    sources: dict[str, str]  # new name -> old name
    left_out: list[str]
    unknown: list[str]


class Table:
    """Rows (theirs, ours) of names; the first row that matches a name decides.

    A field stands in both: `{i}` for a number, `{qkv}` for one of these letters, `{leaf}` for "weight" or "bias",
    `{path}` for any text. A row that ends in "." on our side means `{leaf}` after it. `{a|b}` on their side lists
    spellings, in which `*` is any word; their names are written with the first.
    """

    def __init__(self, *rows: Row):
        self.rows = tuple((f"{theirs}{{leaf}}", f"{ours}{{leaf}}") if ours[-1] == "." else (theirs, ours)
                          for theirs, ours in rows)  # fmt: skip

    def to_ours(self, name: str) -> str | None:
        """Our name for a tensor of theirs; None without a row for it."""
        return _translated(self._from_theirs, name)

    def to_theirs(self, name: str) -> str | None:
        """Their name for a tensor of ours; None without a row for it."""
        return _translated(self._from_ours, name)

    @cached_property
    def _from_theirs(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for theirs, ours in self.rows]

    @cached_property
    def _from_ours(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), re.sub(r"\{([^{}|]*)\|[^{}]*\}", r"\1", theirs)) for theirs, ours in self.rows]


def with_prefixes(theirs: str, ours: str, rows: Iterable[Row]) -> list[Row]:
    """Rows with a prefix on each side."""
    return [(theirs + name, ours + meaning) for name, meaning in rows]


def rename(
    tensors: Mapping[str, Tensor], new_name: Callable[[str], str | None], left_out: str = MATCHES_NOTHING
) -> RenameResult:
    """Tensors under the names that `new_name` gives (`Table.to_ours`, say).

    Of the others, those whose names match the regular expression `left_out` are left out, and the rest is unknown:
    the caller refuses it.
    """
    renamed = RenameResult({}, {}, [], [])
    for name, tensor in tensors.items():
        new = new_name(name)
        if new is not None:
            renamed.tensors[new], renamed.sources[new] = tensor, name
        else:
            (renamed.left_out if re.fullmatch(left_out, name) else renamed.unknown).append(name)
    return renamed


def identify_format(names: Iterable[str], signs: Iterable[tuple[str, str]]) -> str | None:
    """What a file is, by the first of (regular expression, what it tells) that is found in any of its names."""
    names = list(names)
    return next((what for sign, what in signs if any(re.search(sign, name) for name in names)), None)


def _translated(rows: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, new in rows:
        if match := pattern.fullmatch(name):
            return new.format(**match.groupdict())
    return None


def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of a side of a row, with a group for each field."""
    expression = ""
    for literal, braces in re.findall(r"([^{}]*)(\{[^{}]*\})?", template):
        expression += re.escape(literal)
        inside = braces[1:-1]
        if "|" in inside:
            spellings = [re.escape(spelling).replace(r"\*", r"\w+") for spelling in inside.split("|")]
            expression += f"(?:{'|'.join(spellings)})"
        elif inside:
            expression += f"(?P<{inside}>{FIELD_PATTERNS[inside]})"
    return re.compile(expression)
