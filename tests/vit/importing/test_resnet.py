"""ResNets of torchvision and timm by checkpoint=FILE give the logits of those programs; variants are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from foreign_files import CLASSES
from foreign_files import randomised_resnet as randomised
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from common.train import assembly
from vit.importing.formats import adopt
from vit.importing.resnet import recognises

SIZE = (64, 64)


def loaded(state: dict[str, Any], folder: Path, model: str) -> Any:
    torch.save(state, folder / "resnet.pth")
    return assembly.load(folder / "resnet.pth", f"model={model}", "data.image_size=64", "trainer.device=cpu")


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    pixels = torch.randn(2, 3, *SIZE, generator=generator("images"))
    with torch.no_grad():
        logits, expected = ours(pixels), theirs(pixels)
    assert logits.shape == (2, CLASSES) and (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_torchvisions_files_give_the_logits_of_torchvision(name: str, tmp_path: Path) -> None:
    theirs = randomised(getattr(torchvision.models, name)(num_classes=CLASSES))
    model, task = loaded(theirs.state_dict(), tmp_path, name)
    assert_same(model, theirs)
    assert task.classes == [f"class {i}" for i in range(CLASSES)]


def test_a_file_without_counters_under_a_wrapper_and_in_half_precision_is_read(tmp_path: Path) -> None:
    theirs = randomised(torchvision.models.resnet18(num_classes=CLASSES)).half().float()
    state = {f"module.{n}": t.half() for n, t in theirs.state_dict().items() if "num_batches" not in n}
    model, _ = loaded({"state_dict": state, "epoch": 3}, tmp_path, "resnet18")
    assert_same(model, theirs)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_timms_files_of_the_same_network_give_the_logits_of_timm(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomised(timm.create_model(name, num_classes=CLASSES))
    model, _ = loaded(theirs.state_dict(), tmp_path, name)
    assert_same(model, theirs)


def test_a_run_keeps_the_body_and_re_initialises_the_head_for_other_classes(tmp_path: Path) -> None:
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    config = configure("train", ["model=resnet18", "data=digits"])
    task = build(config["task"], data=build(config["data"]))
    model = build(config["model"], **task.model_arguments())
    line = assembly.load_initial_weights(model, task, tmp_path / "resnet.pth")
    assert line.endswith("re-initialised: conv1.weight, head.weight, head.bias"), "digits are grey"


def test_classes_of_the_data_are_taken_where_the_head_has_as_many() -> None:
    state = torchvision.models.resnet18(num_classes=2).state_dict()
    adopted = adopt(state, ["ant", "bee"], SIZE)
    assert adopted.task_state == {"classes": ["ant", "bee"]} and "order of the data's: ant, bee" in adopted.notes[0]
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    assert adopt(body, None, SIZE).task_state == {"classes": []} and not adopt(body, None, SIZE).notes


def test_a_file_of_another_depth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another model than model=ResNet as configured"):
        loaded(torchvision.models.resnet34().state_dict(), tmp_path, "resnet18")


@pytest.mark.parametrize("name", ["resnet50d", "seresnet50"])
def test_variants_are_refused_with_the_name_of_a_tensor(name: str) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state: dict[str, Tensor] = timm.create_model(name).state_dict()
    extra = {"resnet50d": "conv1.0.weight", "seresnet50": "layer1.0.se."}
    assert recognises(state)
    with pytest.raises(UserError, match=rf"variant of a ResNet \(it has {extra[name]}.*; give a ResNet of torchvision"):
        adopt(state, None, SIZE)
