"""Every config in configs/ composes, passes the check and builds; classes read from source agree with imported ones."""

import inspect
import itertools
import re
import shlex
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from berts import word_piece
from omegaconf import DictConfig, OmegaConf
from tokenizing import BYTE_OPTIONS

from common.cli import main
from common.config import check as config
from common.config import compose
from common.config.schema import ModuleSource, Options, module_file
from common.errors import UserError
from common.train import optim
from seq2seq.tokenizers.bpe import Tokenizer

MODELS, EXPERIMENTS = compose.choices_of("model"), compose.choices_of("experiment")
ALONE = [f"model={name}" for name in MODELS] + [f"experiment={name}" for name in EXPERIMENTS]
STATES: dict[str, dict[str, Any]] = {  # each wing's task state, as in a checkpoint, so that no data are read
    "detr": {"categories": [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "emu"))]},
    "vit": {"classes": ["cat", "dog", "emu"], "palette": [[-1.0], [0.0], [1.0]], "lossless": True},
    "seq2seq": {
        "tokenizers": [Tokenizer.train([], BYTE_OPTIONS).state()],
        "tokenizer": word_piece().state(),
        "classes": ["cat", "dog", "emu"],
        "words": [f"word{i}" for i in range(600)],
        "counts": [*range(600, 0, -1)],
    },
}
DATA = compose.choices_of("data")


def composed(*arguments: str) -> dict[str, Any]:
    """The checked config of a train.py command line."""
    command = compose.Command("train", arguments)
    command.prepare()
    result = command.compose().config
    config.check(result, [])
    return result


def yaml(group: str, name: str) -> DictConfig:
    """One file of configs/, not composed."""
    loaded = OmegaConf.load(compose.CONFIGS / group / f"{name}.yaml")
    assert isinstance(loaded, DictConfig)
    return loaded


def wing_of(section: Any) -> str:
    """The package of a section's class, which is also the name of the wing's small model."""
    return str(section["_target_"]).split(".")[0]


def task_of(run: dict[str, Any]) -> Any:
    """The task of a config, with the classes or tokenizers in STATES; neither data nor task reads a file."""
    task = config.build(run["task"], data=config.build(run["data"]))
    task.restore(STATES[wing_of(run["task"])])
    return task


@pytest.mark.parametrize("arguments", ALONE)
def test_every_model_and_experiment_builds(arguments: str) -> None:
    run = composed(arguments)
    task = task_of(run)
    with torch.device("meta"):  # shapes without memory
        model = config.build(run["model"], **task.model_arguments())
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e5
    options = {
        section: config.construct(_imported(path), run[section]) for section, path in config.FIXED_CLASSES.items()
    }
    optim.build(model, options["optimizer"])  # each of its rates matches a parameter


@pytest.mark.parametrize("group", ["optimizer", "schedule", "trainer"])
def test_every_choice_of_the_other_groups_passes(group: str) -> None:
    """Each with one of the wings in turn: a choice's values do not depend on the wing."""
    cls = _imported(config.FIXED_CLASSES[group])
    for name, wing in zip(compose.choices_of(group), itertools.cycle(STATES)):
        run = composed(f"model={wing}", f"{group}={name}")
        assert isinstance(config.construct(cls, run[group]), cls)


@pytest.mark.parametrize("name", DATA)
def test_every_data_set_passes_with_its_own_wings_models_only(name: str) -> None:
    wing = wing_of(yaml("data", name))
    assert wing_of(composed(f"model={wing}", f"data={name}")["data"]) == wing
    foreign = [other for other in STATES if other != wing][DATA.index(name) % 2]
    with pytest.raises(UserError, match="do not fit together"):
        composed(f"model={foreign}", f"data={name}")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_chooses_groups_and_writes_no_values_into_them(name: str) -> None:
    file = yaml("model", name)
    assert {*file} <= {"defaults", "model", "task", "trainer"}
    assert {*file.get("trainer", {})} <= {"steps", "epochs"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_states_its_expected_number_cost_and_command(name: str) -> None:
    head = (compose.CONFIGS / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    for word in ("Expected", "Cost", "Command"):
        assert f"# {word}" in head
    command = next(line for line in head.splitlines() if line.startswith("# Command"))
    words = shlex.split(command.partition(":")[2])
    assert f"experiment={name}" in words
    composed(*words[words.index("train.py") + 1 :])


def test_detr_r50_has_the_papers_hyperparameters() -> None:
    """Carion et al. 2020, section 4 and appendix A.4."""
    run = composed("model=detr_r50")
    expected = {"width": 256, "heads": 8, "encoder_layers": 6, "decoder_layers": 6, "feedforward": 2048, "dropout": 0.1}
    assert expected.items() <= run["model"].items()
    assert (run["model"]["queries"], run["task"]["queries"], run["data"]["batch_size"]) == (100, 100, 16)
    assert (run["optimizer"]["lr"], run["optimizer"]["weight_decay"]) == (1e-4, 1e-4)
    assert (run["trainer"]["epochs"], run["trainer"]["clip_norm"]) == (300, 0.1)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("vit_") and name != "vit_photo"])
def test_the_published_vits_select_photographs_and_the_recipe_for_them(name: str) -> None:
    """Dosovitskiy et al. 2021, table 1 and appendix B.1; Touvron et al. 2021, tables 1 and 9."""
    command = compose.Command("train", [f"model={name}"])
    command.prepare()
    run, choices, *_ = command.compose()
    groups = {"data": "imagefolder", "optimizer": "adamw_vit", "schedule": "cosine_vit", "trainer": "vit"}
    assert groups.items() <= choices.items()
    letter, number = name.removeprefix("vit_").rstrip("0123456789"), re.sub(r"\D", "", name)
    width = {"ti": 192, "s": 384, "b": 768, "l": 1024, "h": 1280}[letter]
    expected = {"width": width, "feedforward": 4 * width, "patch_size": int(number), "pooling": "token", "registers": 0}
    assert expected.items() <= run["model"].items()
    assert (run["data"]["image_size"], run["trainer"]["epochs"]) == ([224, 224], 300)
    rate = run["optimizer"]["lr"] / run["optimizer"]["reference_batch"]
    assert rate == pytest.approx(1e-3 / 1024), "table 9"


HYPERPARAMETERS = {
    "base": (512, 8, 2048, 6),
    "big": (1024, 16, 4096, 6),
    "iwslt": (512, 4, 1024, 6),
    "tiny": (128, 4, 256, 4),
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_the_published_transformers_have_the_published_hyperparameters(name: str) -> None:
    """Vaswani et al. 2017, table 3 and section 5; fairseq's transformer_iwslt_de_en; Wu et al. 2021."""
    run = composed(f"model=transformer_{name}")
    model = run["model"]
    keys = ("width", "heads", "feedforward", "encoder_layers")
    assert (
        tuple(model[key] for key in keys) == HYPERPARAMETERS[name]
        and model["decoder_layers"] == model["encoder_layers"]
    )
    assert not model["blocks"]["pre_norm"] and model["tied"] == "all" and model["scaled"]
    assert model["blocks"]["dropout"] == (0.1 if name == "base" else 0.3)
    assert run["task"]["loss"]["smoothing"] == 0.1 and run["trainer"]["clip_norm"] is None
    assert run["optimizer"]["betas"] == [0.9, 0.98]
    if name in ("base", "big"):
        schedule = (run["schedule"]["name"], run["schedule"]["warmup"], run["schedule"]["width"])
        assert schedule == ("noam", 4000, HYPERPARAMETERS[name][0]) and run["optimizer"]["lr"] == 1.0


def test_the_small_vit_selects_digits() -> None:
    run = composed("model=vit")
    assert run["data"]["_target_"] == "vit.data.digits.Digits" and run["trainer"]["workers"] == 0
    assert run["data"]["image_size"] % run["model"]["patch_size"] == 0


def test_the_vit_for_photographs_reads_class_folders_of_64_to_128_pixels() -> None:
    run = composed("model=vit_photo")
    assert run["data"] == composed("model=vit_photo", "data=photos")["data"]
    assert run["data"]["_target_"] == composed("model=vit", "data=imagefolder")["data"]["_target_"]
    assert run["data"]["image_size"] == [64, 64] and run["data"]["cache"] and run["trainer"]["workers"] == 0
    assert not any(size % run["model"]["patch_size"] for size in (64, 96, 128))
    larger = composed("model=vit_photo", "data=imagefolder")
    assert larger["model"] == run["model"] and not any(size % 8 for size in larger["data"]["image_size"])


def test_the_doors_share_their_groups() -> None:
    lists = [yaml(".", door).defaults for door in config.DOOR_KEYS]
    assert lists[0] == lists[1] == lists[2]
    for door, keys in config.DOOR_KEYS.items():
        assert {*yaml(".", door)} == {"defaults", *keys}


# Reading a class from source and importing it must give the same keys and types.


def _targets() -> list[str]:
    files = [yaml("model", name) for name in MODELS] + [{"data": yaml("data", name)} for name in DATA]
    targets = [file[part].get("_target_") for file in files for part in config.TARGET_SECTIONS if part in file]
    return sorted({*filter(None, targets), *config.FIXED_CLASSES.values()})


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    return typing.cast(type, getattr(__import__(module, fromlist=[name]), name))


def _same(parsed: Any, real: Any) -> bool:
    """Whether an annotation read from source equals the imported one; option classes are compared by their fields."""
    if isinstance(parsed, type) and issubclass(parsed, Options):
        return parsed.path == f"{real.__module__}.{real.__qualname__}" and not _differences(parsed, real)
    inner, real_inner = typing.get_args(parsed), typing.get_args(real)
    if not inner or typing.get_origin(parsed) is typing.Literal:
        return bool(parsed == real)
    return (
        typing.get_origin(parsed) == typing.get_origin(real)
        and len(inner) == len(real_inner)
        and all(_same(a, b) if _is_type(a) else a == b for a, b in zip(inner, real_inner, strict=True))
    )


def _is_type(annotation: Any) -> bool:
    return isinstance(annotation, type) or bool(typing.get_args(annotation))


def _differences(parsed: type[Options], real: type) -> list[str]:
    parameters = {name: p for name, p in inspect.signature(real).parameters.items()}
    constructor: Any = real if "__dataclass_fields__" in vars(real) else vars(real)["__init__"]
    hints = typing.get_type_hints(constructor, include_extras=True)
    if list(parameters) != list(parsed.fields):
        return [f"{list(parameters)} != {list(parsed.fields)}"]
    return [
        name
        for name, field in parsed.fields.items()
        if parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY
        or field.required != (parameters[name].default is inspect.Parameter.empty)
        or (field.annotation is not None and not _same(field.annotation, hints[name]))
    ]


@pytest.mark.parametrize("path", _targets())
def test_a_class_read_from_source_equals_the_imported_one(path: str) -> None:
    module, _, name = path.rpartition(".")
    file = module_file(module)
    assert file is not None and file.samefile(Path(inspect.getfile(_imported(path))))
    assert not _differences(ModuleSource(module, file).options(name), _imported(path))


@pytest.mark.parametrize("path", _targets())
def test_no_constructor_has_a_default(path: str) -> None:
    module, _, name = path.rpartition(".")
    file = module_file(module)
    assert file is not None
    todo = [ModuleSource(module, file).options(name)]
    while todo:
        options = todo.pop()
        for key, field in options.fields.items():
            offered = key == "logits"  # by the task, so it is no config key
            # Users' subclasses and their yaml may be older than these.
            added = key in ("exif", "class_order", "val_share", "test_share", "root", "nms", "cache")
            added |= key == "reduction"
            added |= key in ("distillation", "distillation_token", "simcut", "distilled")
            of_detr = (
                "attention",
                "detections_per_image",
                "panoptic_threshold",
                "panoptic_rule",
                "stuff",
                "masks",
                "frozen",
                "mask_weight",
                "dice_weight",
            )
            added |= key in of_detr and options.path.startswith("detr.")
            assert field.required or offered or added, f"{options.path}.{key} has a default"
            nested = (field.annotation, *typing.get_args(field.annotation))
            todo += [part for part in nested if isinstance(part, type) and issubclass(part, Options)]


@pytest.mark.parametrize("path", [path for path in _targets() if path.split(".")[1] == "tasks"])
def test_the_arguments_read_from_source_are_those_that_a_task_hands_to_its_model(path: str) -> None:
    module, _, name = path.rpartition(".")
    file = module_file(module)
    assert file is not None
    model = next(name for name in MODELS if OmegaConf.select(yaml("model", name), "task._target_") == path)
    task = task_of(composed(f"model={model}"))
    options = ModuleSource(module, file).options(name)
    assert {*options.handed_on, *options.offered} == task.model_arguments().keys()


def test_every_option_of_prediction_is_in_the_help_of_predict(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.launch(lambda *_: None, "predict", lambda file: {}, ["--help"])
    text = capsys.readouterr().out
    sections = {name: OmegaConf.select(yaml("model", name), "task.predict") for name in MODELS}
    assert {wing for wing in STATES if sections[wing]} == {*STATES}
    for name in {option for section in sections.values() if section for option in section}:
        assert f"\n    {'task.predict.' * (name == 'seed')}{name}: " in text, name  # seed= is that of training
