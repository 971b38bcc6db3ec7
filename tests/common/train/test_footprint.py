"""A model's memory is known before it is allocated, and what cannot fit is refused."""

import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.check import build, build_model
from common.config.compose import configure
from common.errors import UserError
from common.machine import memory
from common.train import assembly, footprint

ARCHIVE = Path(__file__).parents[2] / "data/vit_4f99cde/run.tar.xz"


class Sizes:
    """A task with the arguments of each wing's models."""

    offered = ("classes", "logits", "channels", "image_size", "vocabularies", "joint")

    def model_arguments(self) -> dict[str, Any]:
        return {
            **{"classes": 10, "logits": 11, "channels": 3, "image_size": (32, 32)},
            **{"vocabularies": (100, 100), "joint": True},
        }


@pytest.mark.parametrize("model", ["detr", "vit", "seq2seq"])
def test_the_elements_are_counted_as_those_of_the_built_model(model: str) -> None:
    section = configure("train", [f"model={model}"])["model"]
    state = torch.get_rng_state()
    measured = footprint.measure(section, Sizes())  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state), "the initial weights stay the same"
    built = build_model(section, Sizes())
    elements = sum(tensor.numel() for tensor in (*built.parameters(), *built.buffers()))
    trained = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    assert measured is not None and (measured.all, measured.trained) == (elements, trained)


@pytest.mark.parametrize(
    ("arguments", "largest"),
    [
        (("model=detr", "model.queries=1000000000"), "queries.weight (1000000000, 128)"),
        (("model=vit", "model.width=10000000"), "(30000000, 10000000)"),
        (("model=vit", "model.feedforward=2000000000", "model.width=2000000000"), "more than 2^63 bytes"),
        (("model=seq2seq", "model.feedforward=2000000000"), "(2000000000, 128)"),
    ],
)
def test_a_model_that_cannot_fit_is_refused_with_its_largest_parameter(
    arguments: tuple[str, ...], largest: str
) -> None:
    config = configure("train", arguments)
    with pytest.raises(UserError, match="check_memory=false to try it nevertheless") as refusal:
        footprint.refuse_oversize(config, Sizes(), torch.device("cpu"), training=False)  # type: ignore[arg-type]
    assert largest in str(refusal.value)


def test_it_is_refused_before_it_is_built_in_training_and_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "build_model", lambda *_: pytest.fail("it was built"))
    with pytest.raises(UserError, match="GiB to hold the weights"):
        assembly.assemble(configure("train", ["model=vit", "model.width=10000000"]))
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    content = torch.load(next(tmp_path.rglob("best.pt")), weights_only=True)
    content["config"]["model"]["width"] = 10_000_000
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(UserError, match="GiB to hold the weights"):
        assembly.load(tmp_path / "a.pt")


def test_what_is_counted_depends_on_training_and_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure("train", ["model=vit", "optimizer=adamw_vit_small", "trainer.ema_decay=0.9"])
    task = build(config["task"], data=build(config["data"]))
    elements = footprint.measure(config["model"], task)
    assert elements is not None

    def refused(capacity: int, training: bool, **changes: Any) -> bool:
        monkeypatch.setattr(memory, "capacity", lambda device: capacity)
        try:
            footprint.refuse_oversize({**config, **changes}, task, torch.device("cpu"), training=training)
        except UserError:
            return True
        return False

    weights, training = elements.all * 4, (elements.all + 4 * elements.trained) * 4
    assert [refused(weights - 1, False), refused(weights, False)] == [True, False]
    assert [refused(training - 1, True), refused(training, True)] == [True, False]
    assert not refused(training - 1, True, trainer={**config["trainer"], "strategy": "fsdp"})
    assert not refused(1, True, check_memory=False)


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.capacity(torch.device("cpu"))
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    unlimited = memory.capacity(torch.device("cpu"))
    assert whole is not None and unlimited is not None and whole <= unlimited
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.capacity(torch.device("cpu")) == 1_000_000


def test_a_model_that_cannot_be_built_without_content_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_with_content(section: object, task: object) -> torch.nn.Module:
        return torch.nn.Linear(1, int(torch.ones(1).item()))

    monkeypatch.setattr(footprint, "build_model", build_with_content)
    assert footprint.measure({}, Sizes()) is None  # type: ignore[arg-type]
