"""Describe the types and values of config keys in words, for error messages."""

import json
import typing
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from common.config.schema import Options
from common.types import MAX_COUNT, Range

MAX_LENGTH = 120  # maximum number of characters of a value that a sentence shows in full


def describe_type(annotation: Any, large: bool = False) -> str:
    """Describe a type in words, for the end of "expected ...".

    Upper limits of MAX_COUNT or more, and the limit of integers to 64 bits, are mentioned only if `large` is True.
    Callers set `large` if the user's value is an integer beyond MAX_COUNT.
    """
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        ranges = [f" {_limits(limits, large)}" for limits in inner[1:] if isinstance(limits, Range)]
        return describe_type(inner[0]) + "".join(ranges)
    if kind is Literal:
        return " or ".join(filter(None, [", ".join(map(show_value, inner[:-1])), show_value(inner[-1])]))
    if kind in (Union, UnionType):
        return " or ".join(describe_type(choice, large) for choice in inner)
    if kind is tuple and inner[1:] != (Ellipsis,):
        return f"a list of {len(inner)} ({'; '.join(map(describe_type, inner))})"
    if kind in (list, tuple):
        return f"a list (each {describe_type(inner[0])})"
    if kind is dict:
        return f"keys with values (each {describe_type(inner[1])})"
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return f"the keys {', '.join(annotation.fields)}"
    if annotation is int and large:
        return "a whole number of at most 64 bits"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(annotation, str(annotation))


def _limits(limits: Range, large: bool) -> str:
    high = limits.high if large or (limits.high or 0) < MAX_COUNT else None
    parts = {"above": limits.above, "from": limits.low, "up to": high}
    return " ".join(f"{word} {_plain(number)}" for word, number in parts.items() if number is not None)


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else f"{number:g}"


def show_value(value: Any) -> str:
    """Write a value as the user would type it.

    Text is put in quotes if it is empty, begins with a digit, or is the word true, false or null.
    """
    looks_plain = isinstance(value, str) and not value[:1].isdigit() and value not in ("", "true", "false", "null")
    return value if looks_plain else json.dumps(value, ensure_ascii=False, default=str)


def shorten(text: str) -> str:
    """Replace the middle of a text by three dots if it has more than MAX_LENGTH characters."""
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH // 2]}...{text[-MAX_LENGTH // 4 :]}"
