"""List the differences between two configs, and decide whether both describe the same run."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from common.config.migrations import ADDED_CLASS_KEYS, ADDED_KEYS, CHANGED_CUTS, MOVED_CLASSES
from common.errors import UserError

PRECISION = "trainer.precision"
# Keys for where and how a run is computed and what it writes. None of them changes what a resumed run learns; the
# weights in `checkpoint` are read by a new run only.
CHANGEABLE_KEYS = (
    *("run_dir", "sweep_dir", "resume", "allow_changes", "trust", "check_memory", "checkpoint", "cache_dir"),
    *("trainer.device", "trainer.workers", "trainer.compile", "trainer.micro_batch", "trainer.deterministic"),
    *(
        "trainer.strategy",
        "trainer.timeout",
        "trainer.grace",
        "trainer.log",
        "trainer.log_every",
        "trainer.eval_every",
        "trainer.save_every",
    ),
    *("trainer.keep_best", "trainer.average_last", "task.evaluator"),
)
# Keys for where the data are. A checkpoint holds digests of the data, which identify the same data under other paths.
DATA_PATHS = ("data.root", "data.train", "data.val", "data.test")
# Keys for how val and test are cut from train. Instead of these keys, the resulting splits are compared, by digests or
# counts, so that a run can be resumed although the defaults have changed.
CUT_KEYS = ("data.val_count", "data.test_count", "data.val_share", "data.test_share")
# Keys of migrations.ADDED_KEYS and ADDED_CLASS_KEYS that fingerprints have always included.
ALWAYS_HASHED_KEYS = (
    *("optimizer.layer_decay", "optimizer.reference_batch", "optimizer.scaling"),
    *("schedule.start", "schedule.width", "data.pad_to"),
)


def refuse_changes(before: dict[str, Any], after: dict[str, Any], where: str, allowed: Sequence[str] = ()) -> None:
    """Raise UserError with the list of differences if a run that resumes from `where` would not be the same run.

    CHANGEABLE_KEYS and CUT_KEYS may differ, and so may those in `allowed`: full keys (optimizer.lr) or sections
    (optimizer).
    """
    changes = differences(before, after, ignore=(*CHANGEABLE_KEYS, *CUT_KEYS, *allowed))
    if changes:
        raise UserError(
            f"{where} belongs to another run: {', '.join(changes)}; resume with the former values, allow the changes "
            "(allow_changes=[key,...]), or start a new run from its weights with another run_dir and checkpoint=FILE."
        )


def differences(before: dict[str, Any], after: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """List the differences between two configs, without keys in `ignore`, as "model.heads was 4 and is 8"."""
    old, new = flatten(before), flatten(after)
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key) and not _is_under(key, ignore)]
    # A run stores the precision to which auto resolved; a command with auto resumes with the stored one.
    changed = [key for key in changed if key != PRECISION or "auto" not in (old.get(key), new.get(key))]
    return [f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config to full keys: {"model": {"heads": 4}} becomes {"model.heads": 4}."""
    if not isinstance(config, dict):
        return {prefix: config}
    return {
        k: v for key, value in config.items() for k, v in flatten(value, f"{prefix}.{key}" if prefix else key).items()
    }


def fingerprint(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that are equal for configs of the same run.

    Of CHANGEABLE_KEYS, only `checkpoint` is hashed. A sweep also finds the runs that an earlier version of Triptych
    began: moved classes are hashed by their former names; of the keys for cuts, a present default is hashed as the
    former default; and keys that were added later are hashed only if their values change the former behaviour.
    """
    former_names = {new: old for old, new in MOVED_CLASSES.items()}
    sections = {name: part for name, part in config.items() if isinstance(part, dict)}
    added = {name: ADDED_CLASS_KEYS.get(str(part.get("_target_")), {}) for name, part in sections.items()}
    additions = {key: value for key, value in flatten({**ADDED_KEYS, **added}).items() if key not in ALWAYS_HASHED_KEYS}
    keys = flatten(config)
    for name, part in sections.items():
        for key, (present, former) in CHANGED_CUTS.get(str(part.get("_target_")), {}).items():
            if part.get(key, former) == present:
                keys[f"{name}.{key}"] = former
    hashed = {key: value for key, value in keys.items() if key not in additions or additions[key] != value}
    hashed = {key: value for key, value in hashed.items() if key == "checkpoint" or not _is_under(key, CHANGEABLE_KEYS)}
    hashed = {
        key: former_names.get(value, value) if key.endswith("_target_") else value for key, value in hashed.items()
    }
    return hashlib.blake2b(json.dumps(hashed, sort_keys=True).encode(), digest_size=4).hexdigest()


def _is_under(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
