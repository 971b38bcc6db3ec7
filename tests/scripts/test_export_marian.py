"""The export to transformers from the command line, and reading it back through the doors."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizing import BYTE_OPTIONS

from common.config.check import build
from common.config.compose import configure
from common.files import checkpoint
from common.machine.seeds import generator
from common.train import assembly
from scripts import export_marian
from scripts.export_marian import main
from seq2seq.tokenizers.bpe import Tokenizer

transformers = pytest.importorskip("transformers")

SMALL = [
    "model=transformer_base",
    "model.width=16",
    "model.heads=2",
    "model.feedforward=24",
    "model.encoder_layers=2",
    "model.decoder_layers=1",
    "model.longest=24",
    "task.predict.longest_extra=5",
    "data.source=en",
    "data.target=fr",
]


def save_checkpoint(path: Path, *changes: str) -> Path:
    """Write a checkpoint of a random model with interleaved positions and no output bias, as in the paper."""
    config = configure("train", [*SMALL, *changes])
    model = build(config["model"], vocabularies=(260, 260), joint=True)
    rng = generator("export")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=rng)
    task = {"tokenizers": [Tokenizer.train([], BYTE_OPTIONS).state()]}
    content = {"step": 7, "model": dict(model.state_dict()), "average": None, "task": task, "config": config}
    checkpoint.save(path, content)
    return path


def test_an_export_agrees_and_is_read_back_through_the_doors(tmp_path, capsys):
    file = save_checkpoint(tmp_path / "best.pt")
    folder = tmp_path / "for marian"
    assert main([str(file), "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "compared  outputs agree" in out and "has no GNMT length penalty" in out and "step 7, raw" in out
    assert transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).config.vocab_size == 260
    (line,) = [line for line in out.splitlines() if line.startswith("use")]
    overrides = shlex.split(line.partition("python predict.py ")[2])
    assert overrides.pop() == "input=-"
    parts = assembly.restore(configure("evaluate", overrides, assembly.stored_config))
    original = checkpoint.load(file)
    assert all(torch.equal(tensor, original["model"][name]) for name, tensor in parts.model.state_dict().items())
    assert parts.task.state() == original["task"] and parts.data.target == "fr"


def test_a_different_output_is_reported(tmp_path, capsys, monkeypatch):
    """One bias of one layer is off by 0.01."""
    write_export = export_marian.write

    def write(exported: Any, folder: Path) -> None:
        name = "model.encoder.layers.0.fc1.bias"
        write_export(exported._replace(tensors=exported.tensors | {name: exported.tensors[name] + 0.01}), folder)

    monkeypatch.setattr(export_marian, "write", write)
    assert main([str(save_checkpoint(tmp_path / "best.pt")), "--output", str(tmp_path / "out")]) == 1
    assert "OUTPUTS DIFFER" in capsys.readouterr().out


def test_without_transformers_nothing_is_compared(tmp_path, capsys, monkeypatch):
    def missing(*_: Any) -> float:
        raise ModuleNotFoundError("transformers")

    monkeypatch.setattr(export_marian, "_peer", missing)
    assert main([str(save_checkpoint(tmp_path / "best.pt")), "--output", str(tmp_path / "out")]) == 0
    assert "compared  nothing: transformers is not installed" in capsys.readouterr().out


REFUSED = {
    "pre-norm": (["model.blocks.pre_norm=true"], "model.blocks.pre_norm=true is unsupported by transformers' Marian"),
    "positions": (["model.positions.layout=halves_t2t"], "model.positions.layout=halves_t2t is unsupported"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_marian_lacks_is_refused_and_nothing_is_written(tmp_path, capsys, changes, message):
    assert main([str(save_checkpoint(tmp_path / "best.pt", *changes)), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_files_and_folders_are_refused(tmp_path, capsys):
    file = save_checkpoint(tmp_path / "best.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / "foreign.pt")
    content = {**checkpoint.load(file), "config": {"model": {"_target_": "vit.models.classifier.Classifier"}}}
    checkpoint.save(tmp_path / "vit.pt", content)
    for path, output, message in (
        (tmp_path / "no.pt", "out", "does not exist"),
        (tmp_path / "foreign.pt", "out", "was not written by this program"),
        (
            tmp_path / "vit.pt",
            "out",
            "Classifier; only seq2seq.models.transformer.Transformer can be exported",
        ),
        (file, ".", "or a folder with other content; give a new folder"),
        (file, "best.pt", "is a file, or a folder with other content; give a new folder"),
    ):
        assert main([str(path), "--output", str(tmp_path / output)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_may_be_overwritten(tmp_path):
    file, folder = save_checkpoint(tmp_path / "best.pt"), tmp_path / "out"
    for _ in range(2):
        assert main([str(file), "--output", str(folder)]) == 0
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 30
