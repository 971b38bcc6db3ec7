"""Configs are checked against constructors that are read and never imported; checked configs are built."""

import copy
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import check as config
from common.errors import UserError
from common.types import Count, Fraction, Positive, PositiveFloat

# The package raises when it is imported, so a check that passes has only read its source.
PARTS = """
from dataclasses import dataclass
from typing import Literal

from common.types import Positive

Norm = Literal["frozen", "layer"]


@dataclass(frozen=True, kw_only=True)
class Stem:
    kernel: Positive
    norm: Norm


class Plain:
    pass
"""
NET = """
import os
from typing import Annotated, Literal, Optional

import torch
from torch import nn

from common.types import Fraction, Positive, PositiveFloat, Range
from .parts import Stem


def function(*, width: int): ...


class Net(nn.Module):
    def __init__(
        self,
        *,
        classes: int,
        width: Positive,
        dropout: Fraction,
        rate: PositiveFloat,
        kind: Literal["sine", "learned"],
        stem: Stem,
        second: Stem | None,
        widths: list[Positive],
        crop: tuple[int, int],
        rates: dict[str, float],
        root: "str | None",
        depth: Optional[int],
        auxiliary: bool,
        angle: Annotated[float, Range(low=-180, high=180)],
        name: str,
        layer: nn.Module,
        choice: int = 3,
    ):
        pass


class Data:
    def __init__(self, *, batch_size: int): ...


class Task:
    def __init__(self, *, data: Data, weight: float): ...

    def model_arguments(self):
        return {"classes": 7}


class Inherits(Net):
    pass


class Bare(nn.Module):
    pass


class Loose:
    def __init__(self, width, **rest): ...
"""


@pytest.fixture
def valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A valid config that names classes of the package `toy` above."""
    for package in ("toy", "toy2"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / package / "parts.py").write_text(PARTS)
        (tmp_path / package / "net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return {
        **{
            "seed": 0,
            "run_dir": None,
            "resume": None,
            "checkpoint": None,
            "check_memory": True,
            "trust": ["toy"],
            "cache_dir": "x",
        },
        **{"sweep_dir": None, "allow_changes": []},
        "model": {
            **{"_target_": "toy.net.Net", "width": 64, "dropout": 0, "rate": 1e-4, "kind": "sine"},
            **{"stem": {"kernel": 3, "norm": "layer"}, "second": None, "widths": [1, 2], "crop": [3, 4]},
            **{"rates": {"a": 1}, "root": None, "depth": 2, "auxiliary": True, "angle": -90, "name": "no"},
        },
        "data": {"_target_": "toy.net.Data", "batch_size": 8},
        "task": {"_target_": "toy.net.Task", "weight": 1.5},
        "optimizer": {
            **{"name": "adamw", "lr": 1e-4, "weight_decay": 0, "decay_norms": False, "betas": [0.9, 0.999]},
            **{"eps": 1e-8, "momentum": 0.9, "rates": {}},
            **{"layer_decay": 1.0, "reference_batch": None, "scaling": "linear"},
        },
        "schedule": {"name": "step", "warmup": 0, "start": 0, "drops": [0.5], "factor": 0.1, "final": 0, "width": None},
        "trainer": {
            **{"steps": 10, "epochs": None, "micro_batch": None, "precision": "fp32", "clip_norm": 0.1},
            **{"ema_decay": 0, "compile": False, "workers": 0, "device": "auto"},
            **{"log_every": 1, "eval_every": None, "eval_samples": None, "save_every": None, "average_last": 0},
            **{"patience": None, "log": ["tensorboard"], "sparsity": None},
            **{"deterministic": False, "strategy": "ddp", "timeout": 600, "grace": None, "keep_best": 1},
        },
    }


def changed(valid: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the config with one key set, or removed by DELETE."""
    config = copy.deepcopy(valid)
    *parents, last = key.split(".")
    section = config
    for name in parents:
        section = section[name]
    section[last] = value
    if value is DELETE:
        del section[last]
    return config


DELETE = object()


def refusal(invalid: dict[str, Any], trust: tuple[str, ...] = ("toy",)) -> str:
    """The one-sentence message of `check`."""
    with pytest.raises(UserError) as caught:
        config.check(invalid, trust)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith((".", "?"))
    return sentence


def test_a_valid_config_passes_without_an_import(valid: dict[str, Any]) -> None:
    config.check(valid, ["toy"])
    assert "toy" not in sys.modules


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("model.widht", 64, "model.widht is not a key of toy.net.Net; did you mean width?"),
        ("model.stem.kernl", 3, "model.stem.kernl is not a key of toy.parts.Stem; did you mean kernel?"),
        ("model.width", DELETE, "model.width is missing: expected a whole number from 1."),
        ("model.width", "???", "model.width has no value: give model.width=, a whole number from 1."),
        ("model.width", 64.5, "model.width=64.5: expected a whole number from 1."),
        ("model.width", 64.0, "model.width=64.0: expected"),
        ("model.width", "64", 'model.width="64": expected'),
        ("model.width", True, "model.width=true: expected"),
        ("model.width", None, "model.width=null: expected"),
        ("model.width", 0, "model.width=0: expected a whole number from 1."),
        ("model.dropout", 1.5, "model.dropout=1.5: expected a number from 0 up to 1."),
        ("model.dropout", -0.1, "model.dropout=-0.1: expected"),
        ("model.dropout", float("nan"), "model.dropout=NaN: expected"),
        ("model.rate", 0.0, "model.rate=0.0: expected a number above 0."),
        ("model.rate", "fast", "model.rate=fast: expected a number above 0."),
        ("model.rate", float("inf"), "model.rate=Infinity: expected a number above 0."),
        ("model.rate", True, "model.rate=true: expected a number above 0."),
        ("model.angle", 181, "model.angle=181: expected a number from -180 up to 180."),
        ("model.kind", "sin", "model.kind=sin: expected sine or learned; did you mean sine?"),
        ("model.kind", False, "model.kind=false: expected sine or learned."),
        ("model.stem", 3, "model.stem=3: expected the keys kernel, norm."),
        ("model.stem.norm", "batch", "model.stem.norm=batch: expected frozen or layer."),
        ("model.second", {"kernel": 3}, "model.second.norm is missing: expected frozen or layer."),
        ("model.second", {"kernel": 0, "norm": "layer"}, "model.second.kernel=0: expected"),
        ("model.widths", [1, 2.5], "model.widths[1]=2.5: expected a whole number from 1."),
        ("model.widths", 3, "model.widths=3: expected a list (each a whole number from 1)."),
        ("model.crop", [3], "model.crop=[3]: expected a list of 2"),
        ("model.crop", [3, "4"], 'model.crop[1]="4": expected a whole number.'),
        ("model.rates", {"a": "b"}, "model.rates.a=b: expected a number."),
        ("model.root", 3, "model.root=3: expected text or null."),
        ("model.compressed", 3, "model.compressed=3: expected"),
        ("model.compressed", {"heads": {}, "ranks": {}}, "model.compressed.neurons is missing: expected"),
        ("model.compressed", {"head": {}}, "model.compressed.head is not a key of common.nn.compressed.Sizes; did you"),
        (
            "model.compressed",
            {"heads": {"blocks.0": 0}, "neurons": {}, "ranks": {}},
            "model.compressed.heads.blocks.0=0: expected a whole number from 1.",
        ),
        ("model.depth", 2.5, "model.depth=2.5: expected a whole number or null."),
        ("model.auxiliary", "yes", "model.auxiliary=yes: expected true or false."),
        ("model.auxiliary", 1, "model.auxiliary=1: expected true or false."),
        ("model.name", False, "model.name=false: expected text."),
        ("model.choice", "a", "model.choice=a: expected a whole number."),
        ("model.layer", "conv", "model.layer cannot be set: the program passes this argument (nn.Module)."),
        ("model.classes", 7, "model.classes cannot be set: the data decide it, by toy.net.Task.model_arguments."),
        ("task.data", {}, "task.data cannot be set: the program passes this argument (Data)."),
        ("model", None, "model._target_=null: expected the path of a class"),
        ("data", {"batch_size": 8}, "data._target_=null: expected the path of a class"),
        ("foo", 1, "foo is not a key of train.py"),
        ("trainr", {}, "trainr is not a key of train.py; did you mean trainer?"),
        ("task", DELETE, "task is missing from the config"),
        ("seed", -1, "seed=-1: expected a whole number from 0."),
        ("seed", 10**20, "seed=100000000000000000000: expected a whole number from 0 up to 9223372036854775807."),
        ("model.width", 10**30, f"model.width=1{'0' * 30}: expected a whole number from 1 up to 2147483647."),
        ("model.depth", 10**30, f"model.depth=1{'0' * 30}: expected a whole number of at most 64 bits or null."),
        ("model.depth", -(10**130), f"model.depth=-1{'0' * 58}...{'0' * 30}: expected a whole number of at most"),
        ("model.rate", 10**310, f"model.rate=1{'0' * 59}...{'0' * 30}: expected a number above 0."),
        ("trainer.workers", 10**7, "trainer.workers=10000000: expected a whole number from 0 up to 1024 or auto."),
        ("trainer.grace", 1e300, "trainer.grace=1e+300: expected a number above 0 up to 10000000 or null."),
        ("resume", "yes", "resume=yes: expected auto or null."),
        ("trust", "toy", "trust=toy: expected a list (each text)."),
        ("optimizer.lrr", 1, "optimizer.lrr is not a key of common.train.optim.OptimizerOptions; did you mean lr?"),
        ("optimizer._target_", "os.system", "optimizer._target_ is not a key of"),
        ("optimizer.betas", [0.9], "optimizer.betas=[0.9]: expected a list of 2"),
        ("schedule", None, "schedule=null: expected the keys name, warmup"),
        ("schedule.warmup", 1.5, "schedule.warmup=1.5: expected a whole number from 0 or a number from 0 up to 1."),
        ("schedule.warmup", -1, "schedule.warmup=-1: expected a whole number from 0 or"),
        ("schedule.warmup", "5%", 'schedule.warmup="5%": expected'),
        ("schedule.start", 2, "schedule.start=2: expected a number from 0 up to 1."),
        ("optimizer.layer_decay", 1.1, "optimizer.layer_decay=1.1: expected a number from 0 up to 1."),
        ("optimizer.layer_decay", DELETE, "optimizer.layer_decay is missing: expected a number from 0 up to 1."),
        ("optimizer.reference_batch", 0, "optimizer.reference_batch=0: expected a whole number from 1 or null."),
        ("optimizer.scaling", "squrt", "optimizer.scaling=squrt: expected linear or sqrt; did you mean sqrt?"),
        ("trainer.precision", "bf17", "trainer.precision=bf17: expected auto, fp32, bf16, fp16 or int8; did you mean"),
        ("trainer.precision", "int8", "trainer.precision=int8 is for evaluate.py and predict.py; train in auto, bf16"),
        ("trainer.epochs", 3, "trainer.steps=10 and trainer.epochs=3: exactly one must be a number"),
        ("trainer.steps", None, "trainer.steps=null and trainer.epochs=null: exactly one must be a number"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_full_key(
    valid: dict[str, Any], key: str, value: Any, sentence: str
) -> None:
    assert refusal(changed(valid, key, value)).startswith(sentence)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("model.dropout", 1), ("model.root", "~/x"), ("model.crop", (1, 2)), ("model.choice", 4)],
        *[("model.depth", None), ("schedule.warmup", 0.05), ("schedule.warmup", 500), ("optimizer.reference_batch", 8)],
    ],
)
def test_other_valid_values_pass(valid: dict[str, Any], key: str, value: Any) -> None:
    config.check(changed(valid, key, value), ["toy"])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",  # in no wing
        "toy2.net.Net",  # a package that is not trusted
        "toy.net.os.system",  # os is imported there, not defined
        "toy.net.torch.hub.load",
        "toy.net.nn",  # a module
        "toy.net.Stem",  # a class, but defined elsewhere
        "toy.net.function",  # not a class
        "toy.net.Nett",
        "toy.nett.Net",
        "toy..net.Net",
        "toy./etc/passwd.Net",
        "toy.net",
        "Net",
        "common.train.trainer.Trainer",
        "common.files.checkpoint.save",
        "detr.models.detector.torch.os.system",
        "detr.models.detector.BlockOptions",
        "detr.criterion.set_loss.set_loss",
        7,
        "",
    ],
)
def test_a_target_must_be_a_class_defined_in_a_wing_or_a_trusted_package(valid: dict[str, Any], target: Any) -> None:
    sentence = refusal(changed(valid, "model._target_", target), ("toy", "common"))
    assert sentence.startswith(f"model._target_={target}: " if target and target != 7 else "model._target_=")
    assert "toy" not in sys.modules


def test_a_wrong_target_is_refused_with_the_remedy(valid: dict[str, Any]) -> None:
    assert refusal(changed(valid, "model._target_", "toy.net.Nett")).endswith("did you mean Net?")
    assert "there is no file toy/nett.py" in refusal(changed(valid, "model._target_", "toy.nett.Net"))
    assert "trust=[toy2]" in refusal(changed(valid, "model._target_", "toy2.net.Net"))


def test_trust_in_the_config_itself_is_ignored(valid: dict[str, Any]) -> None:
    """The config may come from an untrusted checkpoint; only the argument counts."""
    assert "expected a class of detr" in refusal(valid, trust=())


def test_classes_of_two_wings_are_refused(valid: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "WINGS", ("toy", "toy2"))
    mixed = changed(valid, "data._target_", "toy2.net.Data")
    assert refusal(mixed, ()).startswith("model (toy.net.Net) and data (toy2.net.Data) do not fit together")
    monkeypatch.setattr(config, "WINGS", ("toy",))
    config.check(mixed, ["toy2"])  # a user's own package is exempt


def test_a_class_without_an_init_has_its_parents_keys(valid: dict[str, Any]) -> None:
    inherits = changed(valid, "model._target_", "toy.net.Inherits")
    config.check(inherits, ["toy"])
    assert refusal(changed(inherits, "model.widht", 64)) == (
        "model.widht is not a key of toy.net.Inherits; did you mean width?"
    )
    assert refusal(changed(inherits, "model.width", 0)) == "model.width=0: expected a whole number from 1."


def test_a_constructor_must_name_its_keys(valid: dict[str, Any]) -> None:
    sentence = refusal(changed(valid, "model._target_", "toy.net.Bare"))
    assert sentence == "toy.net.Bare has no __init__, nor has a base; write one: its arguments are the config keys."
    assert "(self, *, ...)" in refusal(changed(valid, "model._target_", "toy.net.Loose"))


def test_a_model_must_take_the_arguments_that_its_task_hands_on(valid: dict[str, Any]) -> None:
    invalid = changed(valid, "model", {"_target_": "toy.net.Data", "batch_size": 8})
    assert refusal(invalid) == (
        "toy.net.Data must take the argument classes: the data decide it, by toy.net.Task.model_arguments."
    )


def test_each_door_has_its_own_keys(valid: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"run_dir is not a key of evaluate\.py"):
        config.check(valid, ["toy"], "evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    """Nested options."""

    size: tuple[int, int]


class Outer:
    """A class that stores its arguments."""

    def __init__(
        self, *, inner: Inner, maybe: Inner | None, many: list[Inner], named: dict[str, Inner], module: object
    ):
        self.inner, self.maybe, self.many, self.named, self.module = inner, maybe, many, named, module


def test_nested_keys_become_option_dataclasses() -> None:
    keys = {"size": [1, 2]}
    built = config.construct(
        Outer, {"inner": keys, "maybe": keys, "many": [keys], "named": {"a": keys}}, module=sys.modules
    )
    inner = Inner(size=(1, 2))
    assert (built.inner, built.maybe, built.many, built.named) == (inner, inner, [inner], {"a": inner})
    assert built.module is sys.modules
    assert config.construct(Outer, {"inner": keys, "maybe": None, "many": [], "named": {}}, module=0).maybe is None


class Numbers:
    """A class with floats in several places."""

    def __init__(
        self,
        *,
        betas: tuple[Fraction, Fraction],
        clip: PositiveFloat | None,
        rates: dict[str, float],
        steps: int | float,
    ):
        self.arguments = [*betas, clip, *rates.values(), steps]


def test_a_whole_number_becomes_a_float_where_one_is_expected() -> None:
    """torch.optim.AdamW refuses betas=(0, 0.99)."""
    section = {"betas": [0, 0.99], "clip": 1, "rates": {"a": 2}, "steps": 3}
    arguments = config.construct(Numbers, section).arguments
    assert arguments == [0, 0.99, 1, 2, 3] and [type(value) for value in arguments] == [float] * 4 + [int]


class Choices:
    """A class whose arguments accept several types."""

    def __init__(
        self,
        *,
        size: Positive | tuple[Positive, Positive],
        options: list[Inner] | None,
        inner: Inner | list[Inner] | dict[str, Inner] | int,
        warmup: Count | Fraction,
    ):
        self.arguments = (size, options, inner, warmup)


INNER = Inner(size=(1, 2))


@pytest.mark.parametrize(
    ("size", "options", "inner", "warmup"),
    [
        ((8, 8), (None, None), (3, 3), (5, 5)),
        (([8, 6], (8, 6)), (None, None), ({"size": [1, 2]}, INNER), (0.5, 0.5)),
        (([8, 6], (8, 6)), ([{"size": [1, 2]}], [INNER]), ([{"size": [1, 2]}], [INNER]), (0, 0)),
    ],
    ids=["single values", "lists and keys", "lists of keys"],
)
def test_the_form_of_a_value_selects_its_type_in_a_union(size: Any, options: Any, inner: Any, warmup: Any) -> None:
    """Each pair is a value in the config and the argument that it becomes."""
    section = {"size": size[0], "options": options[0], "inner": inner[0], "warmup": warmup[0]}
    arguments = config.construct(Choices, section).arguments
    assert arguments == (size[1], options[1], inner[1], warmup[1])
    assert [type(argument) for argument in arguments] == [type(pair[1]) for pair in (size, options, inner, warmup)]


def test_build_constructs_the_class_that_the_section_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "builtbytest.py").write_text("class Net:\n    def __init__(self, *, width: int): self.width = width\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert config.build({"_target_": "builtbytest.Net", "width": 3}).width == 3
