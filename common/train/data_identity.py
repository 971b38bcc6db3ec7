"""Check that a resumed run has the same data and teacher as before: its checkpoints hold digests of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.config.diff import DATA_PATHS, TEACHER_PATH, differences
from common.data.fingerprints import digest
from common.machine import distributed
from common.task import Data, Split
from common.types import SPLITS

Fingerprints = dict[str, dict[str, str]]  # {split: {"images": digest, ...}}; {} for a split without samples


def fingerprints_of(data: Data) -> Fingerprints:
    """Return the digests of every split. This is a collective: rank 0 computes them, and all ranks receive them."""
    counts = {split: data.count(split) for split in SPLITS}  # called on all ranks, because it may be a collective
    digests = None
    if distributed.is_main():
        digests = {split: fingerprint_of(data, split) if count else {} for split, count in counts.items()}
    return dict(distributed.broadcast(digests))


def fingerprint_of(data: Data, split: Split) -> dict[str, str]:
    """Return the digests of a split that has samples.

    They are those of `data.fingerprint`. If `data` has no such method, there is one digest, of the samples' costs.
    """
    if hasattr(data, "fingerprint"):
        return dict(data.fingerprint(split))
    return {"costs": digest([np.asarray(data.cost(split), dtype="<i8")])}


def changes(before: Fingerprints, now: Fingerprints) -> list[str]:
    """Describe the differences between the digests `before` and `now`, such as "the images of train differ".

    A digest is compared only if it is in both, because checkpoints of earlier versions may lack some. It is also a
    difference if a split has samples in only one of the two.
    """
    lines = []
    for split in [split for split in SPLITS if split in before]:
        old, new = before[split], now[split]
        if bool(old) != bool(new):
            lines.append(f"{split} had {'samples' if old else 'none'} and has {'samples' if new else 'none'}")
        lines += [f"the {name} of {split} differ" for name in old if name in new and old[name] != new[name]]
    return lines


def recognised_paths(data: Data, content: dict[str, Any]) -> Sequence[str]:
    """Return the config keys of paths that may change on resuming, because digests identify what they name.

    These are the data paths, unless the checkpoint's `content` holds no digests or `data` has no method `fingerprint`,
    and the path of the teacher, if the content holds the digest of a teacher.
    """
    paths = DATA_PATHS if content.get("fingerprints") and hasattr(data, "fingerprint") else ()
    return (*paths, TEACHER_PATH) if content.get("teacher") else paths


def moved_paths(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the data paths that differ between two configs, such as "data.root was a and is b"."""
    sections = {"data": before.get("data")}, {"data": now.get("data")}
    others = differences(*sections, ignore=DATA_PATHS)
    return [line for line in differences(*sections) if line not in others]
