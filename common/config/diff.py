"""What differs between two configs, and what of that makes another run."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from common.config.migrations import ADDED_CLASS_KEYS, ADDED_KEYS, MOVED_CLASSES
from common.errors import UserError

PRECISION = "trainer.precision"
# Where and how a run is done, and what it writes: none of it changes what is learnt.
CHANGEABLE_KEYS = (
    *("run_dir", "sweep_dir", "resume", "allow_changes", "trust", "checkpoint"),
    *("trainer.device", "trainer.workers", "trainer.compile", "trainer.micro_batch", "trainer.deterministic"),
    *("trainer.strategy", "trainer.timeout", "trainer.log_every", "trainer.eval_every", "trainer.save_every"),
    *("trainer.keep_best", "trainer.average_last", "task.evaluator"),
)
# Keys of the tables of migrations that a fingerprint has counted since there are fingerprints.
ALWAYS_HASHED_KEYS = (
    *("optimizer.layer_decay", "optimizer.reference_batch", "optimizer.scaling"),
    *("schedule.start", "schedule.width", "data.pad_to"),
)


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: str, allowed: Sequence[str] = ()) -> None:
    """Raise UserError when going on from `where` would not be the same run, with the list of differences.

    Keys in CHANGEABLE_KEYS may differ, and those in `allowed`: whole keys (optimizer.lr), or sections (optimizer).
    """
    changed = differences(before, now, ignore=(*CHANGEABLE_KEYS, *allowed))
    if changed:
        raise UserError(
            f"{where} is of another run than this one would be: {', '.join(changed)}; go on with what was, allow what "
            "you mean (allow_changes=[key,...]), or start a new run from its weights with another run_dir and "
            "checkpoint=FILE."
        )


def differences(before: dict[str, Any], now: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """The differences between two configs outside the keys in `ignore`, as "model.heads was 4 and is 8"."""
    old, new = flatten(before), flatten(now)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and not _under(key, ignore)]
    # A run keeps what auto came to; asked for again, it is that.
    changed = [key for key in changed if key != PRECISION or "auto" not in (old.get(key), new.get(key))]
    return [f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested config by full keys: {"model": {"heads": 4}} is {"model.heads": 4}."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        k: v for key, value in config.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }


def fingerprint(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that are equal for configs of the same run.

    Of CHANGEABLE_KEYS only `checkpoint` is hashed. A sweep of an earlier version finds its runs again: classes are
    hashed by their former names, and a key that was added later only if its value changes the former behaviour.
    """
    former = {new: old for old, new in MOVED_CLASSES.items()}
    sections = {name: part for name, part in config.items() if isinstance(part, dict)}
    grown = {name: ADDED_CLASS_KEYS.get(str(part.get("_target_")), {}) for name, part in sections.items()}
    later = {key: value for key, value in flatten({**ADDED_KEYS, **grown}).items() if key not in ALWAYS_HASHED_KEYS}
    counts = {key: value for key, value in flatten(config).items() if key not in later or later[key] != value}
    counts = {key: value for key, value in counts.items() if key == "checkpoint" or not _under(key, CHANGEABLE_KEYS)}
    counts = {key: former.get(value, value) if key.endswith("_target_") else value for key, value in counts.items()}
    return hashlib.blake2b(json.dumps(counts, sort_keys=True).encode(), digest_size=4).hexdigest()


def _under(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
