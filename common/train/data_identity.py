"""Whether a resumed run reads the data that it was trained on: digests of each split, kept in its checkpoints."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.config.diff import DATA_PATHS, differences
from common.data.fingerprints import digest
from common.machine import distributed
from common.task import Data, Split
from common.types import SPLITS

Fingerprints = dict[str, dict[str, str]]  # digests by split and by what they are of; empty for a split without samples


def fingerprints_of(data: Data) -> Fingerprints:
    """Digests of what the splits of the data hold (a collective: rank 0 computes them, once)."""
    counts = {split: data.count(split) for split in SPLITS}  # on all ranks, which may load a split together
    digests = None
    if distributed.is_main():
        digests = {split: _fingerprint(data, split) if count else {} for split, count in counts.items()}
    return dict(distributed.broadcast(digests))


def _fingerprint(data: Data, split: Split) -> dict[str, str]:
    if hasattr(data, "fingerprint"):
        return dict(data.fingerprint(split))
    return {"costs": digest([np.asarray(data.cost(split), dtype="<i8")])}


def changes(before: Fingerprints, now: Fingerprints) -> list[str]:
    """What differs between two fingerprints: "the images of train differ".

    Only digests that both have are compared: a checkpoint of an earlier version has none.
    """
    lines = []
    for split in [split for split in SPLITS if split in before]:
        old, new = before[split], now[split]
        if bool(old) != bool(new):
            lines.append(f"{split} had {'samples' if old else 'none'} and has {'samples' if new else 'none'}")
        lines += [f"the {name} of {split} differ" for name in old if name in new and old[name] != new[name]]
    return lines


def recognised_paths(data: Data, content: dict[str, Any]) -> Sequence[str]:
    """The keys of paths that may differ from a checkpoint's, since its digests say whether the data do."""
    return DATA_PATHS if content.get("fingerprints") and hasattr(data, "fingerprint") else ()


def moved_paths(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The paths of the data that differ between two configs, as "data.root was a and is b"."""
    sections = {"data": before.get("data")}, {"data": now.get("data")}
    others = differences(*sections, ignore=DATA_PATHS)
    return [line for line in differences(*sections) if line not in others]
