"""Names of classes and files: the form of Unicode in which they are compared, and a line that lists class names."""

import unicodedata
from collections.abc import Sequence

MAX_NAMES = 20  # listed in a line of the start summary


def composed(name: str) -> str:
    """Convert a name to Unicode's composed form (NFC), so that names from different systems can be compared.

    macOS writes an accented letter as two characters, Linux as one.
    """
    return unicodedata.normalize("NFC", name)


def names_line(names: Sequence[str]) -> str:
    """A line for the start summary with the class names in the order of their index.

    Of more than MAX_NAMES names, only the first MAX_NAMES and the last are listed.
    """
    more = f", ... (the last is {names[-1]})" if len(names) > MAX_NAMES else ""
    return f"classes: {', '.join(names[:MAX_NAMES])}{more}"
