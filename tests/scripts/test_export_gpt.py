"""An exported GPT used without Triptych."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config.check import build, build_model
from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.train import assembly
from scripts import export
from scripts.exporting import language_modelling

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TEXT = "the cat sat on the mat, and the dog sat on the log. " * 40
SMALL = ["model=gpt", "model.width=16", "model.heads=2", "model.layers=2", "model.feedforward=24", "data.block=32"]
KINDS = {"characters": [], "bpe": ["data.tokenizer.kind=bpe", "data.tokenizer.vocabulary=280"]}


def save_checkpoint(folder: Path, *keys: str) -> Path:
    (folder / "text.txt").write_text(TEXT)
    config = configure("train", [*SMALL, *keys, f"data.train={folder / 'text.txt'}", "data.cache=null"])
    task = build(config["task"], data=build(config["data"]))
    model = build_model(config["model"], task)
    rng = generator("export")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=rng)
    content = {"step": 1, "model": dict(model.state_dict()), "average": None, "task": task.state(), "config": config}
    checkpoint.save(folder / "best.pt", content)
    return folder / "best.pt"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_both_graphs_continue_a_prompt_as_predict_does(kind: str, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path, *KINDS[kind])
    assert export.main([f"checkpoint={file}"]) == 0
    folder = tmp_path / "best.export"
    description = json.loads((folder / "model.json").read_text())
    assert description["kind"] == "language modelling" and {*description["graphs"]} == {"model", "decoder"}
    model, task = assembly.load(file, "trainer.device=cpu", "task.predict.method=greedy")
    prompt, never = task.data.encode("the cat"), description["decoding"]["never"]
    (answer,) = task.answers(model, next(iter(task.read("the cat"))))
    expected = [*prompt, *answer["tokens"]][:20]
    assert len({*expected}) > 4

    whole, step = (
        onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("model", "decoder")
    )
    exported = torch.export.load(folder / "model.pt2").module()

    def forbidden(logits: Any) -> np.ndarray:
        logits = np.array(logits)
        logits[never] = -np.inf
        return logits

    past, logits = np.zeros((2, 2, 1, 2, 0, 8), np.float32), np.empty(0)
    tokens: list[int] = []
    for n in range(20):
        token = prompt[n] if n < len(prompt) else int(forbidden(logits).argmax())
        tokens.append(token)
        logits, past = step.run(None, {"tokens": np.array([token]), "past": past})
        logits = logits[0]
        (all_logits,) = whole.run(None, {"tokens": np.array([tokens])})
        np.testing.assert_allclose(all_logits[0, -1], logits, rtol=0, atol=1e-4)
        (torch_logits,) = exported(torch.tensor([tokens]))
        np.testing.assert_allclose(torch_logits[0, -1], logits, rtol=0, atol=1e-4)
    assert tokens == expected
    pieces = folder / description["tokenizer"].get("pieces", "tokenizer.json")
    assert pieces.is_file()
    if kind == "characters":
        assert len(json.loads(pieces.read_text())) == len(logits)


def test_another_model_of_language_is_refused(tmp_path: Path) -> None:
    _, task = assembly.load(save_checkpoint(tmp_path), "trainer.device=cpu")
    with pytest.raises(UserError, match=r"Linear cannot be exported: only seq2seq\.models\.gpt\.Gpt can"):
        language_modelling.plan(torch.nn.Linear(2, 2), task)
