"""Runs of the smaller kinds of models that are cut back to an earlier checkpoint end as the uninterrupted ones."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from berts import sentences
from resuming import cut_back

from common.files import checkpoint

Door = Callable[..., str]
TEXTS = sentences(60, longest=8)
RUN = ["trainer.steps=6", "trainer.eval_every=2", "trainer.save_every=2", "trainer.log_every=1", "trainer.device=cpu"]
RUN += ["trainer.ema_decay=0.5", "schedule.warmup=1"]
PAIRS = ["data=parallel_text", "data.train.pairs={pairs}", "data.val_count=6", "data.test_count=6"]
PAIRS += ["data.batch_size=400", "data.longest=100", "data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=262"]
PAIRS += ["task.predict.method=greedy", "task.predict.longest_factor=0.2", "task.predict.longest_extra=9"]
RECURRENT = [*PAIRS, "model.width=8", "model.embedding_width=8", "model.dropout=0.2"]
BLOCKS = ["model.width=8", "model.heads=2", "model.feedforward=8", "model.blocks.dropout=0.2"]
MODELS = {
    "rnn": ["model=rnn", *RECURRENT],
    "rnn_contextual": ["model=rnn_contextual", *RECURRENT, "model.maxout_width=8", "model.cell=lstm"],
    "rnn_bahdanau": ["model=rnn_bahdanau", *RECURRENT, "model.maxout_width=8", "model.attention_width=8"],
    "rnn_luong": ["model=rnn_luong", *RECURRENT, "model.layers=2"],
    "gpt_translator": ["model=gpt_translator", *PAIRS, *BLOCKS, "model.layers=1"],
    "bert_translator": ["model=bert_translator", *PAIRS, *BLOCKS, "model.encoder_layers=1", "model.decoder_layers=1"],
    "simcut": ["model=rnn_bahdanau", *RECURRENT, "model.maxout_width=8", "task.loss.simcut.weight=3"],
    "bert_classifier": [
        *("model=bert_classifier", "data.train={classes}", *BLOCKS, "model.layers=1", "data.batch_size=200"),
        *("data.longest=20", "data.tokenizer.vocabulary=70", "model.longest=40"),
    ],
    "word2vec": [
        *("model=word2vec", "data.train={text}", "model.width=8", "data.words.min_count=1", "data.passage=100"),
        *("trainer.epochs=null", "trainer.steps=6"),
    ],
}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", MODELS)
def test_a_resumed_run_has_the_weights_and_numbers_of_an_uninterrupted_one(
    model: str, inside: Door, tmp_path: Path
) -> None:
    files = {
        "pairs": [f"{text}\t{text[::-1]}" for text in TEXTS],
        "classes": [f"{'long' if len(text) > 20 else 'short'}\t{text}" for text in TEXTS],
        "text": TEXTS,
    }
    for name, lines in files.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    keys = [key.format(**{name: tmp_path / name for name in files}) for key in MODELS[model]]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    warmup = [] if model == "word2vec" else RUN[-1:]
    command = [*RUN[:-1], *warmup, *keys]
    inside("train", *command, f"run_dir={whole}")
    cut_back(whole, cut, 4)
    assert "resuming at 4" in inside("train", *command, f"run_dir={cut}", "resume=auto", "trainer.workers=1")
    for name in ("metrics.jsonl", "results.json"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    contents = [checkpoint.load(folder / "checkpoints/step_00000006.pt") for folder in (whole, cut)]
    for part in ("model", "average", "optimizer"):
        torch.testing.assert_close(contents[1][part], contents[0][part], rtol=0, atol=0)
