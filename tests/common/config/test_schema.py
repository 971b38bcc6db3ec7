"""Classes read from source agree with the imported ones: bases, dataclasses, and `handed_on` of tasks."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config import check as config
from common.config.schema import ModuleSource, Options, module_file
from common.errors import UserError

FILES = {
    "parents.py": """
from dataclasses import dataclass
from typing import ClassVar


class Model:
    def __init__(self, *, classes: int, width: int):
        self.arguments = {"classes": classes, "width": width}


class Left(Model): ...


class Right(Model):
    def __init__(self, *, classes: int, depth: int): ...


class Task:
    handed_on: ClassVar[tuple[str, ...]] = ("classes",)

    def __init__(self, *, data: object, weight: float): ...

    def model_arguments(self):
        return {"classes": 3}


class Earlier:
    def __init__(self, *, data: object): ...

    def model_arguments(self):
        return {"classes": 3, "channels": 1}


@dataclass(frozen=True, kw_only=True)
class Stem:
    counts: ClassVar[dict] = {}
    kernel: int
    norm: str
""",
    "moved.py": "from .parents import Model as Model\n",
    "children.py": """
import relatives.parents
import relatives.parents as aliased
from dataclasses import dataclass
from relatives import parents
from relatives.moved import Model
from .parents import Earlier, Left, Right, Stem, Task
from vit.in_memory import InMemory
from vit.task import Classification


class Same(Right): ...
class Through(Model): ...
class Dotted(parents.Model): ...
class Whole(relatives.parents.Model): ...
class Aliased(aliased.Right): ...
class Twice(Same): ...
class Diamond(Left, Right): ...
class Images(InMemory): ...


class Own(Right):
    def __init__(self, *, more: int): ...


@dataclass(frozen=True, kw_only=True)
class Wider(Stem):
    norm: int
    stride: int


class Undecorated(Wider): ...


class WithStem:
    def __init__(self, *, stem: Undecorated | None):
        self.stem = stem


class WithStemToo(WithStem): ...


class Asks(Model):
    def __init__(self, *, queries: int, classes: int, width: int):
        super().__init__(classes=classes, width=width)
        self.arguments["queries"] = queries


class Inherits(Task): ...


class Extends(Task):
    def model_arguments(self):
        return {**super().model_arguments(), "queries": 5}


class Lists(Task):
    handed_on = (*Task.handed_on, "queries")

    def model_arguments(self):
        return super().model_arguments() | {"queries": 5}


class Replaces(Task):
    def model_arguments(self):
        return {"queries": 5}


class Nothing(Task):
    handed_on = ()

    def model_arguments(self):
        return dict()


class InheritsEarlier(Earlier): ...


class ExtendsEarlier(Earlier):
    def model_arguments(self):
        return {**super().model_arguments(), "queries": 5}


class Classifies(Classification): ...


class Offers(Task):
    offered = ("queries",)

    def model_arguments(self):
        return {"classes": 3, "queries": 5}


class OffersToo(Offers): ...


class Wrong(Task):
    handed_on = Task.handed_on + ("queries",)
""",
}
CONSTRUCTORS = ("Same", "Through", "Dotted", "Whole", "Aliased", "Twice", "Diamond", "Images", "Own", "Wider",
                "Undecorated", "WithStemToo", "Inherits", "Classifies")  # fmt: skip
TASKS = ("Inherits", "Extends", "Lists", "Replaces", "Nothing", "InheritsEarlier", "ExtendsEarlier")


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type[Options]]:
    """Reads a class of the package `relatives` above."""
    (tmp_path / "relatives").mkdir()
    for name, text in FILES.items():
        (tmp_path / "relatives" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    file = module_file("relatives.children")
    assert file is not None
    source = ModuleSource("relatives.children", file)
    return source.options


def imported(name: str) -> Any:
    return getattr(importlib.import_module("relatives.children"), name)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_the_keys_are_those_of_the_constructor_that_python_calls(read, name: str) -> None:
    assert list(read(name).fields) == list(inspect.signature(imported(name)).parameters)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_hands_on_the_keys_of_its_model_arguments(read, name: str) -> None:
    task = imported(name)(data=None, **({} if "Earlier" in name else {"weight": 1.0}))
    assert list(read(name).handed_on) == list(task.model_arguments())


def test_a_class_imported_through_another_module_has_the_path_of_its_definition(read) -> None:
    assert read("Classifies").handed_on == ("classes", "channels", "image_size")
    lineage = ModuleSource("relatives.children", module_file("relatives.children")).lineage("Through")
    assert {cls.path for cls in lineage} == {"relatives.children.Through", "relatives.parents.Model"}


def test_a_field_that_a_child_redefines_has_the_childs_type(read) -> None:
    types = {key: field.annotation for key, field in read("Wider").fields.items()}
    assert types == {"kernel": int, "norm": int, "stride": int}
    section = {"stem": {"kernel": 1, "norm": 2, "stride": 3}}
    assert config._section_mistake(section, read("WithStem"), "model", {}) is None
    section["stem"]["norm"] = "layer"
    mistake = config._section_mistake(section, read("WithStem"), "model", {})
    assert mistake == "model.stem.norm=layer: expected a whole number."


def test_handed_on_that_is_not_a_tuple_of_names_is_refused_with_the_valid_form(read) -> None:
    with pytest.raises(UserError, match=r"relatives\.children\.Wrong\.handed_on must be a tuple of names"):
        read("Wrong")


@pytest.mark.parametrize(("name", "keys"), [("Through", ["classes"]), ("Asks", ["classes", "queries"])])
def test_an_offered_argument_goes_only_to_a_model_that_names_it(read, name: str, keys: list[str]) -> None:
    task = read("OffersToo")
    assert (task.handed_on, task.offered) == (("classes",), ("queries",))
    assert list(config._handed_in(task, read(name))) == keys
    assert config._section_mistake({"width": 4}, read(name), "model", config._handed_in(task, read(name))) is None
    section = {"_target_": f"relatives.children.{name}", "width": 4}
    model = config.build_model(section, imported("OffersToo")(data=None, weight=1.0))
    assert model.arguments == {"width": 4, **{key: {"classes": 3, "queries": 5}[key] for key in keys}}


def test_options_are_built_for_an_inherited_constructor(read) -> None:
    undecorated = imported("Undecorated")
    for name in ("WithStem", "WithStemToo"):
        built = config.build({"_target_": f"relatives.children.{name}", "stem": {"kernel": 1, "norm": 2, "stride": 3}})
        assert built.stem == undecorated(kernel=1, norm=2, stride=3) and type(built.stem) is undecorated
