"""Read YAML files, including those of untrusted origin.

A mistake in a file is reported in one sentence. A file that would fill the memory by nested aliases is refused.
"""

import errno
import io
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError

MAX_NODES = 100_000  # far more than any config has; with aliases of aliases, a file of a few lines can have 10^9 nodes
ERRORS = (RecursionError, ValueError, yaml.YAMLError, OmegaConfBaseException)
_TOO_MANY_DIGITS = "set_int_max_str_digits"  # in Python's message about an integer of too many digits


def read_yaml(file: Path, remedy: str, *, resolve: bool = False) -> Any:
    """The content of a file in plain types; raises UserError, which ends with `remedy`, if the file cannot be read.

    With `resolve`, interpolations are replaced by their values.
    """
    try:
        if file.exists() and not file.is_file():
            raise OSError(errno.EINVAL, "it is no regular file")
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if _count(root, {}) > MAX_NODES:
            raise UserError(f"{file} has more than {MAX_NODES:,} entries, repeated by aliases; {remedy}.")
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=resolve)
    except (OSError, *ERRORS) as error:
        raise UserError(f"{file} cannot be read ({describe(error)}); {remedy}.") from error


def is_about_text(error: Exception) -> bool:
    """Whether an error means that a text cannot be parsed as YAML. Other errors concern keys or values in the text."""
    return isinstance(error, RecursionError | UnicodeError | yaml.YAMLError) or _TOO_MANY_DIGITS in str(error)


def describe(error: Exception) -> str:
    """Describe why YAML cannot be read, in a few words without a full stop.

    The description names the file, the line and the column if the error states them.
    """
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        where = "" if mark.name.startswith("<") else f"{mark.name}, "
        return f"{where}line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if _TOO_MANY_DIGITS in str(error):
        return "a number has too many digits"
    return str(error).partition("\n")[0].rstrip(".")


def _count(node: yaml.Node | None, counts: dict[int, int]) -> int:
    """The number of nodes in the tree whose root is `node`. An alias counts as a copy of the tree that it refers to.

    `counts` maps the id of the root of each tree that was counted before to the tree's number of nodes.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = MAX_NODES + 1  # a node that contains itself thus exceeds the limit
        children = [child for pair in node.value for child in (pair if isinstance(pair, tuple) else (pair,))]
        counts[id(node)] = 1 + sum(_count(child, counts) for child in children)
    return counts[id(node)]
