"""Find the file that checkpoint= names; the files of published weights are downloaded if they are missing."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from common.config import published
from common.files import download


class Source(NamedTuple):
    """A checkpoint's file and its title for the log: the path, after name and publisher for published weights."""

    path: Path
    title: str


def locate(config: dict[str, Any]) -> Source:
    """The file of the config's `checkpoint`. Files of published weights that are missing in `cache_dir` are downloaded.

    Every file whose publisher states a hash is verified. Raises UserError when a file cannot be downloaded or is not
    the published one.
    """
    weights = published.find(config["checkpoint"])
    if weights is None:
        return Source(Path(config["checkpoint"]), config["checkpoint"])
    folder = Path(config["cache_dir"]) / "weights" / weights.name
    for file in weights.files:
        download.fetch(file.address, folder / file.name, file.hash, report=lambda line: print(line, file=sys.stderr))
    path = folder / weights.files[0].name
    return Source(path, f"{weights}, {path}")
