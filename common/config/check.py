"""Whether a config is right, and what it builds: the constructor is the schema, and yaml the only home of a value."""

import dataclasses
import difflib
import importlib
import inspect
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union

from common.config.schema import WINGS, ModuleSource, Options, module_file
from common.errors import UserError
from common.types import Count, Range, Split

TARGET_SECTIONS = ("model", "data", "task")  # the sections that name their class
FIXED_CLASSES = {  # and those whose class is always the same
    "optimizer": "common.train.optim.OptimizerOptions",
    "schedule": "common.train.optim.ScheduleOptions",
    "trainer": "common.train.trainer.Trainer",
}
_ALL_DOORS: dict[str, Any] = {"seed": Count, "trust": list[str]}
_WITH_CHECKPOINT = {**_ALL_DOORS, "checkpoint": str, "weights": Literal["auto", "ema", "raw"]}
DOOR_KEYS: dict[str, dict[str, Any]] = {  # the keys beside the sections
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
    """Compare a resolved config with the constructors that it names; raises UserError at the first mistake.

    `trust` lists the user's own packages that may be built from. It comes from the user, never out of a checkpoint.
    """
    keys = DOOR_KEYS[door]
    for key in config:
        if key not in (*keys, *TARGET_SECTIONS, *FIXED_CLASSES):
            raise UserError(
                f"{key} is not a key of {door}.py{did_you_mean(key, [*keys, *TARGET_SECTIONS, *FIXED_CLASSES])}"
            )
    for key in (*keys, *TARGET_SECTIONS, *FIXED_CLASSES):
        if key not in config:
            raise UserError(f"{key} is missing from the config; {door}.py needs it.")
    for key, annotation in keys.items():
        _refuse(_mistake(config[key], annotation, key))
    targets = {key: _target(config[key], key, trust) for key in TARGET_SECTIONS}
    _same_wing(targets)
    for key, options in targets.items():
        section = {name: value for name, value in config[key].items() if name != "_target_"}
        _refuse(_section_mistake(section, options, key, _handed_in(targets["task"], options) if key == "model" else {}))
    for key, path in FIXED_CLASSES.items():
        _refuse(_mistake(config[key], _read(path, key), key))
    steps, epochs = config["trainer"]["steps"], config["trainer"]["epochs"]
    if (steps is None) == (epochs is None):
        both = f"trainer.steps={_show(steps)} and trainer.epochs={_show(epochs)}"
        raise UserError(f"{both}: exactly one must be a number, and the other null.")


def build(section: Mapping[str, Any], **handed_in: Any) -> Any:
    """Import the class that a checked section names as `_target_`, and construct it."""
    keys = {key: value for key, value in section.items() if key != "_target_"}
    return construct(_class(section["_target_"]), keys, **handed_in)


def build_model(section: Mapping[str, Any], task: Any) -> Any:
    """The model that a checked section names, with what `task` hands on to it, and what it takes of what is offered."""
    taken = inspect.signature(_class(section["_target_"])).parameters
    arguments = task.model_arguments()
    offered = set(getattr(task, "offered", ())) - taken.keys()
    return build(section, **{name: value for name, value in arguments.items() if name not in offered})


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert isinstance(cls, type) and cls.__module__ == module, "check() lets only classes defined there through"
    return cls


def construct(cls: type, section: Mapping[str, Any], **handed_in: Any) -> Any:
    """Construct `cls` from a checked section; nested keys become the option dataclasses that the annotations name."""
    owner = next(part for part in cls.__mro__ if "__init__" in vars(part))
    hinted = owner if "__dataclass_fields__" in vars(owner) else vars(owner)["__init__"]
    hints = typing.get_type_hints(hinted, include_extras=True)
    return cls(**{key: _convert(value, hints[key]) for key, value in section.items()}, **handed_in)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them when they are few."""
    words = sorted(set(words))
    near = difflib.get_close_matches(word, words, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; expected one of {', '.join(words)}." if 0 < len(words) <= 24 else "."


def _refuse(mistake: str | None) -> None:
    if mistake:
        raise UserError(mistake)


def _read(path: str, where: str) -> type[Options]:
    """The class at `path`, from its source."""
    module, _, name = path.rpartition(".")
    file = module_file(module)
    if file is None:
        raise UserError(f"{where}: there is no file {module.replace('.', '/')}.py.")
    source = ModuleSource(module, file)
    if name not in source.classes:
        raise UserError(f"{where}: no class {name} is defined in {file.name}{did_you_mean(name, source.classes)}")
    return source.options(name)


def _target(section: Any, key: str, trust: Sequence[str]) -> type[Options]:
    """The class that a section names; it must be DEFINED in a wing, or in a package that the user trusts.

    Looking at the prefix alone is not enough: detr.models.detector.torch.os.system starts well.
    """
    path = section.get("_target_") if isinstance(section, dict) else None
    if not isinstance(path, str) or "." not in path:
        example = "detr.models.detector.Detector"
        raise UserError(f"{key}._target_={_show(path)}: expected the path of a class, such as {example}.")
    top = path.split(".")[0]
    if top == "common" or top not in (*WINGS, *trust):
        own = f", or of a package of your own that you name by trust=[{top}]" if top != "common" else ""
        raise UserError(f"{key}._target_={path}: expected a class of {', '.join(WINGS)}{own}.")
    return _read(path, f"{key}._target_={path}")


def _handed_in(task: type[Options], model: type[Options]) -> dict[str, str]:
    """The arguments that the task gives the model, and why they are no keys."""
    offered = [name for name in task.offered if name in model.fields]
    return dict.fromkeys([*task.handed_on, *offered], f"the data decide it, by {task.path}.model_arguments")


def _same_wing(targets: dict[str, type[Options]]) -> None:
    wings = {key: options.path.split(".")[0] for key, options in targets.items()}
    for key, wing in wings.items():
        if {wing, wings["model"]} <= set(WINGS) and wing != wings["model"]:
            raise UserError(
                f"model ({targets['model'].path}) and {key} ({targets[key].path}) do not fit together: the batches of "
                f"{wing} mean nothing to {wings['model']}; choose both from one of them."
            )


def _section_mistake(
    section: dict[str, Any], options: type[Options], where: str, handed_in: dict[str, str]
) -> str | None:
    """What is wrong with a section's keys or values; `handed_in` are plain arguments that are no keys, and why."""
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
            moved = " If it is a class of options, its module was not found where it is imported from."
            hint = moved if isinstance(value, dict) and value else ""
            return f"{where}.{key} cannot be set: the program hands it in ({fields[key].source}).{hint}"
        if mistake := _mistake(value, fields[key].annotation, f"{where}.{key}"):
            return mistake
    for key in names:
        if key not in section and fields[key].required:
            return f"{where}.{key} is missing: expected {_describe(fields[key].annotation)}."
    return None


def _mistake(value: Any, annotation: Any, key: str) -> str | None:
    """What is wrong with `value`, in one sentence that begins with the full key; None when it fits."""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    parts: list[tuple[Any, Any, str]] | None = None
    if value == "???":
        return f"{key} has no value: give {key}=, {_describe(annotation)}."
    if kind in (Union, UnionType):
        mistakes = [_mistake(value, choice, key) for choice in inner]
        if None in mistakes:
            return None
        deeper = [mistake for mistake in mistakes if mistake and not mistake.startswith(f"{key}=")]
        if deeper:
            return deeper[0]
    elif isinstance(annotation, type) and issubclass(annotation, Options) and isinstance(value, dict):
        return _section_mistake(value, annotation, key, {})
    elif kind is dict and isinstance(value, dict):
        parts = [pair for k, v in value.items() for pair in ((k, inner[0], f"{key}.{k}"), (v, inner[1], f"{key}.{k}"))]
    elif kind in (list, tuple) and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if kind is list or inner[1:] == (Ellipsis,) else inner
        if len(kinds) == len(value):
            parts = [(item, kinds[i], f"{key}[{i}]") for i, item in enumerate(value)]
    elif _fits(value, annotation):
        return None
    if parts is not None:
        return next(filter(None, (_mistake(*part) for part in parts)), None)
    hint = did_you_mean(value, inner) if kind is Literal and isinstance(value, str) else "."
    return f"{key}={_show(value)}: expected {_describe(annotation)}" + (hint if "did you" in hint else ".")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a single value is of a plain type. Text is no number, a boolean neither, and 64.5 no whole one."""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        return _fits(value, inner[0]) and all(_within(value, part) for part in inner[1:] if isinstance(part, Range))
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation


def _within(value: float, limits: Range) -> bool:
    low, high, above = limits.low, limits.high, limits.above
    return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)


def _describe(annotation: Any) -> str:
    """The type in words, for the end of "expected ..."."""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is Annotated:
        limits = [f" {_limits(part)}" for part in inner[1:] if isinstance(part, Range)]
        return _describe(inner[0]) + "".join(limits)
    if kind is Literal:
        return " or ".join(filter(None, [", ".join(map(_show, inner[:-1])), _show(inner[-1])]))
    if kind in (Union, UnionType):
        return " or ".join(_describe(choice) for choice in inner)
    if kind is tuple and inner[1:] != (Ellipsis,):
        return f"a list of {len(inner)} ({'; '.join(map(_describe, inner))})"
    if kind in (list, tuple):
        return f"a list (each {_describe(inner[0])})"
    if kind is dict:
        return f"keys with values (each {_describe(inner[1])})"
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return f"the keys {', '.join(annotation.fields)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(annotation, str(annotation))


def _limits(limits: Range) -> str:
    parts = {"above": limits.above, "from": limits.low, "up to": limits.high}
    return " ".join(f"{word} {number:g}" for word, number in parts.items() if number is not None)


def _show(value: Any) -> str:
    """A value as the user would write it; text that looks like something else keeps its quotes."""
    looks_plain = isinstance(value, str) and not value[:1].isdigit() and value not in ("", "true", "false", "null")
    return value if looks_plain else json.dumps(value, ensure_ascii=False, default=str)


def _convert(value: Any, hint: Any) -> Any:
    """A checked value in the type that the constructor takes: options become dataclasses and tuples tuples."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _convert(value, inner[0])
    if kind in (Union, UnionType):
        choices = [choice for choice in inner if _takes(choice) == _kind(value) and choice is not NoneType]
        return _convert(value, choices[0]) if value is not None and choices else value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return construct(typing.cast(type, hint), value)
    if kind is dict:
        return {key: _convert(item, inner[1]) for key, item in value.items()}
    if kind in (list, tuple):
        kinds = inner[:1] * len(value) if kind is list or inner[1:] == (Ellipsis,) else inner
        return kind(_convert(item, kinds[i]) for i, item in enumerate(value))
    return value


def _takes(hint: Any) -> str:
    if dataclasses.is_dataclass(hint) or typing.get_origin(hint) is dict:
        return "keys"
    return "list" if typing.get_origin(hint) in (list, tuple) else "one value"


def _kind(value: Any) -> str:
    return "keys" if isinstance(value, dict) else "list" if isinstance(value, list | tuple) else "one value"
