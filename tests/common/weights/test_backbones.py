"""A backbone's weights from files and from a download."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.resnet import Backbone, BackboneOptions
from common.weights.backbones import load_weights
from tests.file_server import serving


def options(name: str = "resnet18", weights: str | Path = "none") -> BackboneOptions:
    return BackboneOptions(name=name, weights=str(weights), dilation=False, frozen=0)


def backbone(name: str = "resnet18") -> Backbone:
    torch.manual_seed(0)
    return Backbone(options(name), official_padding=False)


def torchvision_file(folder: Path, name: str = "resnet18") -> tuple[Path, dict[str, Tensor]]:
    """A file as published: with a classifier, and num_batches_tracked in each norm."""
    model = getattr(torchvision.models, name)()
    rng = generator("file")
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.5)
    path = folder / f"{name}.pth"
    torch.save(model.state_dict(), path)
    return path, model.state_dict()


def assert_holds(model: Backbone, tensors: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_weights_come_from_a_torchvision_file(tmp_path: Path) -> None:
    path, tensors = torchvision_file(tmp_path)
    model = backbone()
    load_weights(model, options(weights=path))
    assert_holds(model, tensors)


def test_weights_come_from_an_official_detr_file(tmp_path: Path) -> None:
    _, tensors = torchvision_file(tmp_path)
    official = {f"backbone.0.body.{name}": value for name, value in tensors.items()}
    official["class_embed.bias"] = torch.zeros(92)
    path = tmp_path / "detr.pth"
    torch.save({"model": official}, path, _use_new_zipfile_serialization=False)
    model = backbone()
    load_weights(model, options(weights=path))
    assert_holds(model, tensors)


def test_values_that_are_not_finite_are_returned_in_a_warning_and_integers_are_refused(tmp_path: Path) -> None:
    path, tensors = torchvision_file(tmp_path)
    assert load_weights(backbone(), options(weights=path)) == []
    torch.save({**tensors, "bn1.bias": torch.full_like(tensors["bn1.bias"], torch.nan)}, path)
    assert "NaN or infinite values are in bn1.bias" in load_weights(backbone(), options(weights=path))[0]
    torch.save({**tensors, "bn1.bias": tensors["bn1.bias"].long()}, path)
    with pytest.raises(UserError, match=r"resnet18\.pth holds bn1\.bias as int64, expected float32"):
        load_weights(backbone(), options(weights=path))


def test_a_file_of_another_resnet_is_refused_and_named(tmp_path: Path) -> None:
    path, _ = torchvision_file(tmp_path, "resnet34")
    model = backbone("resnet50")
    before = model.conv1.weight.clone()
    with pytest.raises(UserError, match=r"resnet34.pth does not match model.backbone.name=resnet50: .* layer1.0.conv1"):
        load_weights(model, options("resnet50", path))
    assert torch.equal(model.conv1.weight, before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.pth does not exist"):
        load_weights(backbone(), options(weights=tmp_path / "nowhere.pth"))


def test_imagenet_weights_without_a_network_are_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # an empty cache
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError, match=r"of resnet18 are missing: https://.*Name or.*put it at .*weights=FILE"):
        load_weights(backbone(), options(weights="imagenet_v1"))
    with pytest.raises(UserError, match="not for small"):
        load_weights(backbone("small"), options("small", weights="imagenet_v1"))


def test_imagenet_weights_are_downloaded_to_torchvisions_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensors = torchvision_file(tmp_path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        server.files[f"/resnet18-{digits}.pth"] = path.read_bytes()
        server.cut_after = [1_000_000]
        entry = SimpleNamespace(url=f"{server.address}/resnet18-{digits}.pth")
        monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: {"IMAGENET1K_V1": entry})
        for _ in range(2):
            model = backbone()
            load_weights(model, options(weights="imagenet_v1"))
            assert_holds(model, tensors)
        assert len(server.requests) == 2 and (tmp_path / "hub" / "checkpoints" / f"resnet18-{digits}.pth").exists()


def test_downloaded_imagenet_weights_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", None)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    path, tensors = torchvision_file(tmp_path)
    path.rename(cache / torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    model = backbone()
    load_weights(model, options(weights="imagenet_v1"))
    assert_holds(model, tensors)
