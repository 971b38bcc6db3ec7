"""Migrate the configs and checkpoints of earlier versions to the present keys, classes and tensor names.

If a config lacks a key that was added later (ADDED_KEYS, ADDED_NESTED_KEYS and ADDED_CLASS_KEYS), the key is added with
the value that keeps the former behaviour. `common.config.check.check` reports a required key that is still missing.
"""

from copy import deepcopy
from typing import Any

# Keys that were added, with the value that keeps the former behaviour. The present default may differ. The comment
# above a group of keys names the commit that added them, and the comment beside a key explains its value.
ADDED_KEYS: dict[str, Any] = {
    # since 815d244
    "optimizer.layer_decay": 1.0,  # every layer had the same learning rate
    "optimizer.reference_batch": None,  # the learning rate was not scaled with the batch size
    "optimizer.scaling": "linear",
    "schedule.start": 0.0,  # every warm-up began at 0
    # since c9a2c30
    "schedule.width": None,  # only the schedule noam, added in the same commit, reads it
    "trainer.average_last": 0,
    # since 29cf9d9
    "sweep_dir": None,
    "allow_changes": [],
    # since 45c9322
    "trainer.deterministic": False,
    "trainer.strategy": "ddp",  # gradients were summed over the processes, as DDP does
    "trainer.timeout": 600,  # NCCL's default in seconds; with gloo, it was 1800
    "trainer.keep_best": 1,
    # since bee73f8
    "check_memory": True,  # an exception: earlier versions built models too large for the memory; now they are refused
    # since 34a3be7
    "trainer.grace": None,  # after a signal, the step was always finished
    # since e600891
    "cache_dir": "${oc.env:TRIPTYCH_CACHE,${oc.env:XDG_CACHE_HOME,'~/.cache'}/triptych}",
    # since febf8c0
    "trainer.eval_samples": None,  # every evaluation used the whole split
    # since 32a6ea9
    "trainer.patience": None,  # every run took all its steps
    # since fb95e29
    "trainer.log": ["tensorboard"],  # only TensorBoard showed runs
    # since 9db651b
    "trainer.sparsity": None,  # no weight was set to zero
}

# Keys that were added to nested options: name of the options -> (all their former keys, added keys with values). Unlike
# ADDED_CLASS_KEYS, they are also added in the sections of a user's own classes.
ADDED_NESTED_KEYS: dict[str, tuple[set[str], dict[str, Any]]] = {
    # after 4f99cde
    "loss": (
        {"class_weight", "box_weight", "giou_weight", "no_object"},
        {"classification": "softmax", "focal_alpha": 0.25, "focal_gamma": 2.0},  # softmax does not read the last two
    ),
}

NO_DETECTION_TEACHER = {"teacher": None, "kind": "soft", "weight": 0.5, "temperature": 1.0, "min_score": 0.5}

# Keys that were added to one class: present path of the class -> added keys (nested ones with dots) and values.
ADDED_CLASS_KEYS: dict[str, dict[str, Any]] = {
    # since f6968e9
    "detr.tasks.detection.Detection": {
        "evaluator": "pycocotools",
        **{f"loss.{key}": value for key, value in ADDED_NESTED_KEYS["loss"][1].items()},
        "predict.nms": None,  # no box was suppressed
        "predict.detections_per_image": None,  # each query gave one detection
        "predict.attention": False,  # no attention was drawn
        # after bbb4d1c
        "masks": False,  # there were no masks, so the next keys had no effect
        "loss.mask_weight": 1.0,
        "loss.dice_weight": 1.0,
        "predict.panoptic_threshold": 0.85,
        # after 38cfbe8
        "predict.panoptic_rule": "detr",  # the only rule there was
        # after 9fc2cc0
        "distillation": NO_DETECTION_TEACHER,
    },
    # after 9fc2cc0
    "detr.tasks.denoising.DenoisingDetection": {"distillation": NO_DETECTION_TEACHER},
    "detr.models.detector.Detector": {"masks": False, "frozen": False},
    "detr.data.coco.Coco": {"pad_to": 1, "exif": "auto", "val_share": None, "test_share": 0.0},
    # after bbb4d1c
    "detr.data.shapes.Shapes": {"stuff": False},
    "vit.data.folder.ImageFolder": {
        **{"exif": "auto", "class_order": "string", "val_share": None, "test_share": 0.0},
        "cache": False,
    },
    # after 38cfbe8
    "vit.data.downloads.Downloaded": {"reduction": 1},
    "vit.tasks.classification.Classification": {
        "distillation": {"teacher": None, "kind": "hard", "weight": 0.5, "temperature": 1.0},  # there was no teacher
    },
    "vit.models.classifier.Classifier": {"distillation_token": False},
    "seq2seq.data.parallel_text.ParallelText": {
        **{"root": None, "val_share": None, "test_share": None},
        # after 9fc2cc0
        "distilled": None,  # train was the data's own
    },
    # after 9fc2cc0
    "seq2seq.data.cldr.dataset.Cldr": {"distilled": None},
    "seq2seq.data.multi30k.Multi30k": {"distilled": None},
    # after ddbbe75
    "seq2seq.tasks.translation.Translation": {
        "loss.simcut": {"weight": 0.0, "cutoff": 0.05},  # the loss was the cross-entropy alone
        "distillation": {"teacher": None, "kind": "soft", "weight": 0.5, "temperature": 1.0},
    },
}

# Keys that say how val and test are cut from train, and whose defaults have changed:
# present path of the class -> key -> (present default, former default).
CHANGED_CUTS: dict[str, dict[str, tuple[Any, Any]]] = {
    # since 2120fd6
    "detr.data.coco.Coco": {"val_count": (None, 2000), "test_share": (0.1, 0.0)},
    # since bd0452c
    "vit.data.folder.ImageFolder": {"val_count": (None, 10_000), "test_share": (0.1, 0.0)},
    "seq2seq.data.parallel_text.ParallelText": {"val_count": (None, 1000), "test_count": (None, 1000)},
}

# Classes that were merged into another class: former path -> the keys that keep the former behaviour.
MERGED_CLASSES: dict[str, dict[str, Any]] = {
    # until b5af571
    "vit.downloads.Cifar10": {"_target_": "vit.downloads.Downloaded", "name": "cifar10"},
    "vit.downloads.FashionMnist": {"_target_": "vit.downloads.Downloaded", "name": "fashion_mnist"},
}

# Classes that moved after 4f99cde: former path -> present path.
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

# Values that were renamed: full key -> {former value: present value}, in the sections of all classes.
RENAMED_VALUES: dict[str, dict[str, str]] = {
    # after 3ecfd32
    "task.evaluator": {"faster_coco_eval": "auto"},  # hotcoco replaced it, but may not be installed; the same numbers
}

# Tensors that were renamed: present path of the model's class -> {former prefix of names: present prefix}.
RENAMED_TENSORS: dict[str, dict[str, str]] = {}


def update_names(config: dict[str, Any]) -> list[str]:
    """Replace the former paths of moved classes, renamed values and former names in optimizer.rates, in place.

    Also adds missing keys of ADDED_NESTED_KEYS, and in the section of a moved class missing keys of ADDED_CLASS_KEYS.
    Returns a notice for each class that has moved and each value that was renamed, and one for all renamed tensors.
    """
    notices = []
    for key, section in config.items():
        if isinstance(section, dict):
            _add_nested_keys(section)
        if isinstance(section, dict) and (former := str(section.get("_target_"))) in MOVED_CLASSES:
            section["_target_"] = MOVED_CLASSES[former]
            _add_class_keys(section)
            notices.append(f"{key}._target_={former} is now {MOVED_CLASSES[former]}; please update your yaml.")
    for key, present_values in RENAMED_VALUES.items():
        section_name, name = key.split(".")
        options = _mapping(config.get(section_name))
        if (value := str(options.get(name))) in present_values:
            options[name] = present_values[value]
            notices.append(f"{key}={value} is now {options[name]}; please update your command or yaml.")
    rates = _mapping(_mapping(config.get("optimizer")).get("rates"))
    if rates and (present := _renamed(rates, _renames(config))) != rates:
        config["optimizer"]["rates"] = present
        notices.append(f"optimizer.rates: {', '.join(rates)} are now {', '.join(present)}; please update your yaml.")
    for sizes in _mapping(_mapping(config.get("model")).get("compressed")).values():
        if isinstance(sizes, dict) and (names := _renamed(sizes, _renames(config))) != sizes:
            sizes.clear()
            sizes.update(names)
    return notices


def migrate_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a whole config of an earlier version with the present names and keys.

    Added keys get the values that keep the former behaviour.
    """
    config = deepcopy(config)
    for key, value in ADDED_KEYS.items():
        section, _, name = key.rpartition(".")
        top = config if "resume" in config else None  # top-level keys: only for train.py, whose configs have `resume`
        keys = config.get(section) if section else top
        if isinstance(keys, dict):
            keys.setdefault(name, deepcopy(value))
    for section in config.values():
        if isinstance(section, dict):
            section.update(MERGED_CLASSES.get(str(section.get("_target_")), {}))
    update_names(config)
    for section in config.values():
        if isinstance(section, dict):
            _add_class_keys(section)
    return config


def with_class_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a config whose sections have all keys of ADDED_CLASS_KEYS.

    A user's yaml may lack keys that have a default value in the constructor.
    """
    config = deepcopy(config)
    for section in config.values():
        if isinstance(section, dict):
            _add_class_keys(section)
    return config


def _add_class_keys(section: dict[str, Any]) -> None:
    """Add the keys of ADDED_CLASS_KEYS that a section lacks, in place."""
    for key, value in ADDED_CLASS_KEYS.get(str(section.get("_target_")), {}).items():
        *parents, name = key.split(".")
        options: Any = section
        for parent in parents:
            options = options.get(parent) if isinstance(options, dict) else None
        if isinstance(options, dict):
            options.setdefault(name, deepcopy(value))


def _add_nested_keys(section: dict[str, Any]) -> None:
    """Add the keys of ADDED_NESTED_KEYS, in place, to nested options that have exactly the former keys."""
    for name, (former, added) in ADDED_NESTED_KEYS.items():
        if isinstance(section.get(name), dict) and section[name].keys() == former:
            section[name].update(added)


def migrate_checkpoint(content: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a checkpoint's content with the config migrated and the tensors renamed to their present names.

    Tensors are renamed in the weights, in the averaged weights and in the optimizer's state.
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
    return RENAMED_TENSORS.get(str(_mapping(config.get("model")).get("_target_")), {})


def _mapping(value: Any) -> dict[str, Any]:
    """Return `value` if it is a dict, and otherwise an empty dict, because `check` reports the mistake later."""
    return value if isinstance(value, dict) else {}


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return a copy of `values` with renamed keys. `names` maps former prefixes of keys to present ones.

    A prefix ends where the key ends or before a dot: "block" is a prefix of "block.weight", but not of "blocks.weight".
    """

    def present_name(name: str) -> str:
        former = next((old for old in names if name == old or name.startswith(f"{old}.")), None)
        return name if former is None else names[former] + name.removeprefix(former)

    return {present_name(name): value for name, value in values.items()}
