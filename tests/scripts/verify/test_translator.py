"""The comparison of an imported translator with transformers: it agrees for right imports and fails for wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.machine.seeds import generator
from scripts.verify import translator as verify_translator
from scripts.verify_import import main

transformers = pytest.importorskip("transformers")

SMALL = ["model.width=16", "model.heads=2", "model.feedforward=24", "model.encoder_layers=1", "model.decoder_layers=2"]


@pytest.fixture
def file(tmp_path) -> Path:
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder")
             for key, n in (("attention_heads", 2), ("ffn_dim", 24))}  # fmt: skip
    ids = {"pad_token_id": 30, "decoder_start_token_id": 30, "eos_token_id": 0, "forced_eos_token_id": 0}
    rest: dict[str, Any] = {"activation_function": "swish", "scale_embedding": True, "max_position_embeddings": 40}
    rest |= {"encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "vocab_size": 31}
    model = transformers.MarianMTModel(transformers.MarianConfig(**sides, **ids, **rest))
    rng = generator("verify")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.normal_(std=0.3, generator=rng)
    model.save_pretrained(tmp_path)
    return tmp_path / "model.safetensors"


def test_a_correct_import_agrees(file, capsys):
    assert main([f"checkpoint={file}", "model=transformer_opus", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "outputs agree: the limit is 0.0001" in out and "none beside the file" in out


def test_a_model_that_differs_from_the_configs_is_refused_with_the_keys_to_override(file, capsys):
    changes = ["model.blocks.activation=relu", "model.scaled=false"]
    assert main([f"checkpoint={file}", "model=transformer_opus", *SMALL[1:], *changes]) == 2
    expected = "give model.width=16 model.scaled=true model.blocks.activation=swish."
    assert expected in capsys.readouterr().err


def test_another_layout_of_sines_gives_other_outputs(file, capsys):
    overrides = ["model=transformer_opus", *SMALL, "model.positions.layout=halves_t2t"]
    assert main([f"checkpoint={file}", *overrides]) == 1
    assert "OUTPUTS DIFFER" in capsys.readouterr().out


def test_averaged_weights_that_the_file_lacks_are_refused(file, capsys):
    assert main([f"checkpoint={file}", "model=transformer_opus", *SMALL, "weights=ema"]) == 2
    assert "weights=ema, but this file of another program holds no averaged weights" in capsys.readouterr().err


def test_files_without_a_peer_are_refused(file, capsys):
    for changes, message in (
        ({"model_type": "bart"}, "config.json in its folder says model_type=bart"),
        (None, "has no config.json beside it"),
    ):
        path = file.with_name("config.json")
        path.unlink() if changes is None else path.write_text(json.dumps(changes))
        assert main([f"checkpoint={file}", "model=transformer_opus", *SMALL]) == 2
        assert message in capsys.readouterr().err
    torch.save({"model": {f"encoder.{part}": torch.ones(5, 4) for part in ("embed_tokens.weight",)}}, file)
    assert main([f"checkpoint={file}", "model=transformer_opus", *SMALL]) == 2
    assert verify_translator.MODEL not in capsys.readouterr().err
