"""Paths in a config: which keys hold a path, and how to quote a path so that Hydra reads it exactly as typed."""

import os
import re
from typing import Any

from common.config import published
from common.config.describe import shorten
from common.config.plain_text import as_plain_text
from common.errors import UserError
from common.types import SPLITS

PATH_KEYS = (
    *("run_dir", "checkpoint", "input", "output"),
    *("root", "images", "annotations", "weights", "teacher", "distilled"),
)
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # limits of Linux


def is_path(key: str) -> bool:
    """Whether a full key, such as data.root, holds a path. The key alone decides, not its value."""
    *above, last = key.split(".")
    in_split = bool(above) and above[-1] in SPLITS  # data.train.source=FILE is a path, data.source=en is not
    return in_split or last in (*PATH_KEYS, *SPLITS) or last.endswith(("_dir", "_file", "_path", "_root", "_folder"))


def quote_path(argument: str, sweep: bool = False) -> str:
    """Quote the value of key=value if it is a path, so that Hydra reads a name such as `x=1, photo (2).jpg` unchanged.

    In a sweep, a comma separates paths: `a.pth,b.pth` is two paths, and `null,a.pth` is null and a path. But a comma
    before a space is part of a path. The whole value is one path if a file or folder of that name exists, if the value
    begins with [, or if the key is sweep_dir.

    If the value of checkpoint= is a run's folder, it is replaced by the path of checkpoints/best.pt in this folder.
    Raises UserError if the value of checkpoint= is any other folder, or if a path is longer than Linux permits.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    last = name.rpartition(".")[2]
    is_hydra = value in ("", "null", "???") or re.fullmatch(r"'.*'|\".*\"|choice\(.*\)", value)
    is_mapping = last in SPLITS and value.startswith("{")  # data.train={images:a,annotations:b}
    is_number = last not in (*PATH_KEYS, *SPLITS) and re.fullmatch(r"[-+.,\deE]+", value)  # drop_path=0.1,0.2
    needs_quotes = equals and is_path(name) and not (is_hydra or is_mapping or is_number)
    if not needs_quotes:
        return argument
    is_one = not sweep or name == "sweep_dir" or value.startswith("[") or os.path.exists(os.path.expanduser(value))
    paths = [value] if is_one else re.split(r",(?! )", value)
    if name == "checkpoint":
        paths = [_file_of_checkpoint(path) for path in paths]
    return f"{key}={','.join('null' if path == 'null' else quoted(_usable(path, name)) for path in paths)}"


def quoted(text: str) -> str:
    """Put text in Hydra's single quotes so that Hydra reads it unchanged, without interpolation."""
    return in_quotes(as_plain_text(text))


def in_quotes(text: str) -> str:
    """Put text in Hydra's single quotes; interpolations in it still work.

    Hydra treats a backslash as special only before a quote, so backslashes are doubled only there and at the end.
    """
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), text) + "'"


def expand_paths(value: Any, key: str = "") -> Any:
    """Expand `~` in the paths of a nested config; raises UserError for a path that is longer than Linux permits.

    Lists are not searched for paths. `key` is for recursive calls only. It is the full key of `value`, with a dot
    before it.
    """
    if isinstance(value, dict):
        return {name: expand_paths(item, f"{key}.{name}") for name, item in value.items()}
    return os.path.expanduser(_usable(value, key[1:])) if isinstance(value, str) and is_path(key) else value


def _file_of_checkpoint(path: str) -> str:
    """Return the path of checkpoints/best.pt in the run's folder `path`.

    If `path` is not a folder, it is returned unchanged. Raises UserError if the folder does not hold this file.
    """
    if not os.path.isdir(os.path.expanduser(path)):
        return path
    best = os.path.join(path, "checkpoints", "best.pt")
    if not os.path.isfile(os.path.expanduser(best)):
        hidden = published.hidden_by_a_path(path)
        raise UserError(
            f"checkpoint={path}: the folder holds no checkpoints/best.pt; give a run's folder, or a file."
            + (f" {hidden}" if hidden else "")
        )
    return best


def _usable(path: str, key: str) -> str:
    """Return `path`; raises UserError, which names `key`, if the path or a name in it is longer than Linux permits."""
    if max(map(len, os.fsencode(path).split(b"/"))) > MAX_NAME_BYTES or len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise UserError(
            f"{key}={shorten(path)}: no file system has such a path; a name in it has at most {MAX_NAME_BYTES} bytes, "
            f"and the path {MAX_PATH_BYTES}."
        )
    return path
