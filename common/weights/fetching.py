"""Find the file that checkpoint= names, and download the files of published weights if they are missing."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

from common.config import published
from common.files import download


class Source(NamedTuple):
    """A checkpoint's file, and its title for the log.

    The title is the path or, for published weights, their name, publisher and licence, followed by the path.
    """

    path: Path
    title: str


def locate(config: dict[str, Any]) -> Source:
    """Return the file that the config's `checkpoint` names, by its path or by the name of published weights.

    Files of published weights are downloaded to a folder in the config's `cache_dir` unless they are there already.
    Such a file is verified if configs/weights.yaml states its hash. Raises UserError when a file cannot be downloaded
    or has another hash, or when `checkpoint` is a word (letters, digits and _) that is neither a path that exists nor a
    name in configs/weights.yaml.
    """
    weights = published.find(config["checkpoint"])
    if weights is None:
        return Source(Path(config["checkpoint"]), config["checkpoint"])
    folder = Path(config["cache_dir"]) / "weights" / weights.name
    for file in weights.files:
        download.fetch(file.address, folder / file.name, file.hash, report=lambda line: print(line, file=sys.stderr))
    path = folder / weights.files[0].name
    return Source(path, f"{weights}, {path}")
