"""List the differences between two configs, and decide whether both describe the same run."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from common.config.migrations import (
    ADDED_CLASS_KEYS,
    ADDED_KEYS,
    CHANGED_CUTS,
    MOVED_CLASSES,
    with_class_keys,
)
from common.errors import UserError

PRECISION = "trainer.precision"
# Keys that say where and how a run is computed, and what it writes. They may change when a run is resumed, because they
# do not change what the model learns. `checkpoint` is among them, because only a new run reads the file that it names.
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
# Keys that hold paths of the data. They may change when a run is resumed, if digests of the data in the checkpoint show
# that the data are the same.
DATA_PATHS = ("data.root", "data.train", "data.val", "data.test", "data.distilled")
# The key of the teacher's file. It may change when a run is resumed, if the digest of the teacher's weights in the
# checkpoint shows that the teacher is the same.
TEACHER_PATH = "task.distillation.teacher"
# Keys that say how val and test are cut from train. When a run is resumed, these keys are not compared. Instead, the
# digests of the resulting splits and the number of train samples are compared. So a run can be resumed even if a later
# version has changed the keys' defaults.
CUT_KEYS = ("data.val_count", "data.test_count", "data.val_share", "data.test_share")
# Keys of migrations.ADDED_KEYS and ADDED_CLASS_KEYS that `fingerprint` always hashes, as earlier versions did.
ALWAYS_HASHED_KEYS = (
    *("optimizer.layer_decay", "optimizer.reference_batch", "optimizer.scaling"),
    *("schedule.start", "schedule.width", "data.pad_to"),
)


def refuse_changes(before: dict[str, Any], after: dict[str, Any], where: str, allowed: Sequence[str] = ()) -> None:
    """Raise UserError, which lists the differences, if a run with the config `before` cannot resume with `after`.

    `where` is the run's folder or checkpoint, for the message. The keys in CHANGEABLE_KEYS, CUT_KEYS and `allowed` may
    differ. `allowed` holds full keys (optimizer.lr) or sections (optimizer).
    """
    changes = differences(before, after, ignore=(*CHANGEABLE_KEYS, *CUT_KEYS, *allowed))
    if changes:
        raise UserError(
            f"{where} belongs to another run: {', '.join(changes)}; resume with the former values, allow the changes "
            "(allow_changes=[key,...]), or start a new run from its weights with another run_dir and checkpoint=FILE."
        )


def differences(before: dict[str, Any], after: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """List the differences between two configs, each as "model.heads was 4 and is 8".

    Keys in `ignore`, and keys of the sections in `ignore`, are left out. The precision `auto` counts as equal to every
    other precision, and a missing key of ADDED_CLASS_KEYS as its value there.
    """
    old, new = flatten(with_class_keys(before)), flatten(with_class_keys(after))
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
    """Return a hash of a config by which a sweep recognises a run's folder, as eight hexadecimal digits.

    Configs of the same run have the same fingerprint: the keys in CHANGEABLE_KEYS, except `checkpoint`, are not hashed.
    The fingerprint also equals the one that earlier versions of Triptych computed, so that a sweep finds the runs that
    were begun with those versions. Therefore:

    - a class that has moved is hashed by its former path;
    - the present default of a key in CHANGED_CUTS is hashed as its former default;
    - a key that was added later is hashed only if its value changes the former behaviour, but a key in
      ALWAYS_HASHED_KEYS is hashed with any value.
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
