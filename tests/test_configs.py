"""Every config in configs/ composes, passes the check and builds; and reading source finds what Python itself finds."""

import inspect
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from common import compose, config
from common.schema import Options, Source, find

MODELS, EXPERIMENTS = compose.choices_of("model"), compose.choices_of("experiment")
ALONE = [f"model={name}" for name in MODELS] + [f"experiment={name}" for name in EXPERIMENTS]
WING = {"shapes": "detr", "coco": "detr"}  # a model that suits each data set


def composed(*arguments: str) -> dict[str, Any]:
    """The checked config of a train.py command line."""
    command = compose.Command("train", arguments)
    command.prepare()
    found = command.compose().config
    config.check(found, [])
    return found


def yaml(group: str, name: str) -> DictConfig:
    """One file of configs/ as it stands."""
    loaded = OmegaConf.load(compose.CONFIGS / group / f"{name}.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


@pytest.mark.parametrize("arguments", ALONE)
def test_every_model_and_experiment_builds(arguments: str) -> None:
    found = composed(arguments)
    data = config.build(found["data"])  # opens no file
    config.build(found["task"], data=data)
    with torch.device("meta"):  # shapes without memory
        model = config.build(found["model"], classes=3)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e5
    for section, path in config.FIXED.items():
        config.construct(_imported(path), found[section])


@pytest.mark.parametrize("group", ["data", "optimizer", "schedule", "trainer"])
def test_every_choice_of_the_other_groups_passes(group: str) -> None:
    for name in compose.choices_of(group):
        composed(f"model={WING.get(name, 'detr')}", f"{group}={name}")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_chooses_groups_and_writes_no_values_into_them(name: str) -> None:
    file = yaml("model", name)
    assert {*file} <= {"defaults", "model", "task", "trainer"}
    assert {*file.get("trainer", {})} <= {"steps", "epochs"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_what_to_expect_and_how_to_run_it(name: str) -> None:
    head = (compose.CONFIGS / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    for word in ("Expected", "Cost", "Command"):
        assert f"# {word}" in head
    command = next(line for line in head.splitlines() if line.startswith("# Command"))
    words = shlex.split(command.partition(":")[2])
    assert f"experiment={name}" in words
    composed(*words[words.index("train.py") + 1 :])


def test_the_papers_sizes() -> None:
    """Carion et al. 2020, section 4 and appendix A.4."""
    found = composed("model=detr_r50")
    sizes = {"width": 256, "heads": 8, "encoder_layers": 6, "decoder_layers": 6, "feedforward": 2048, "dropout": 0.1}
    assert sizes.items() <= found["model"].items()
    assert (found["model"]["queries"], found["task"]["queries"], found["data"]["batch_size"]) == (100, 100, 16)
    assert (found["optimizer"]["lr"], found["optimizer"]["weight_decay"]) == (1e-4, 1e-4)
    assert (found["trainer"]["epochs"], found["trainer"]["clip_norm"]) == (300, 0.1)


def test_the_doors_share_their_groups() -> None:
    lists = [yaml(".", door).defaults for door in config.DOORS]
    assert lists[0] == lists[1] == lists[2]
    for door, keys in config.DOORS.items():
        assert {*yaml(".", door)} == {"defaults", *keys}


# Reading source and asking Python must give the same keys and types.


def _targets() -> list[str]:
    files = [yaml("model", name) for name in MODELS] + [{"data": yaml("data", name)} for name in WING]
    named = [file[part].get("_target_") for file in files for part in config.TARGETS if part in file]
    return sorted({*filter(None, named), *config.FIXED.values()})


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    return typing.cast(type, getattr(__import__(module, fromlist=[name]), name))


def _same(read: Any, real: Any) -> bool:
    """Whether an annotation read from source is the imported one; option classes are compared field by field."""
    if isinstance(read, type) and issubclass(read, Options):
        return read.path == f"{real.__module__}.{real.__qualname__}" and not _differences(read, real)
    inner, real_inner = typing.get_args(read), typing.get_args(real)
    if not inner or typing.get_origin(read) is typing.Literal:
        return bool(read == real)
    return (
        typing.get_origin(read) == typing.get_origin(real)
        and len(inner) == len(real_inner)
        and all(_same(a, b) if _is_type(a) else a == b for a, b in zip(inner, real_inner, strict=True))
    )


def _is_type(annotation: Any) -> bool:
    return isinstance(annotation, type) or bool(typing.get_args(annotation))


def _differences(read: type[Options], real: type) -> list[str]:
    parameters = {name: p for name, p in inspect.signature(real).parameters.items()}
    constructor: Any = real if "__dataclass_fields__" in vars(real) else vars(real)["__init__"]
    hints = typing.get_type_hints(constructor, include_extras=True)
    if list(parameters) != list(read.fields):
        return [f"{list(parameters)} != {list(read.fields)}"]
    return [
        name
        for name, field in read.fields.items()
        if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY
        or field.required != (parameters[name].default is inspect.Parameter.empty)
        or (field.annotation is not None and not _same(field.annotation, hints[name]))
    ]


@pytest.mark.parametrize("path", _targets())
def test_reading_source_finds_what_python_finds(path: str) -> None:
    module, _, name = path.rpartition(".")
    file = find(module)
    assert file is not None and file.samefile(Path(inspect.getfile(_imported(path))))
    assert not _differences(Source(module, file).options(name), _imported(path))


@pytest.mark.parametrize("path", _targets())
def test_yaml_is_the_only_home_of_a_default(path: str) -> None:
    module, _, name = path.rpartition(".")
    file = find(module)
    assert file is not None
    todo = [Source(module, file).options(name)]
    while todo:
        options = todo.pop()
        for key, field in options.fields.items():
            assert field.required, f"{options.path}.{key} has a default"
            nested = (field.annotation, *typing.get_args(field.annotation))
            todo += [part for part in nested if isinstance(part, type) and issubclass(part, Options)]


@pytest.mark.parametrize("path", [path for path in _targets() if "Detection" in path or path.endswith("Task")])
def test_reading_source_finds_what_a_task_hands_to_its_model(path: str) -> None:
    module, _, name = path.rpartition(".")
    file = find(module)
    assert file is not None

    class NoData:
        def categories(self) -> list[dict[str, Any]]:
            return [{"id": 1, "name": "cat"}]

    section = next(each["task"] for each in map(composed, ALONE) if each["task"]["_target_"] == path)
    task = config.build(section, data=NoData())
    assert Source(module, file).options(name).handed_on == list(task.model_arguments())
