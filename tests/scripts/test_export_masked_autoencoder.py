"""An exported masked autoencoder used without Triptych."""

import json
from pathlib import Path

import pytest
import torch

from common.config.check import build, build_model
from common.config.compose import configure
from common.files import checkpoint
from common.machine.seeds import generator
from common.train import assembly
from scripts import export

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = ["model=mae", "model.width=16", "model.heads=2", "model.layers=1", "model.feedforward=24"]


def write_autoencoder(file: Path, *keys: str) -> Path:
    """A checkpoint of a small autoencoder, all of whose parameters are random."""
    config = configure("train", [*SMALL, *keys])
    task = build(config["task"], data=build(config["data"]))
    model = build_model(config["model"], task)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator("export"))
    content = {"step": 1, "model": dict(model.state_dict()), "average": None, "task": task.state(), "config": config}
    checkpoint.save(file, content)
    return file


@pytest.mark.parametrize("side", [None, 12])
def test_files_give_the_models_outputs_for_any_visible_patches(side: int | None, tmp_path: Path) -> None:
    file = write_autoencoder(tmp_path / "best.pt", "task.mask.normalise=true")
    keys = [] if side is None else [f"data.image_size={side}"]
    assert export.main([f"checkpoint={file}", *keys]) == 0

    folder, side = tmp_path / "best.export", side or 8
    patches = (side // 2) ** 2
    description = json.loads((folder / "model.json").read_text())
    assert description["kind"] == "masked autoencoding" and description["patches"] == [side // 2, side // 2]
    assert set(description["graphs"]) == {"encoder", "model"} and "standard deviation" in description["pixels"]
    restored, _ = assembly.load(file, "trainer.device=cpu", *keys)
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "model")
    }
    programs = {name: torch.export.load(folder / f"{name}.pt2").module() for name in sessions}
    for count in (1, 5, patches - 1):
        images = torch.randn(4, 1, side, side, generator=generator("images"))
        order = torch.rand(4, patches, generator=generator("visible", count)).argsort(dim=1)
        inputs = {"encoder": {"images": images}, "model": {"images": images, "visible": order[:, :count]}}
        with torch.no_grad():
            # The encoder's features of a patch do not depend on the order in which it receives the patches.
            shuffled = restored.encode(images, order)
            back = order.argsort(dim=1)[:, :, None].expand(-1, -1, shuffled.shape[-1])
            features = torch.cat((shuffled[:, :1], shuffled[:, 1:].gather(1, back)), dim=1)
            expected = {"encoder": features, "model": restored(**inputs["model"])}
        for name, output in expected.items():
            (by_onnx,) = sessions[name].run(None, {key: tensor.numpy() for key, tensor in inputs[name].items()})
            (by_torch,) = programs[name](*inputs[name].values())
            torch.testing.assert_close(torch.from_numpy(by_onnx), output, rtol=0, atol=1e-4)
            torch.testing.assert_close(by_torch, output, rtol=0, atol=1e-4)


def test_a_graph_for_one_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_autoencoder(tmp_path / "best.pt")
    assert export.main([f"checkpoint={file}", "--size", "8x8"]) == 2
    assert "--size 8x8 is for classifiers of images and detectors" in capsys.readouterr().err
