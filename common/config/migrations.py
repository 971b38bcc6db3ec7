"""Configs that earlier versions wrote, in checkpoints and in runs' folders, brought to the keys of today.

A version is recognised by missing keys. A missing key that no table holds is reported by `check`.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

# Keys that came later, with the value that means what was done before; that need not be the default of today.
ADDED_KEYS: dict[str, Any] = {
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

# Keys that nested options got later, by the section's name and the keys that it had before, for users' classes, too.
ADDED_NESTED_KEYS: dict[str, tuple[set[str], dict[str, Any]]] = {
    # after 4f99cde
    "loss": (
        {"class_weight", "box_weight", "giou_weight", "no_object"},
        {"classification": "softmax", "focal_alpha": 0.25, "focal_gamma": 2.0},  # the last two are not read by softmax
    ),
}

# The same for the keys of one class, by its present name; nested ones with dots.
ADDED_CLASS_KEYS: dict[str, dict[str, Any]] = {
    # since f6968e9
    "detr.tasks.detection.Detection": {
        "evaluator": "pycocotools",
        **{f"loss.{key}": value for key, value in ADDED_NESTED_KEYS["loss"][1].items()},
    },
    "detr.data.coco.Coco": {"pad_to": 1, "exif": "auto"},
}

# Classes that went into another one, and the keys that make it do the same.
MERGED_CLASSES: dict[str, dict[str, Any]] = {
    # until b5af571
    "vit.downloads.Cifar10": {"_target_": "vit.downloads.Downloaded", "name": "cifar10"},
    "vit.downloads.FashionMnist": {"_target_": "vit.downloads.Downloaded", "name": "fashion_mnist"},
}

# Classes that have moved: where they were until 4f99cde, and where they are.
MOVED_CLASSES: dict[str, str] = {
    "detr.task.Detection": "detr.tasks.detection.Detection",
    "detr.detector.Detector": "detr.models.detector.Detector",
    "detr.coco.Coco": "detr.data.coco.Coco",
    "detr.shapes.Shapes": "detr.data.shapes.Shapes",
    "vit.task.Classification": "vit.tasks.classification.Classification",
    "vit.classifier.Classifier": "vit.models.classifier.Classifier",
    "vit.digits.Digits": "vit.data.digits.Digits",
    "vit.downloads.Downloaded": "vit.data.downloads.Downloaded",
    "vit.folder.ImageFolder": "vit.data.folder.ImageFolder",
    "seq2seq.task.Translation": "seq2seq.tasks.translation.Translation",
    "seq2seq.transformer.Transformer": "seq2seq.models.transformer.Transformer",
    "seq2seq.cldr.Cldr": "seq2seq.data.cldr.dataset.Cldr",
    "seq2seq.multi30k.Multi30k": "seq2seq.data.multi30k.Multi30k",
    "seq2seq.parallel_text.ParallelText": "seq2seq.data.parallel_text.ParallelText",
}


# Tensors that were renamed: the model's present class, then the former first words of a name and the present ones.
RENAMED_TENSORS: dict[str, dict[str, str]] = {}


def update_names(config: dict[str, Any]) -> list[str]:
    """Replace, in place, each `_target_` that has moved and each renamed prefix of optimizer.rates; a line for each."""
    notices = []
    for key, section in config.items():
        if isinstance(section, dict):
            _grow_nested(section)
        if isinstance(section, dict) and (former := str(section.get("_target_"))) in MOVED_CLASSES:
            section["_target_"] = MOVED_CLASSES[former]
            _grow(section)
            notices.append(f"{key}._target_={former} is now {MOVED_CLASSES[former]}; please write that in your yaml.")
    rates = (config.get("optimizer") or {}).get("rates")
    if rates and (present := _renamed(rates, _renames(config))) != rates:
        config["optimizer"]["rates"] = present
        notices.append(f"optimizer.rates: {', '.join(rates)} are now {', '.join(present)}; please write that.")
    return notices


def migrate_config(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a whole config in which later keys have the value that means what was done before they came."""
    config = deepcopy(config)
    for key, value in ADDED_KEYS.items():
        section, _, name = key.rpartition(".")
        outside = config if "resume" in config else None  # train.py's; other doors have none of these keys
        keys = config.get(section) if section else outside
        if isinstance(keys, dict):
            keys.setdefault(name, deepcopy(value))
    for section in config.values():
        if isinstance(section, dict):
            section.update(MERGED_CLASSES.get(str(section.get("_target_")), {}))
    update_names(config)
    for section in config.values():
        if isinstance(section, dict):
            _grow(section)
    return config


def _grow(section: dict[str, Any]) -> None:
    """Give a section, in place, the keys that its class has grown."""
    for key, value in ADDED_CLASS_KEYS.get(str(section.get("_target_")), {}).items():
        *outer, name = key.split(".")
        inner: Any = section
        for part in outer:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.setdefault(name, deepcopy(value))


def _grow_nested(section: dict[str, Any]) -> None:
    """Give nested options, in place, the keys that they have got since they had just those of before."""
    for name, (before, later) in ADDED_NESTED_KEYS.items():
        if isinstance(section.get(name), dict) and section[name].keys() == before:
            section[name].update(later)


def migrate_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of an earlier version as today's would be: its config, and the names of its tensors.

    Renamed are the tensors of the weights, of their average and of the optimizer's state.
    """
    config = migrate_config(content["config"])
    names = _renames(config)
    content = {**content, "config": config}
    for part in ("model", "optimizer"):
        if content.get(part):
            content[part] = _renamed(content[part], names)
    if content.get("average"):
        content["average"] = {**content["average"], "weights": _renamed(content["average"]["weights"], names)}
    return content


def _renames(config: dict[str, Any]) -> dict[str, str]:
    return RENAMED_TENSORS.get(str((config.get("model") or {}).get("_target_")), {})


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The same values by the present names of tensors."""

    def present(name: str) -> str:
        former = next((old for old in names if name == old or name.startswith(f"{old}.")), None)
        return name if former is None else names[former] + name.removeprefix(former)

    return {present(name): value for name, value in values.items()}


def migrate_config_file(file: Path) -> dict[str, Any] | None:
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
    today = migrate_config({str(key): value for key, value in config.items()})
    return None if today == config else today
