"""Sort and check the names of an image folder's classes, which are the names of its sub-folders."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

from common.data.names import composed
from common.errors import UserError

ClassOrder = Literal["string", "natural"]


def sort_classes(names: Iterable[str], order: ClassOrder) -> list[str]:
    """Sort names as text ("string": 1, 10, 2) or by the numbers in them ("natural": 1, 2, 10)."""
    return sorted(names) if order == "string" else sorted(names, key=_natural_key)


def check_distinct(names: Sequence[str], folder: str) -> None:
    """Raise UserError when the names of two class folders differ only in their Unicode form (NFC or NFD).

    Such names look alike. `folder` is the path that the message names.
    """
    first: dict[str, str] = {}
    for name in names:
        if first.setdefault(composed(name), name) != name:
            raise UserError(
                f"{folder} has two class folders with the name {name}, in the composed and the decomposed form of "
                "Unicode (NFC and NFD); move their images into one."
            )


def order_notes(names: Sequence[str]) -> list[str]:
    """Return a list with one note if names are sorted as text and sorting by the numbers in them gives another order.

    Otherwise, the list is empty.
    """
    natural = sort_classes(names, "natural")
    if list(names) == natural or list(names) != sorted(names):
        return []
    i = next(i for i, (name, other) in enumerate(zip(names, natural, strict=True)) if name != other)
    return [
        f"class names are sorted as text, so class {i} is {names[i]} and not {natural[i]}; data.class_order=natural "
        "sorts by the numbers in names"
    ]


def _natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a key for sorting names by the numbers in them.

    The first item of the key is the list of the name's parts, in which numbers are compared by value. The second item
    is the name itself. It orders names with equal parts, such as 1 and 01.
    """
    parts = re.split(r"([0-9]+)", name)  # text and numbers alternate, text first
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name
