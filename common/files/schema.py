"""Check the content of a stored file against types before the content is used.

A TypedDict or a dataclass describes the keys of a dict; keys that it does not name are permitted. The other supported
types are list, tuple, dict, unions, Literal, ranges (common/types.py), tensors, plain types, and Any.
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
MAX_PLAIN_DEPTH = 50  # maximum levels of containers; a config has about five, and a cycle has infinitely many
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
    """The first mistake in `value`, such as "task.classes is 5, expected a list (each text)"; None without a mistake.

    `expected` is the type. `field` names the value in the sentence; it is empty for the whole content of a file.

    Text and booleans do not count as numbers. Integers and NaN count as floats, but NaN lies outside every range that
    has a bound. A list may stand for a tuple, and a tuple for a list. Where an integer is expected, its absolute value
    may be at most MAX_INTEGER.
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
    """Describe the first part of `value` that JSON cannot hold, such as a tensor or a key that is a number.

    `field` names `value` in the sentence. Returns None if there is no such part. More than MAX_PLAIN_DEPTH levels of
    containers, and integers with an absolute value above MAX_INTEGER, are mistakes, too. `depth` is the number of
    containers around `value`.
    """
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
    """The first mistake in `parts`, each (value, expected type, field); None if there is no mistake."""
    return next(filter(None, (mistake(*part) for part in parts)), None)


def _fits(value: Any, expected: Any) -> bool:
    """Whether `value` has the type `expected`, which may be a range, a Literal, Any, Tensor or a plain type.

    The result is False for other types, such as list[int], because `mistake` checks containers itself.
    """
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
    """The keys of a TypedDict or a dataclass and their types; empty for any other type."""
    if typing.is_typeddict(expected) or dataclasses.is_dataclass(expected):
        hints = typing.get_type_hints(expected, include_extras=True)
        return {
            name: typing.get_args(hint)[0] if typing.get_origin(hint) is typing.NotRequired else hint
            for name, hint in hints.items()
        }
    return {}


def _required(expected: Any) -> Iterable[str]:
    required = getattr(expected, "__required_keys__", None)
    return _fields(expected) if required is None else [name for name in _fields(expected) if name in required]


def _sentence(value: Any, expected: Any, field: str) -> str:
    return f"{field} is {_show(value)}, expected {_describe(expected)}"


def _describe(expected: Any) -> str:
    """Describe a type in words that can follow "expected", such as "a whole number"."""
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
    """Show a plain value as shortened JSON, a container by type and length, and any other value by its type."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if not isinstance(value, str | int | float | NoneType):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:  # Python refuses to print more than 4,300 digits
        return f"an integer of {value.bit_length()} bits"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}..."
