"""Translators exported for CTranslate2: its own engine gives our translations and scores, from texts."""

import json
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizing import BYTE_OPTIONS

from common.config.check import build
from common.config.compose import configure
from common.decoding.decode import decode
from common.files import checkpoint
from common.machine.seeds import generator
from common.train import assembly
from scripts import export
from scripts.exporting import ctranslate2_folder
from seq2seq.tokenizers.bpe import EOS, SPECIAL, Tokenizer

ctranslate2 = pytest.importorskip("ctranslate2")

SMALL = [
    *("model=transformer_base", "model.width=16", "model.heads=2", "model.feedforward=24", "model.longest=40"),
    *("model.encoder_layers=2", "model.decoder_layers=1", "task.predict.method=greedy"),
    *("task.predict.longest_extra=9", "task.predict.longest_factor=0", "data.source=en", "data.target=fr"),
]
# CTranslate2 answers a source that is only the end with nothing, so that no text here is empty.
TEXTS = ["Hello there", "a", "3 days ago, naïve café", "日本 <s> </s>", "x" * 20, "1 2 3 4 5"]
END_BIAS = 10.0  # of the end's logit in models with an output bias: some of their translations end before the limit
# The models: the paper's, and one that differs from it in all options that published translators vary.
CASES = {
    "paper": [],
    "other": [
        *("model.tied=none", "model.positions.layout=halves_t2t", "model.positions.first=2", "model.output_bias=true"),
        *("model.scaled=false", "model.blocks.activation=swish", "model.blocks.norm_eps=1e-3"),
    ],
}


def save_checkpoint(path: Path, *changes: str) -> Path:
    """Write a checkpoint of a random model, whose translations have the maximum length, but some with output bias."""
    config = configure("train", [*SMALL, *changes])
    tokenizer = Tokenizer.train([], BYTE_OPTIONS)
    model = build(config["model"], vocabularies=(tokenizer.size, tokenizer.size), joint=True)
    rng = generator("export")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.1 if parameter.ndim < 2 else 2 * parameter.shape[1] ** -0.5
            parameter.normal_(mean=float(name.endswith("norm.weight")), std=scale, generator=rng)
        if model.output_bias is not None:
            model.output_bias[EOS] += END_BIAS
    task = {"tokenizers": [tokenizer.state()]}
    content = {"step": 7, "model": dict(model.state_dict()), "average": None, "task": task, "config": config}
    checkpoint.save(path, content)
    return path


def run(file: Path, folder: Path, form: str) -> int:
    return export.main([f"checkpoint={file}", "--output", str(folder), "--format", form])


@pytest.mark.parametrize("case", CASES)
def test_ctranslate2_and_tokenizers_alone_give_our_translations_and_scores(case: str, tmp_path: Path) -> None:
    file, folder = save_checkpoint(tmp_path / "best.pt", *CASES[case]), tmp_path / "out"
    assert run(file, folder, "ctranslate2") == 0
    model, task = assembly.load(file, "trainer.device=cpu")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = [library.encode(text).tokens for text in TEXTS]
    description = json.loads((folder / "model.json").read_text())
    engine = ctranslate2.Translator(str(folder / "ctranslate2"), device="cpu", compute_type="float32")
    results = engine.translate_batch(
        words,
        beam_size=1,
        max_decoding_length=9,
        **description["ctranslate2"]["options"],
    )
    ids = [library.encode(text).ids for text in TEXTS]
    lengths = torch.tensor([*map(len, ids)])
    source = torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, ids)], batch_first=True)
    options = replace(task.options, at_limit="cut")
    expected = [hypotheses[0] for hypotheses in decode(model, source, lengths, options, SPECIAL)]
    found = [[library.token_to_id(word) for word in result.hypotheses[0]] for result in results]
    assert found == [hypothesis.tokens for hypothesis in expected]
    lengths_of_ended = [len(hypothesis.tokens) for hypothesis in expected if hypothesis.ended]
    assert bool(lengths_of_ended) == (case == "other") and len(lengths_of_ended) < len(TEXTS)
    assert case == "paper" or any(lengths_of_ended), "one ends after some tokens"


def test_an_int8_folder_is_smaller_and_the_models_weights_stay_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sizes are those of weights in one and in four bytes; positions, norms and biases keep four."""
    file, folder = save_checkpoint(tmp_path / "best.pt", *CASES["other"]), tmp_path / "out"
    model, task = assembly.load(file, "trainer.device=cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for form in ctranslate2_folder.COMPUTE_TYPES:
        ctranslate2_folder.write(model, task, tmp_path / form, form)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    sizes = [(tmp_path / form / "model.bin").stat().st_size for form in ctranslate2_folder.COMPUTE_TYPES]
    assert 0.25 * sizes[0] < sizes[1] < 0.6 * sizes[0]
    assert run(file, folder, "ctranslate2_int8,ctranslate2") == 0
    printed = capsys.readouterr().out
    assert "greedy  8 of 8 " in printed and "ctranslate2_int8, milliseconds" in printed


def test_a_wrong_weight_is_reported_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = ctranslate2_folder._fill_cross_attention

    def patched(part: Any, block: Any) -> None:
        original(part, block)
        part.linear[1].bias[-1] += 0.1

    monkeypatch.setattr(ctranslate2_folder, "_fill_cross_attention", patched)
    assert run(save_checkpoint(tmp_path / "best.pt"), tmp_path / "out", "ctranslate2") == 1
    assert "log probabilities of ctranslate2 differ by" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_pre_norm_translator_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = save_checkpoint(tmp_path / "best.pt", "model.blocks.pre_norm=true")
    assert run(file, tmp_path / "out", "ctranslate2") == 2
    assert "post-norm blocks, but this one has model.blocks.pre_norm=true; give --format" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert run(tmp_path / "best.pt", tmp_path / "out", "ctranslate2") == 2
    assert "needs ctranslate2, which is not installed: pip install ctranslate2" in capsys.readouterr().err
