"""Names of classes: their order, and how the start summary shows them."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal

from common.errors import UserError

ClassOrder = Literal["string", "natural"]

MAX_NAMES = 20  # in a line of the summary


def sort_classes(names: Iterable[str], order: ClassOrder) -> list[str]:
    """Sort names as text (1, 10, 2), or naturally, by the numbers in them (1, 2, 10)."""
    return sorted(names) if order == "string" else sorted(names, key=_natural_key)


def same_text(name: str) -> str:
    """A name in Unicode's composed form (NFC), since macOS writes accented letters as two characters, Linux as one."""
    return unicodedata.normalize("NFC", name)


def check_distinct(names: Sequence[str], folder: str) -> None:
    """Raise UserError when the names of two class folders differ only in their Unicode form, and so look alike."""
    first: dict[str, str] = {}
    for name in names:
        if first.setdefault(same_text(name), name) != name:
            raise UserError(
                f"{folder} has two class folders with the name {name}, in the composed and the decomposed form of "
                "Unicode (NFC and NFD); move their images into one."
            )


def names_line(names: Sequence[str]) -> str:
    """A line with the classes' names by index."""
    more = f", ... (the last is {names[-1]})" if len(names) > MAX_NAMES else ""
    return f"classes: {', '.join(names[:MAX_NAMES])}{more}"


def order_notes(names: Sequence[str]) -> list[str]:
    """A note when names are sorted as text, and would be in another order if sorted by the numbers in them."""
    natural = sort_classes(names, "natural")
    if list(names) == natural or list(names) != sorted(names):
        return []
    i = next(i for i, (name, other) in enumerate(zip(names, natural, strict=True)) if name != other)
    return [
        f"class names are sorted as text, so class {i} is {names[i]} and not {natural[i]}; data.class_order=natural "
        "sorts by the numbers in names"
    ]


def _natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """A sort key: parts of a name, with numbers compared by value, then the name as text (for 1 and 01)."""
    parts = re.split(r"([0-9]+)", name)  # text and numbers alternate
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], name
