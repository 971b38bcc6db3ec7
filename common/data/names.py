"""Names of classes and files: convert them to one Unicode form for comparison, and list class names in a line."""

import unicodedata
from collections.abc import Sequence

MAX_NAMES = 20  # maximum number of names that `names_line` lists before the last one


def composed(name: str) -> str:
    """Convert a name to Unicode's composed form (NFC), so that names from different systems can be compared.

    In this form, an accented letter is one character. File names from macOS may contain it as two characters.
    """
    return unicodedata.normalize("NFC", name)


def names_line(names: Sequence[str]) -> str:
    """A line with the class names in the order of their index, for the lines that a run prints at its start.

    If there are more than MAX_NAMES names, only the first MAX_NAMES and the last are listed.
    """
    more = f", ... (the last is {names[-1]})" if len(names) > MAX_NAMES else ""
    return f"classes: {', '.join(names[:MAX_NAMES])}{more}"


def first_names(names: Sequence[str]) -> str:
    """List the first five of `names`, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
