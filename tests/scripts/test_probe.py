"""The table of linear probes of an image GPT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config.check import build, build_model
from common.config.compose import configure
from common.files import checkpoint
from common.train import assembly
from scripts import probe

SMALL = ["model=igpt", "model.width=16", "model.heads=2", "model.layers=1", "model.feedforward=24"]


def save_checkpoint(path: Path, arguments: list[str]) -> Path:
    config = configure("train", arguments)
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model = build_model(config["model"], task)
    content = {"step": 1, "model": dict(model.state_dict()), "average": None, "task": task.state(), "config": config}
    checkpoint.save(path, content)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("probe") / "best.pt", SMALL)


def restored(path: Path) -> Any:
    config = configure("evaluate", [f"checkpoint={path}", "trainer.device=cpu"], assembly.stored_config)
    return assembly.restore(config)


def test_features_are_those_of_the_pixels_and_of_each_layer(saved: Path) -> None:
    parts = restored(saved)
    features, labels = probe.compute_features(parts, "val")
    images, expected_labels = parts.data.load()["val"]
    assert list(features) == ["pixels", "layer 0", "output"]
    np.testing.assert_allclose(features["pixels"], images.flatten(1).double() / 127.5 - 1, atol=1e-6)
    assert np.array_equal(labels, expected_labels.numpy())
    tokens = parts.task.palette.encode(images)
    for name, layer in zip(("layer 0", "output"), parts.model.layer_features(tokens), strict=True):
        np.testing.assert_allclose(features[name], layer.detach(), atol=1e-5)


def test_the_table_has_a_row_for_the_pixels_and_each_layer(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main([f"checkpoint={saved}", "trainer.device=cpu", "--per-class", "10"]) == 0
    printed = capsys.readouterr().out
    assert [name in printed for name in ("pixels", "layer 0", "output", "layer 1")] == [True, True, True, False]


def test_raw_digits_are_nearly_separable_with_ten_images_of_each_class(saved: Path) -> None:
    """Ten labelled images per class give about 0.85; guessing gives 0.1."""
    results = probe.probe(restored(saved), per_class=10)
    assert results["pixels"].test > 0.7


def test_other_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_checkpoint(tmp_path / "vit.pt", ["model=vit", *SMALL[1:]])
    assert probe.main([f"checkpoint={file}", "trainer.device=cpu"]) == 2
    assert "Classifier has no layers of pixels to probe" in capsys.readouterr().err
