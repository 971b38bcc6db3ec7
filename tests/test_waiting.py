"""The only device-to-host copy in a forward pass and its loss is the matching cost; shown without a GPU.

PyTorch's fake tensors have shapes and devices but no values, so that every read of a value raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from common.config.check import build
from common.config.compose import configure
from detr.criterion import set_loss
from detr.criterion.matcher import Matches


@contextmanager
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


class Images:
    """The part of a set of images that a step uses."""

    channels, image_size = 1, (8, 8)

    def classes(self) -> list[str]:
        return ["a", "b"]

    def inputs(self, batch: dict[str, Any], device: torch.device) -> torch.Tensor:
        images: torch.Tensor = batch["images"].to(device)
        return images


def on_gpu(*shape: int, integers: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64 if integers else torch.float32, device="cuda")


def move_to_gpu(model: nn.Module) -> nn.Module:
    """The model with fake parameters and buffers on a GPU; `.to` does not support fake tensors."""
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="cuda"))
        for name, tensor in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(tensor, device="cuda")
    return model


@fake_tensors()
def test_reading_a_value_of_a_fake_tensor_raises() -> None:
    assert on_gpu(3).device.type == "cuda"
    with pytest.raises(DataDependentOutputException):
        float(on_gpu(3).sum())
    with pytest.raises(DynamicOutputShapeException):
        on_gpu(3).nonzero()


def test_detr_reads_only_matching_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("train", ["model=detr"])
    task, model = build(config["task"], data=None), build(config["model"], classes=3)
    calls = []

    def match(*arguments: Any) -> Matches:
        calls.append(arguments)
        return Matches(*(on_gpu(4, integers=True) for _ in range(4)))

    monkeypatch.setattr(set_loss, "match", match)
    with fake_tensors():
        batch = {"images": on_gpu(2, 3, 64, 64).byte(), "sizes": on_gpu(2, 2, integers=True), "padded": True}
        batch |= {"boxes": on_gpu(2, 4), "labels": on_gpu(2, integers=True), "counts": [2, 0]}
        total, parts = task.loss(move_to_gpu(model), batch, task.normalisers(batch))
        assert len(calls) == 1 and total.device.type == "cuda" and {"class", "box", "giou"} <= parts.keys()


def test_vit_reads_no_value() -> None:
    config = configure("train", ["model=vit"])
    task = build(config["task"], data=Images())
    model = build(config["model"], **task.model_arguments())
    with fake_tensors():
        batch = {"images": on_gpu(2, 1, 8, 8), "labels": on_gpu(2, integers=True)}
        batch |= {"other_labels": on_gpu(2, integers=True), "shares": on_gpu(2)}
        assert task.loss(move_to_gpu(model), batch, {"images": 2.0})[0].device.type == "cuda"


def test_a_translator_reads_no_value() -> None:
    config = configure("train", ["model=seq2seq"])
    task = build(config["task"], data=None)
    model = build(config["model"], vocabularies=(20, 20), joint=True)
    with fake_tensors():
        batch = {name: on_gpu(2, 5, integers=True) for name in ("source", "target_in", "target_out")}
        batch |= {name: on_gpu(2, integers=True) for name in ("source_lengths", "target_lengths")}
        assert task.loss(move_to_gpu(model), batch, {"tokens": 10.0})[0].device.type == "cuda"
