r"""Convert file names that are not UTF-8 to text that can be printed, and back; make the names of answers' files.

On Linux, a file name is a sequence of bytes. Python represents a byte that is not UTF-8, such as Latin-1's e acute
(0xE9), by half of a surrogate pair (U+DCE9). This character cannot be encoded as UTF-8, so it can be neither printed
nor written to a text file. `escape` replaces it by the text \udce9.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from common.machine.console import escape_controls

MAX_NAME_BYTES = 255  # the limit for a file's name, without its folder, on nearly every file system
HASH_DIGITS = 8
_BYTE = re.compile("[\udc80-\udcff]")
_HALVES = re.compile("(\\\\*)(?:([\ud800-\udfff])|(?=ud[89a-f][0-9a-f]{2}))")
_ESCAPES = re.compile(r"(\\+)(ud[89a-f][0-9a-f]{2})")


def escape(name: str) -> str:
    r"""Escape the bytes of `name` that are not UTF-8, so that it can be printed: 0xE9 becomes \udce9, as in JSON.

    Backslashes are doubled directly before such a byte, and before text that already looks like the rest of an escape
    (udce9). `unescape` can therefore restore the name. Any other name is unchanged.
    """

    def replace(match: re.Match[str]) -> str:
        backslashes, half = match.groups()
        return backslashes * 2 + (f"\\u{ord(half):04x}" if half else "")

    return _HALVES.sub(replace, name)


def unescape(text: str) -> str:
    """Restore the name from its escaped form `text`."""

    def replace(match: re.Match[str]) -> str:
        backslashes, code = match.groups()
        half = chr(int(code[1:], 16)) if len(backslashes) % 2 else code
        return "\\" * (len(backslashes) // 2) + half

    return _ESCAPES.sub(replace, text)


def printable(name: str) -> str:
    r"""Escape `name` for a line of a console or a log: as `escape` does, and also control characters (\x1b, \n, \t)."""
    return escape_controls(escape(name)).replace("\n", r"\n").replace("\t", r"\t")


def shell_command(words: Iterable[str]) -> str:
    r"""Quote words for a shell and join them. A word with bytes that are not UTF-8 is quoted for bash: $'runs/\xe9'."""
    return " ".join(_byte_quoted(word) if _BYTE.search(word) else shlex.quote(word) for word in words)


def _byte_quoted(word: str) -> str:
    plain = {*range(32, 127)} - {*b"'\\"}
    return "$'" + "".join(chr(byte) if byte in plain else f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"


def answer_name(name: str, ending: str) -> str:
    """The name of the file for the answer to the input file `name`: `name`, followed by `ending`.

    If that is longer than MAX_NAME_BYTES, `name` is cut, and a hash of the whole `name` is added before `ending`.
    """
    whole, room = name.encode("utf-8", "surrogateescape"), MAX_NAME_BYTES - len(ending.encode())
    if len(whole) > room:
        digits = hashlib.blake2b(whole, digest_size=HASH_DIGITS // 2).hexdigest()
        start = whole[: room - HASH_DIGITS - 1].decode("utf-8", "ignore")
        name = f"{start}-{digits}"
    return name + ending


def answer_file(folder: Path, name: str, ending: str) -> Path:
    """The path of the file in `folder` for the answer to the input file `name`.

    `name` may contain folders: the answer to a/b.jpg lies in the folder a/ of `folder`.
    """
    relative = Path(name)
    return folder / relative.parent / answer_name(relative.name, ending)
