"""The protocols of optional members declare all that is looked up by name, and nothing else."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from common.task import OptionalData, OptionalMetric, OptionalModel, OptionalTask, answers_of
from detr.data.protocol import DetectionData, LaneData, MaskData, PanopticData
from detr.models.detector import Detector
from seq2seq.models.transformer import Transformer
from seq2seq.tasks.translation import Translation
from vit.models.classifier import Classifier

ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / f"{door}.py" for door in ("train", "evaluate", "predict")),
    *(file for room in ("common", "detr", "vit", "seq2seq") for file in (ROOT / room).rglob("*.py")),
]
PROTOCOLS = {"model": OptionalModel, "task": OptionalTask, "data": OptionalData, "metric": OptionalMetric}


def members(protocol: Any) -> set[str]:
    """The names that a protocol declares."""
    return {name for name in {*protocol.__annotations__, *vars(protocol)} if not name.startswith("_")}


def looked_up(file: Path) -> set[tuple[str, str]]:
    """(model, task or data; name) of each getattr and hasattr on one of these with a literal name."""
    members_used: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            owner, name = ast.unparse(node.args[0]).rpartition(".")[2], node.args[1]
            if isinstance(name, ast.Constant):
                parts = ("model", "task") if owner == "part" else (owner,)
                members_used |= {(part, str(name.value)) for part in parts if part in PROTOCOLS}
    return members_used


def test_every_optional_member_is_declared_and_looked_up() -> None:
    declared = {(part, name) for part, protocol in PROTOCOLS.items() for name in members(protocol)}
    of_detr = {
        ("data", name) for protocol in (DetectionData, LaneData, MaskData, PanopticData) for name in members(protocol)
    }
    assert set().union(*map(looked_up, FILES)) - (of_detr - declared) == declared


@pytest.mark.parametrize(
    ("cls", "protocol"),
    [
        *((cls, OptionalModel) for cls in (Classifier, Detector, Transformer)),
        (Translation, OptionalTask),
    ],
)
def test_our_classes_have_the_declared_signatures(cls: Any, protocol: Any) -> None:
    methods = {name for name in members(protocol) if callable(getattr(protocol, name, None)) and hasattr(cls, name)}
    assert methods or cls is Transformer
    for name in methods:
        declared, ours = (list(inspect.signature(getattr(owner, name)).parameters) for owner in (protocol, cls))
        assert ours == declared, name


class Present:
    """A task with both methods, as the wings have them."""

    def answers(self, model: Any, batch: Any) -> list[Any]:
        return [{"of": batch["name"]}]

    def predict(self, model: Any, input: Any) -> list[Any]:
        return self.answers(model, input) if isinstance(input, dict) else ["records"]


class Former:
    """A task of an earlier version."""

    def predict(self, model: Any, batch: Any) -> list[Any]:
        return [{"former": batch["name"]}]


class FormerChild(Present):
    """A subclass of a task as it was in an earlier version: it changes the answers to batches."""

    def predict(self, model: Any, batch: Any) -> list[Any]:
        return [answer | {"more": 1} for answer in super().predict(model, batch)]


class Child(FormerChild):
    """A subclass that defines `answers` as the last of the two."""

    def answers(self, model: Any, batch: Any) -> list[Any]:
        return [{"new": batch["name"]}]


def test_answers_are_those_of_the_method_that_a_class_defines_last() -> None:
    expected = {Present: {"of": 1}, Former: {"former": 1}, FormerChild: {"of": 1, "more": 1}, Child: {"new": 1}}
    for kind, answer in expected.items():
        assert answers_of(kind(), None, {"name": 1}) == [answer], kind
