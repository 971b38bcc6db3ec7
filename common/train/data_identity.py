"""Check that a resumed run reads the data that it was trained on, by digests of each split in its checkpoints."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.config.diff import DATA_PATHS, differences
from common.data.fingerprints import digest
from common.machine import distributed
from common.task import Data, Split
from common.types import SPLITS

Fingerprints = dict[str, dict[str, str]]  # split -> content ("images") -> digest; a split without samples has none


def fingerprints_of(data: Data) -> Fingerprints:
    """The digests of every split. Rank 0 computes them and all ranks receive them, so all ranks must call this."""
    counts = {split: data.count(split) for split in SPLITS}  # on all ranks: loading a split may be a collective
    digests = None
    if distributed.is_main():
        digests = {split: fingerprint_of(data, split) if count else {} for split, count in counts.items()}
    return dict(distributed.broadcast(digests))


def fingerprint_of(data: Data, split: Split) -> dict[str, str]:
    """The digests of a split with samples: the data's `fingerprint`, or if they lack this method a digest of costs."""
    if hasattr(data, "fingerprint"):
        return dict(data.fingerprint(split))
    return {"costs": digest([np.asarray(data.cost(split), dtype="<i8")])}


def changes(before: Fingerprints, now: Fingerprints) -> list[str]:
    """Describe the differences between two fingerprints, such as "the images of train differ".

    Only digests that are in both fingerprints are compared; those of earlier versions' checkpoints may be empty.
    """
    lines = []
    for split in [split for split in SPLITS if split in before]:
        old, new = before[split], now[split]
        if bool(old) != bool(new):
            lines.append(f"{split} had {'samples' if old else 'none'} and has {'samples' if new else 'none'}")
        lines += [f"the {name} of {split} differ" for name in old if name in new and old[name] != new[name]]
    return lines


def recognised_paths(data: Data, content: dict[str, Any]) -> Sequence[str]:
    """Config keys of paths that may change on resuming. There are none if the data cannot be compared by digests."""
    return DATA_PATHS if content.get("fingerprints") and hasattr(data, "fingerprint") else ()


def moved_paths(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the data paths that differ between two configs, such as "data.root was a and is b"."""
    sections = {"data": before.get("data")}, {"data": now.get("data")}
    others = differences(*sections, ignore=DATA_PATHS)
    return [line for line in differences(*sections) if line not in others]
