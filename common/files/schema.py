"""Compare what a stored file holds with types before it is used; a TypedDict or a dataclass is the schema of a dict.

Other types are list, tuple, dict, unions, Literal, ranges (common/types.py), tensors, plain types, and Any. Keys that a
schema does not name are permitted.
"""

import dataclasses
import json
import typing
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from torch import Tensor

from common.config.describe import describe_type
from common.types import MAX_INTEGER, Range

MAX_SHOWN_CHARACTERS = 60
MAX_PLAIN_DEPTH = 50  # a config has about five levels; a pickle may hold a cycle
PLAIN = (NoneType, bool, int, float, str)
DESCRIPTIONS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Tensor: "a tensor",
}


def mistake(value: Any, expected: Any, field: str) -> str | None:
    """The first mistake in `value`, such as "task.classes is 5, expected a list (each text)", or None.

    `field` names the value; it is empty for the whole content of a file. Neither text nor a boolean is a number. An
    integer and NaN count as floats, but a range excludes NaN. An integer has at most 64 bits.
    """
    kind, inner = typing.get_origin(expected), typing.get_args(expected)
    prefix = f"{field}." if field else ""
    if kind in (Union, UnionType):
        mistakes = [mistake(value, choice, field) for choice in inner]
        nested = [text for text in mistakes if text and not text.startswith(f"{field} is ")]
        return None if None in mistakes else [*nested, _sentence(value, expected, field)][0]
    if isinstance(value, dict) and (fields := _fields(expected)):
        missing = [f"{prefix}{name} is missing" for name in _required(expected) if name not in value]
        named = ((value[name], annotation, f"{prefix}{name}") for name, annotation in fields.items() if name in value)
        return missing[0] if missing else _first(named)
    if isinstance(value, dict) and kind is dict:
        wrong = [key for key in value if mistake(key, inner[0], "")]
        if wrong:
            return f"{field} has the key {_show(wrong[0])}, expected {_describe(inner[0])}"
        return _first((item, inner[1], f"{prefix}{key}") for key, item in value.items())
    if isinstance(value, list | tuple) and kind in (list, tuple):
        kinds = inner if kind is tuple else inner * len(value)
        if len(kinds) == len(value):
            return _first((item, kinds[i], f"{field}[{i}]") for i, item in enumerate(value))
    return None if _fits(value, expected) else _sentence(value, expected, field)


def plain_mistake(value: Any, field: str, depth: int = 0) -> str | None:
    """The first part of `value` that JSON could not hold, such as a number as a key, or None."""
    if depth > MAX_PLAIN_DEPTH:
        return f"{field} is nested more than {MAX_PLAIN_DEPTH} levels deep"
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            return f"{field} has the key {_show(wrong[0])}, expected text"
        parts = [(item, f"{field}.{key}") for key, item in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(item, f"{field}[{i}]") for i, item in enumerate(value)]
    else:
        return None if any(_fits(value, kind) for kind in PLAIN) else _sentence(value, int | float | str, field)
    return next(filter(None, (plain_mistake(*part, depth + 1) for part in parts)), None)


def _first(parts: Iterable[tuple[Any, Any, str]]) -> str | None:
    """The first mistake in parts of (value, expected type, field)."""
    return next(filter(None, (mistake(*part) for part in parts)), None)


def _fits(value: Any, expected: Any) -> bool:
    """Whether `value` has the type `expected`, without regard to its parts."""
    kind, inner = typing.get_origin(expected), typing.get_args(expected)
    if kind is Annotated:
        ranges = [part for part in inner[1:] if isinstance(part, Range)]
        return _fits(value, inner[0]) and all(limits.contains(value) for limits in ranges)
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if expected is float:
        return type(value) in (int, float)
    if expected is int:
        return type(value) is int and abs(value) <= MAX_INTEGER
    return expected is Any or (isinstance(value, Tensor) if expected is Tensor else type(value) is expected)


def _fields(expected: Any) -> dict[str, Any]:
    """The types of the keys that a TypedDict or a dataclass names; empty for another type."""
    if typing.is_typeddict(expected) or dataclasses.is_dataclass(expected):
        return typing.get_type_hints(expected, include_extras=True)
    return {}


def _required(expected: Any) -> Iterable[str]:
    required = getattr(expected, "__required_keys__", None)
    return _fields(expected) if required is None else [name for name in _fields(expected) if name in required]


def _sentence(value: Any, expected: Any, field: str) -> str:
    return f"{field} is {_show(value)}, expected {_describe(expected)}"


def _describe(expected: Any) -> str:
    """A type in words, for the end of "expected ..."."""
    kind, inner = typing.get_origin(expected), typing.get_args(expected)
    if kind in (Annotated, Literal):
        return describe_type(expected)
    if kind in (Union, UnionType):
        return " or ".join(map(_describe, inner))
    if kind is tuple:
        return f"a list of {len(inner)} ({'; '.join(map(_describe, inner))})"
    if kind is list:
        return f"a list (each {_describe(inner[0])})"
    if kind is dict:
        return f"names with values (each {_describe(inner[1])})" if inner[1] is not Any else "names with values"
    return f"the keys {', '.join(_fields(expected))}" if _fields(expected) else DESCRIPTIONS[expected]


def _show(value: Any) -> str:
    """Show a plain value as shortened JSON, and any other value by its type."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if not isinstance(value, str | int | float | NoneType):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:  # Python converts no number of 4,300 digits to text
        return f"an integer of {value.bit_length()} bits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
