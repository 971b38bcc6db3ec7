"""Check a config against the constructors that it names, and construct objects from it.

A constructor's parameters are the keys of its config section, and their annotations are the types of the values. The
default values are in the yaml files of configs/.
"""

import dataclasses
import difflib
import importlib
import inspect
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from common.config.describe import describe_type, shorten, show_value
from common.config.schema import WINGS, ModuleSource, Options, module_file
from common.errors import UserError
from common.types import MAX_COUNT, MAX_INTEGER, Range, Seed, Split

TARGET_SECTIONS = ("model", "data", "task")  # sections whose key _target_ names the class
FIXED_CLASSES = {  # sections whose class is always the same
    "optimizer": "common.train.optim.OptimizerOptions",
    "schedule": "common.train.optim.ScheduleOptions",
    "trainer": "common.train.trainer.Trainer",
}
COMPRESSED = "compressed"  # the key of a model's section with the sizes of its compressed modules, if there are any
SIZES = "common.nn.compressed.Sizes"  # the class of its value
_ALL_DOORS: dict[str, Any] = {"seed": Seed, "trust": list[str], "check_memory": bool, "cache_dir": str}
_WITH_CHECKPOINT = {**_ALL_DOORS, "checkpoint": str, "weights": Literal["auto", "ema", "raw"]}
DOOR_KEYS: dict[str, dict[str, Any]] = {  # the top-level keys of each door that are not sections
    "train": {
        **_ALL_DOORS,
        "run_dir": str | None,
        "sweep_dir": str | None,
        "resume": Literal["auto"] | None,
        "allow_changes": list[str],
        "checkpoint": str | None,
    },
    "evaluate": {**_WITH_CHECKPOINT, "split": Split, "details": bool, "output": str | None},
    "predict": {**_WITH_CHECKPOINT, "input": str, "output": str},
}


def check(config: dict[str, Any], trust: Sequence[str], door: str = "train") -> None:
    """Check a resolved config against the constructors that it names; raises UserError at the first mistake.

    `door` is train, evaluate or predict, and decides which top-level keys are expected. `trust` lists the user's own
    packages: `_target_` may name classes of these as well as classes of the wings. The list must come from the user,
    never from a checkpoint.
    """
    keys = DOOR_KEYS[door]
    expected = (*keys, *TARGET_SECTIONS, *FIXED_CLASSES)
    for key in config:
        if key not in expected:
            raise UserError(f"{key} is not a key of {door}.py{did_you_mean(key, expected)}")
    for key in expected:
        if key not in config:
            raise UserError(f"{key} is missing from the config; {door}.py needs it.")
    for key, annotation in keys.items():
        empty = config[key] == "" and annotation is str  # as with input=$FILE if FILE is unset; Path("") is "."
        if key == "input" and (empty or config[key] == "???"):
            raise UserError(
                "input has no value: give input=, the path of an image, a folder, a pattern such as 'photos/*.jpg', or "
                "- for standard input; for a translator, the path of a text file or -."
            )
        _raise_if(_mistake("???" if empty else config[key], annotation, key))
    targets = {key: _target(config[key], key, trust) for key in TARGET_SECTIONS}
    _refuse_mixed_wings(targets)
    for key, options in targets.items():
        section = {name: value for name, value in config[key].items() if name != "_target_"}
        if key == "model" and COMPRESSED not in options.fields and COMPRESSED in section:
            _raise_if(_mistake(section.pop(COMPRESSED), _read(SIZES, key) | None, f"{key}.{COMPRESSED}"))
        arguments = _handed_in(targets["task"], options) if key == "model" else {}
        _raise_if(_section_mistake(section, options, key, arguments))
    for key, path in FIXED_CLASSES.items():
        _raise_if(_mistake(config[key], _read(path, key), key))
    if door == "train" and config["trainer"]["precision"] == "int8":
        raise UserError(
            "trainer.precision=int8 is for evaluate.py and predict.py; train in auto, bf16 or fp32, then calibrate the "
            "checkpoint: python scripts/compress.py checkpoint=FILE quantize=int8."
        )
    steps, epochs = config["trainer"]["steps"], config["trainer"]["epochs"]
    if (steps is None) == (epochs is None):
        pair = f"trainer.steps={show_value(steps)} and trainer.epochs={show_value(epochs)}"
        raise UserError(f"{pair}: exactly one must be a number, and the other null.")


def build(section: Mapping[str, Any], **handed_in: Any) -> Any:
    """Construct an object of the class that a checked section names as `_target_`.

    The class is imported and called with the other keys of the section and with the arguments `handed_in`.
    """
    keys = {key: value for key, value in section.items() if key != "_target_"}
    return construct(_class(section["_target_"]), keys, **handed_in)


def build_model(section: Mapping[str, Any], task: Any) -> Any:
    """Build the model that a checked section names, from its keys and the arguments of `task.model_arguments()`.

    An argument whose name is in `task.offered` is passed only if the model's constructor has a parameter of that name.
    The modules that the key `compressed` names are made smaller (common/nn/compressed.py).
    """
    parameters = inspect.signature(_class(section["_target_"])).parameters
    arguments = task.model_arguments()
    unused = set(getattr(task, "offered", ())) - parameters.keys()
    keys = {key: value for key, value in section.items() if key != COMPRESSED or COMPRESSED in parameters}
    model = build(keys, **{name: value for name, value in arguments.items() if name not in unused})
    if len(keys) < len(section) and section[COMPRESSED] is not None:
        compressed = importlib.import_module(SIZES.rpartition(".")[0])  # imports torch, which a check must not
        compressed.shrink(model, construct(compressed.Sizes, section[COMPRESSED]))
    return model


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert isinstance(cls, type) and cls.__module__ == module, "check() accepts only classes defined in that module"
    return cls


def construct(cls: type, section: Mapping[str, Any], **handed_in: Any) -> Any:
    """Construct `cls` from the keys of a checked section and the arguments `handed_in`.

    A nested section becomes an instance of the dataclass that the constructor's annotation names.
    """
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    annotated = owner if "__dataclass_fields__" in vars(owner) else vars(owner)["__init__"]
    hints = typing.get_type_hints(annotated, include_extras=True)
    return cls(**{key: _convert(value, hints[key]) for key, value in section.items()}, **handed_in)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown word.

    It suggests the closest of `words`. If none is close, it lists all of them, provided that there are at most 24.
    """
    words = sorted(set(words))
    closest = difflib.get_close_matches(word, words, n=1) or [full for full in words if full.endswith(f".{word}")]
    if closest:
        return f"; did you mean {closest[0]}?"
    return f"; expected one of {', '.join(words)}." if 0 < len(words) <= 24 else "."


def _raise_if(mistake: str | None) -> None:
    if mistake:
        raise UserError(mistake)


def _read(path: str, where: str) -> type[Options]:
    """Read the signature of the class `path` (package.module.Class) from its source.

    Raises UserError, with a text that begins with `where`, if there is no such module or class.
    """
    module, _, name = path.rpartition(".")
    file = module_file(module)
    if file is None:
        raise UserError(f"{where}: there is no file {module.replace('.', '/')}.py.")
    source = ModuleSource(module, file)
    if name not in source.classes:
        raise UserError(f"{where}: no class {name} is defined in {file.name}{did_you_mean(name, source.classes)}")
    return source.options(name)


def _target(section: Any, key: str, trust: Sequence[str]) -> type[Options]:
    """Read the signature of the class that a section's `_target_` names.

    Raises UserError unless the class is defined in a module of detr, vit, seq2seq or a package in `trust`. It is not
    sufficient that a path begins with one of these names: detr.models.detector.torch.os.system, for example, is
    `os.system`.
    """
    path = section.get("_target_") if isinstance(section, dict) else None
    if not isinstance(path, str) or "." not in path:
        example = "detr.models.detector.Detector"
        raise UserError(f"{key}._target_={show_value(path)}: expected the path of a class, such as {example}.")
    top = path.split(".")[0]
    if top == "common" or top not in (*WINGS, *trust):
        remedy = f", or of a package of your own that you name by trust=[{top}]" if top != "common" else ""
        raise UserError(f"{key}._target_={path}: expected a class of {', '.join(WINGS)}{remedy}.")
    return _read(path, f"{key}._target_={path}")


def _handed_in(task: type[Options], model: type[Options]) -> dict[str, str]:
    """Return the arguments that the task passes to the model, as a dict: name -> reason why it is not a config key."""
    offered = [name for name in task.offered if name in model.fields]
    return dict.fromkeys([*task.handed_on, *offered], f"the data decide it, by {task.path}.model_arguments")


def _refuse_mixed_wings(targets: dict[str, type[Options]]) -> None:
    wings = {key: options.path.split(".")[0] for key, options in targets.items()}
    for key, wing in wings.items():
        if {wing, wings["model"]} <= set(WINGS) and wing != wings["model"]:
            raise UserError(
                f"model ({targets['model'].path}) and {key} ({targets[key].path}) do not fit together: a model of "
                f"{wings['model']} cannot read the batches of {wing}; choose both from {wings['model']} or {wing}."
            )


def _section_mistake(
    section: dict[str, Any], options: type[Options], where: str, handed_in: dict[str, str]
) -> str | None:
    """Describe the first mistake in a section's keys or values; None if there is none.

    `where` is the section's full key. `handed_in` holds the arguments that the task passes to the constructor, as a
    dict: name of an argument -> reason why it is not a config key. An argument with a type that a config cannot hold,
    such as a data set, is recognised by its annotation and need not be in `handed_in`.
    """
    fields = options.fields
    names = [key for key, field in fields.items() if field.annotation is not None and key not in handed_in]
    for key, reason in handed_in.items():
        if key in section:
            return f"{where}.{key} cannot be set: {reason}."
        if key not in fields:
            return f"{options.path} must take the argument {key}: {reason}."
    for key, value in section.items():
        if key not in fields:
            return f"{where}.{key} is not a key of {options.path}{did_you_mean(key, names)}"
        if key not in names:
            unresolved = " If its type is meant to be a dataclass of options, the module of that class was not found."
            hint = unresolved if isinstance(value, dict) and value else ""
            return f"{where}.{key} cannot be set: the program passes this argument ({fields[key].source}).{hint}"
        if mistake := _mistake(value, fields[key].annotation, f"{where}.{key}"):
            return mistake
    for key in names:
        if key not in section and fields[key].required:
            return f"{where}.{key} is missing: expected {describe_type(fields[key].annotation)}."
    return None


def _mistake(value: Any, annotation: Any, key: str) -> str | None:
    """Describe the first mistake in `value` in a sentence that begins with the full `key`; None if there is none."""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    parts: list[tuple[Any, Any, str]] | None = None  # (value, annotation, key) of each part of a container
    if value == "???":
        return f"{key} has no value: give {key}=, {describe_type(annotation)}."
    if kind in (Union, UnionType):
        mistakes = [_mistake(value, choice, key) for choice in inner]
        if None in mistakes:
            return None
        nested = [mistake for mistake in mistakes if mistake and not mistake.startswith(f"{key}=")]
        if nested:
            return nested[0]
    elif isinstance(annotation, type) and issubclass(annotation, Options) and isinstance(value, dict):
        return _section_mistake(value, annotation, key, {})
    elif kind is dict and isinstance(value, dict):
        keyed = [(name, item, f"{key}.{name}") for name, item in value.items()]
        parts = [part for name, item, k in keyed for part in ((name, inner[0], k), (item, inner[1], k))]
    elif kind in (list, tuple) and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if kind is list or inner[1:] == (Ellipsis,) else inner
        if len(kinds) == len(value):
            parts = [(item, kinds[i], f"{key}[{i}]") for i, item in enumerate(value)]
    elif _fits(value, annotation):
        return None
    if parts is not None:
        return next(filter(None, (_mistake(*part) for part in parts)), None)
    hint = did_you_mean(value, inner) if kind is Literal and isinstance(value, str) else "."
    is_large = type(value) is int and abs(value) > MAX_COUNT
    expected = describe_type(annotation, is_large)
    return f"{key}={shorten(show_value(value))}: expected {expected}" + (hint if "did you" in hint else ".")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether `value` has the type `annotation`, which is a plain type, a Literal or a type with a range.

    Text and booleans do not count as numbers, and 64.0 does not count as an integer. An integer also counts as a float.
    """
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        ranges = [part for part in inner[1:] if isinstance(part, Range)]
        return _fits(value, inner[0]) and all(limits.contains(value) for limits in ranges)
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if annotation is float:
        return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
    return type(value) is annotation and (annotation is not int or abs(value) <= MAX_INTEGER)


def _convert(value: Any, hint: Any) -> Any:
    """Convert a checked value to the type `hint` of the constructor's parameter.

    A nested section becomes an instance of a dataclass. If the parameter's type requires it, a list becomes a tuple,
    and an integer a float.
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _convert(value, inner[0])
    if kind in (Union, UnionType):
        choices = [choice for choice in inner if _hint_form(choice) == _value_form(value) and choice is not NoneType]
        choices.sort(key=lambda choice: not _fits(value, choice))
        return _convert(value, choices[0]) if value is not None and choices else value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return construct(typing.cast(type, hint), value)
    if kind is dict:
        return {key: _convert(item, inner[1]) for key, item in value.items()}
    if kind in (list, tuple):
        kinds = inner[:1] * len(value) if kind is list or inner[1:] == (Ellipsis,) else inner
        return kind(_convert(item, kinds[i]) for i, item in enumerate(value))
    # PyTorch refuses betas of two types, such as (0, 0.99).
    return float(value) if hint is float and type(value) is int else value


def _hint_form(hint: Any) -> str:
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "keys"
    return "list" if typing.get_origin(hint) in (list, tuple) else "one value"


def _value_form(value: Any) -> str:
    return "keys" if isinstance(value, dict) else "list" if isinstance(value, list | tuple) else "one value"
