"""Rename tables, which translate tensor names from another program's to ours and back."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

Row = tuple[str, str]  # (theirs, ours)

FIELD_PATTERNS = {"i": r"\d+", "leaf": "weight|bias", "path": ".+", "qkv": "[qkv]", "statistic": "mean|var"}
MATCHES_NOTHING = "(?!)"  # a regular expression that no text matches


class RenameResult(NamedTuple):
    """Tensors under their new names, and the old names of tensors for which there is no new name."""

    tensors: dict[str, Tensor]
    sources: dict[str, str]  # new name -> old name
    left_out: list[str]  # old names of tensors that are left out on purpose
    unknown: list[str]  # old names of all other tensors without a new name


class Table:
    """Rows of two name templates: another program's ("theirs") and ours. The first row that matches a name applies.

    A template contains fields: `{i}` stands for a number, `{qkv}` for q, k or v, `{leaf}` for "weight" or "bias",
    `{statistic}` for "mean" or "var", and `{path}` for any text. The two templates of a row have the same fields. If
    our template ends with ".", `{leaf}` is appended to both.

    In their template, `{a|b}` lists alternative spellings. `to_ours` accepts each of them, and `*` in a spelling
    matches any word. `to_theirs` writes the first spelling.
    """

    def __init__(self, *rows: Row):
        self.rows = tuple((f"{theirs}{{leaf}}", f"{ours}{{leaf}}") if ours[-1] == "." else (theirs, ours)
                          for theirs, ours in rows)  # fmt: skip

    def to_ours(self, name: str) -> str | None:
        """Translate their name of a tensor to ours; None if no row matches."""
        return _translate(self._from_theirs, name)

    def to_theirs(self, name: str) -> str | None:
        """Translate our name of a tensor to theirs; None if no row matches."""
        return _translate(self._from_ours, name)

    @cached_property
    def _from_theirs(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(theirs), ours) for theirs, ours in self.rows]

    @cached_property
    def _from_ours(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(ours), re.sub(r"\{([^{}|]*)\|[^{}]*\}", r"\1", theirs)) for theirs, ours in self.rows]


def with_prefixes(theirs: str, ours: str, rows: Iterable[Row]) -> list[Row]:
    """Prefix the other program's name in each row with `theirs`, and our name with `ours`."""
    return [(theirs + their_name, ours + our_name) for their_name, our_name in rows]


def rename(
    tensors: Mapping[str, Tensor], new_name: Callable[[str], str | None], left_out: str = MATCHES_NOTHING
) -> RenameResult:
    """Rename tensors by the function `new_name`, such as `Table.to_ours`.

    A name for which `new_name` returns None is listed in the result's `left_out` if it matches the regular expression
    `left_out`, and otherwise in `unknown`. Imports refuse a file with unknown names.
    """
    renamed = RenameResult({}, {}, [], [])
    for name, tensor in tensors.items():
        new = new_name(name)
        if new is not None:
            renamed.tensors[new], renamed.sources[new] = tensor, name
        else:
            (renamed.left_out if re.fullmatch(left_out, name) else renamed.unknown).append(name)
    return renamed


def identify_format(names: Iterable[str], patterns: Iterable[tuple[str, str]]) -> str | None:
    """Identify a file's format by its tensor names.

    `patterns` are pairs (regular expression, format). Returns the format of the first pair with an expression that
    occurs in a name; None if there is no such pair.
    """
    names = list(names)
    return next((format for pattern, format in patterns if any(re.search(pattern, name) for name in names)), None)


def _translate(rows: list[tuple[re.Pattern[str], str]], name: str) -> str | None:
    for pattern, new in rows:
        if match := pattern.fullmatch(name):
            return new.format(**match.groupdict())
    return None


def _pattern(template: str) -> re.Pattern[str]:
    """Return a regular expression that matches the names of a template, with a named group for each field."""
    expression = ""
    for literal, braces in re.findall(r"([^{}]*)(\{[^{}]*\})?", template):
        expression += re.escape(literal)
        field = braces[1:-1]
        if "|" in field:
            spellings = [re.escape(spelling).replace(r"\*", r"\w+") for spelling in field.split("|")]
            expression += f"(?:{'|'.join(spellings)})"
        elif field:
            expression += f"(?P<{field}>{FIELD_PATTERNS[field]})"
    return re.compile(expression)
