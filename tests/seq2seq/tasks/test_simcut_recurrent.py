"""SimCut with recurrent translators equals a plain loop."""

from pathlib import Path

import pytest

from tests.cutting import SIMCUT, batches, check_loss, kept, make

SEPARATE = ["data.tokenizer.joint=false", "data.tokenizer.vocabulary=261", "model.tied=none"]
MODELS = {
    "rnn": ["model.width=16", "model.cell=lstm"],
    "rnn_contextual": ["model.width=12", "model.maxout_width=16"],
    "rnn_bahdanau": ["model.width=12", "model.maxout_width=16", "model.attention_width=8"],
    "rnn_luong": ["model.width=16", "model.layers=2"],
}


@pytest.mark.parametrize("vocabularies", ["joint", "separate"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_loss_of_a_plain_loop_with_its_gradients(tmp_path: Path, name: str, vocabularies: str) -> None:
    keys = [f"model={name}", "model.embedding_width=16", *MODELS[name], *SIMCUT]
    task, model = make(tmp_path, *keys, *(SEPARATE if vocabularies == "separate" else []))
    (batch,) = batches(task, [8])
    source, target = kept(batch, "source"), kept(batch, "target_in")
    separate = {"source_embedding": [source], "embedding": [target]}
    calls = separate if vocabularies == "separate" else {"embedding": [source, target]}
    check_loss(task, model.double(), batch, calls)
