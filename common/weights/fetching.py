"""Find the file that checkpoint= names, and download it if this is the name of published weights."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from common.config import published
from common.files import download


class Source(NamedTuple):
    """A checkpoint's file, and its description for the log: published weights have a name, a publisher and a path."""

    path: Path
    title: str


def locate(config: dict[str, Any]) -> Source:
    """The file of the config's `checkpoint`. Files of published weights that are missing in `cache_dir` are downloaded.

    Files that are there are verified, if their publisher states a hash. Raises UserError when a file cannot be
    downloaded or is not the published one.
    """
    weights = published.find(config["checkpoint"])
    if weights is None:
        return Source(Path(config["checkpoint"]), config["checkpoint"])
    folder = Path(config["cache_dir"]) / "weights" / weights.name
    for file in weights.files:
        download.fetch(file.address, folder / file.name, file.hash, report=lambda line: print(line, file=sys.stderr))
    path = folder / weights.files[0].name
    return Source(path, f"{weights}, {path}")
