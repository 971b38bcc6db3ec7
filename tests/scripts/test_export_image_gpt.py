"""An exported image GPT used without Triptych."""

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

SMALL = ["model=igpt", "model.width=16", "model.heads=2", "model.layers=1", "model.feedforward=24"]
CASES = {
    "autoregressive": [],
    "masked, with a classifier": ["task.loss.objective=masked", "task.loss.classification=1"],
}


@pytest.mark.parametrize("case", CASES)
def test_files_give_the_models_outputs_for_any_batch_size(case: str, tmp_path: Path) -> None:
    config = configure("train", [*SMALL, *CASES[case]])
    task = build(config["task"], data=build(config["data"]))
    model = build_model(config["model"], task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator("export"))
    content = {"step": 1, "model": dict(model.state_dict()), "average": None, "task": task.state(), "config": config}
    checkpoint.save(tmp_path / "best.pt", content)
    assert export.main([f"checkpoint={tmp_path / 'best.pt'}"]) == 0

    folder, masked = tmp_path / "best.export", case != "autoregressive"
    description = json.loads((folder / "model.json").read_text())
    assert len(description["palette"]) == 17 and description["kind"] == "image modelling"
    tokens = torch.randint(17, (4, 64), generator=generator("tokens"))
    inputs = {"tokens": tokens, **({"masked": tokens % 5 == 0} if masked else {})}
    restored, _ = assembly.load(tmp_path / "best.pt", "trainer.device=cpu")
    with torch.no_grad():
        expected = [output for output in restored(*inputs.values()) if output is not None]
    assert len(expected) == (2 if masked else 1)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    exported = torch.export.load(folder / "model.pt2").module()(*inputs.values())
    for onnx_output, torch_output, output in zip(outputs, exported, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(onnx_output), output, rtol=0, atol=1e-4)
        torch.testing.assert_close(torch_output, output, rtol=0, atol=1e-4)
