"""The table of published weights, configs/weights.yaml: what checkpoint=NAME reads, and the keys that NAME implies."""

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
    """A file's address and its SHA-256 in hexadecimal: all digits, the first ones, or None if it is unknown."""

    address: str
    hash: str | None

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.address.rpartition("/")[2]


class Published(NamedTuple):
    """One entry of the table. The first file holds the weights; the others are needed beside it, such as tokenizers."""

    name: str
    publisher: str
    licence: str
    files: list[PublishedFile]
    model: str  # a choice of the group model
    constants: dict[str, Any]  # full keys and values that the weights need and the files do not hold

    def __str__(self) -> str:
        """The name, the publisher and the licence, for the log."""
        return f"{self.name} of {self.publisher} ({self.licence})"


def find(checkpoint: str) -> Published | None:
    """The published weights that checkpoint=`checkpoint` names; None if it is a path, which takes precedence.

    Raises UserError for a bare word that is neither a name nor an existing path.
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
    """The overrides that `weights` imply, and lines for the log about them.

    Keys that are `typed` on the command line are not overridden. `compose` returns the flat config for additional
    overrides. A constant whose key the config lacks is left out: a data set of another kind, for instance, has other
    keys. An experiment sets all constants itself, so none is overridden; a line names the constants that differ.
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
