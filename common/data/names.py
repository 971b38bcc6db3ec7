"""Names of classes and files: one form of Unicode to compare them in, and a line that lists them."""

import unicodedata
from collections.abc import Sequence

MAX_NAMES = 20  # in a line of the summary


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), since macOS writes accented letters as two characters, Linux as one."""
    return unicodedata.normalize("NFC", name)


def names_line(names: Sequence[str]) -> str:
    """A line with the classes' names by index."""
    more = f", ... (the last is {names[-1]})" if len(names) > MAX_NAMES else ""
    return f"classes: {', '.join(names[:MAX_NAMES])}{more}"
