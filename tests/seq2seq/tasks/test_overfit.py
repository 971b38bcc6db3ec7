"""Overfitting: a translator that cannot memorise eight sentences has a mistake somewhere between text and step."""

from pathlib import Path

import pytest
import torch

from common.config.check import build, construct
from common.config.compose import configure
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper

PAIRS = [
    ("the cat sleeps", "die Katze schläft"),
    ("the dog sleeps", "der Hund schläft"),
    ("the cat sees the dog", "die Katze sieht den Hund"),
    ("the dog sees the cat", "der Hund sieht die Katze"),
    ("a man reads", "ein Mann liest"),
    ("a man reads 3 books", "ein Mann liest 3 Bücher"),
    ("13 men read 31 books", "13 Männer lesen 31 Bücher"),
    ("good night!", "gute Nacht!"),
]
TINY = ["model.width=32", "model.heads=2", "model.feedforward=64"]
MODELS = {"seq2seq": ["model.encoder_layers=1", "model.decoder_layers=1"], "gpt_translator": ["model.layers=2"]}
DATA = ["data.val_count=0", "data.test_count=0", "data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=280"]


@pytest.mark.parametrize("model_name", MODELS)
def test_eight_sentences_are_memorised(model_name: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join("\t".join(pair) for pair in PAIRS), encoding="utf-8")
    shape = [f"model={model_name}", *TINY, *MODELS[model_name]]
    keys = [*shape, "data=parallel_text", f"data.train.pairs={file}", *DATA, "optimizer.lr=5e-3"]
    config = configure("train", keys)
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model = build(config["model"], **task.model_arguments())
    optimizer = optim.build(model, construct(OptimizerOptions, config["optimizer"]))
    stepper = Stepper(task, model, optimizer, torch.device("cpu"), "fp32", clip_norm=1.0)

    batch = task.data.collate([task.data.sample("train", i, None) for i in range(len(PAIRS))])
    nll = [float(stepper([batch], step)["nll"]) for step in range(120)]
    assert nll[0] > 3 and nll[-1] < 0.15, nll[-1]  # smoothing leaves -ln 0.9 = 0.105

    answers = task.predict(model.eval(), batch)
    assert [answer["text"] for answer in answers] == [target for _, target in PAIRS]
    lines = task.data.collate([task.data.view(source, id=i) for i, (source, _) in enumerate(PAIRS)])
    assert [*task.show(lines, task.predict(model, lines), tmp_path)] == [target for _, target in PAIRS]
