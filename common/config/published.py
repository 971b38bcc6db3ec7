"""The table of published weights in configs/weights.yaml.

checkpoint=NAME selects the entry of this name. An entry states the files to download, and the values of config keys
that the weights need.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from common.config.check import did_you_mean
from common.errors import UserError

TABLE = Path(__file__).resolve().parents[2] / "configs" / "weights.yaml"


class PublishedFile(NamedTuple):
    """The URL of a file, and its SHA-256 in hexadecimal.

    `hash` holds all 64 digits or only the first few. It is None if the publisher states no SHA-256.
    """

    address: str
    hash: str | None

    @property
    def name(self) -> str:
        """The file's name, which is the last part of its address."""
        return self.address.rpartition("/")[2]


class Published(NamedTuple):
    """One entry of the table.

    The first of `files` holds the weights. The other files, such as a tokenizer, must lie in the same folder.
    """

    name: str
    publisher: str
    licence: str
    files: list[PublishedFile]
    model: str  # the name of the model's config in configs/model/
    constants: dict[str, Any]  # full config key (data.mean) -> the value that the weights need; the files lack it

    def __str__(self) -> str:
        """The name, the publisher and the licence, for the log."""
        return f"{self.name} of {self.publisher} ({self.licence})"


def find(checkpoint: str) -> Published | None:
    """The published weights named `checkpoint`; None if `checkpoint` is a path.

    A name that is also an existing path counts as a path. Raises UserError for a word (letters, digits and _) that is
    neither a name in the table nor an existing path.
    """
    if os.path.exists(os.path.expanduser(checkpoint)) or not _is_name(checkpoint):
        return None
    table = _table()
    if checkpoint not in table:
        reason = f"checkpoint={checkpoint}: there is no such file, and no published weights have this name"
        raise UserError(reason + did_you_mean(checkpoint, table))
    return table[checkpoint]


def implied(
    weights: Published, typed: set[str], compose: Callable[[list[str]], dict[str, Any]]
) -> tuple[list[str], list[str]]:
    """Return the overrides of config keys that `weights` imply, and a list of at most one line for the log about them.

    The overrides choose the model and set the constants of `weights`. `typed` are the keys on the command line, which
    are not overridden. `compose` takes additional overrides, and returns the resulting config as a dict from full keys
    to values. A constant is left out if the config lacks its key, for instance because the data set is of another kind.

    With experiment= on the command line, nothing is overridden, because the experiment determines the config. The line
    then names the constants that have another value in this config.
    """
    model = [] if {"model", "experiment"} & typed else [f"model={weights.model}"]
    config = compose(model)
    constants = {key: value for key, value in weights.constants.items() if key in config and key not in typed}
    if "experiment" in typed:
        differing = " ".join(f"{key}={value}" for key, value in constants.items() if config[key] != value)
        line = f"checkpoint={weights.name} was published with other values than the experiment has: {differing}"
        return [], [line] if differing else []
    overrides = model + [f"{key}={value}" for key, value in constants.items()]
    return overrides, [f"checkpoint={weights.name} sets {' '.join(overrides)}"] if overrides else []


def hidden_by_a_path(checkpoint: str) -> str | None:
    """A line for the log if an existing path has the name of published weights; None otherwise."""
    if not _is_name(checkpoint) or not Path(checkpoint).exists() or checkpoint not in _table():
        return None
    kind = "folder" if Path(checkpoint).is_dir() else "file"
    return (
        f"checkpoint={checkpoint} is the {kind} {Path(checkpoint).absolute()}, and not the published weights of this "
        "name; rename it to get those."
    )


def _is_name(checkpoint: str) -> bool:
    return re.fullmatch(r"\w+", checkpoint) is not None


def _table() -> dict[str, Published]:
    content = OmegaConf.to_container(OmegaConf.load(TABLE))
    assert isinstance(content, dict)
    return {
        str(name): Published(str(name), **{**entry, "files": [PublishedFile(**file) for file in entry["files"]]})
        for name, entry in content.items()
    }
