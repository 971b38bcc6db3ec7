"""Configs that earlier versions wrote, in checkpoints and in runs' folders, brought to the keys of today.

A version is told by what it lacks. What is no key here is missing in earnest, and `check` says so.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# Keys that came later, with the value that means what was done before; that need not be the default of today.
LATER: dict[str, Any] = {
    # since 815d244
    "optimizer.layer_decay": 1.0,  # all layers learnt alike
    "optimizer.reference_batch": None,  # the rate was taken as it stood
    "optimizer.scaling": "linear",
    "schedule.start": 0.0,  # where every warm-up began
    # since c9a2c30
    "schedule.width": None,  # there was no noam, which alone reads it
    "trainer.average_last": 0,
    # since 29cf9d9
    "sweep_dir": None,
    "allow_changes": [],
    # since 45c9322
    "trainer.deterministic": False,
    "trainer.strategy": "ddp",  # its sums of gradients, if not yet its name
    "trainer.timeout": 600,  # NCCL's own; gloo waited for 1800
    "trainer.keep_best": 1,
}

# The same for the keys of one class.
GROWN: dict[str, dict[str, Any]] = {
    # since f6968e9
    "detr.task.Detection": {"evaluator": "pycocotools"},
    "detr.coco.Coco": {"pad_to": 1},
}

# Classes that went into another one, and the keys that make it do the same.
MOVED: dict[str, dict[str, Any]] = {
    # until b5af571
    "vit.downloads.Cifar10": {"_target_": "vit.downloads.Downloaded", "name": "cifar10"},
    "vit.downloads.FashionMnist": {"_target_": "vit.downloads.Downloaded", "name": "fashion_mnist"},
}


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a whole config in which later keys have the value that means what was done before they came."""
    config = deepcopy(config)
    for key, value in LATER.items():
        section, _, name = key.rpartition(".")
        outside = config if "resume" in config else None  # train.py's; other doors have none of these keys
        place = config.get(section) if section else outside
        if isinstance(place, dict):
            place.setdefault(name, deepcopy(value))
    for section in config.values():
        if isinstance(section, dict):
            target = str(section.get("_target_"))
            section.update(MOVED.get(target, {}))
            for name, value in GROWN.get(target, {}).items():
                section.setdefault(name, deepcopy(value))
    return config


def completed(file: Path) -> dict[str, Any] | None:
    """What a run's config.yaml of an earlier version means today; None when the file can be taken as it is.

    A file with a defaults list is a user's own and lacks nothing by age; one that cannot be read is left to Hydra,
    which says why.
    """
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return None
    if not isinstance(config, dict) or "defaults" in config:
        return None
    today = complete({str(key): value for key, value in config.items()})
    return None if today == config else today
