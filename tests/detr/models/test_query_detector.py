"""The base class of detectors with queries: which stages a subclass must define, and what it inherits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.nn.blocks import BlockOptions, Memory, Stack
from common.nn.linear import Linear
from detr.models.query_detector import Image, Outputs, Queries, QueryDetector

WIDTH, QUERIES, LAYERS = 16, 3, 2


class Minimal(QueryDetector):
    """The three stages, and nothing else that the base class has."""

    auxiliary = True

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, WIDTH, 8, 8)
        options = BlockOptions(width=WIDTH, heads=2, feedforward=32, pre_norm=False)
        self.decoder = Stack(options, layers=LAYERS, final_norm=True, cross=True)
        self.queries = nn.Embedding(QUERIES, WIDTH)
        self.head = Linear(WIDTH, 6)

    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        memory = self.project(images).flatten(2).transpose(1, 2)  # (B, C, H', W') -> (B, M, C)
        return Image(Memory(memory, memory, None))

    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        assert image.memory.values is not None
        queries = self.queries.weight.expand(len(image.memory.values), -1, -1)  # (B, Q, C)
        return Queries(torch.zeros_like(queries), queries)

    def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        logits, boxes = self.head(x).split([2, 4], -1)
        return {"logits": logits, "boxes_cxcywh": boxes.sigmoid()}


class Guided(Minimal):
    guided = True


def without(*stages: str) -> type[QueryDetector]:
    """A subclass that lacks some stages."""
    members: dict[str, Any] = {name: vars(Minimal)[name] for name in ("look", "ask", "read") if name not in stages}
    return type("Incomplete", (QueryDetector,), members)


@pytest.mark.parametrize("stages", [("look",), ("ask",), ("read",), ("look", "ask", "read")], ids=str)
def test_a_class_that_lacks_a_stage_is_refused_when_it_is_built(stages: tuple[str, ...]) -> None:
    with pytest.raises(TypeError, match=f"abstract class Incomplete.*{'.*'.join(sorted(stages))}"):
        without(*stages)()


@torch.no_grad()
def test_a_class_with_three_stages_is_complete() -> None:
    outputs = Minimal()(torch.zeros(2, 3, 32, 32), None)
    assert [layer["logits"].shape for layer in outputs] == LAYERS * [(2, QUERIES, 2)]
    assert [layer["boxes_cxcywh"].shape for layer in outputs] == LAYERS * [(2, QUERIES, 4)]


def test_a_subclass_of_a_complete_class_may_define_one_stage() -> None:
    class Scored(Minimal):
        def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
            return {**super().read(layer, x, guide, image), "scores": x[..., :1]}

    assert "scores" in copy.deepcopy(Scored())(torch.zeros(1, 3, 16, 16), None)[-1]


def test_a_guided_class_without_follow_is_named() -> None:
    with pytest.raises(NotImplementedError, match="Guided is guided, so it must define follow"):
        Guided()(torch.zeros(1, 3, 16, 16), None)


def test_a_class_made_from_a_detectors_class_can_replace_it() -> None:
    """fully_shard replaces a module's class by one that inherits from a mixin and from that class."""
    model = Minimal()
    model.__class__ = type("Sharded", (type("Mixin", (), {}), Minimal), {})
    assert isinstance(model, QueryDetector) and len(model(torch.zeros(1, 3, 16, 16), None)) == LAYERS
