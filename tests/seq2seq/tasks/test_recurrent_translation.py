"""The task of translation with recurrent models: they memorise sentences, and show where they attend."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.config.check import build, construct
from common.config.compose import configure
from common.errors import UserError
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper

PAIRS = [
    ("the cat sleeps", "die Katze schläft"),
    ("the dog sleeps", "der Hund schläft"),
    ("the cat sees the dog", "die Katze sieht den Hund"),
    ("the dog sees the cat", "der Hund sieht die Katze"),
    ("a man reads 3 books", "ein Mann liest 3 Bücher"),
    ("good night!", "gute Nacht!"),
]
WIDTH = 48
TINY = [f"model.embedding_width={WIDTH}", f"model.width={WIDTH}"]
MODELS = {
    "rnn": [*TINY, "model.layers=1", "model.cell=lstm"],
    "rnn_contextual": [*TINY, f"model.maxout_width={WIDTH}"],
    "rnn_bahdanau": [*TINY, f"model.maxout_width={WIDTH}", "model.attention_width=24"],
    "rnn_luong": [*TINY, "model.layers=1"],
}
DATA = ["data.val_count=0", "data.test_count=0", "data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=280"]


def trained(name: str, folder: Path, steps: int, *more: str) -> tuple[Any, Any, list[float]]:
    """The task and the model after some steps on all pairs, and the loss of each step in nats per token."""
    file = folder / "pairs.tsv"
    file.write_text("\n".join("\t".join(pair) for pair in PAIRS), encoding="utf-8")
    keys = [f"model={name}", "data=parallel_text", f"data.train.pairs={file}", *MODELS[name], *DATA, *more]
    config = configure("train", [*keys, "optimizer.lr=1e-2"])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model = build(config["model"], **task.model_arguments())
    optimizer = optim.build(model, construct(OptimizerOptions, config["optimizer"]))
    stepper = Stepper(task, model, optimizer, torch.device("cpu"), "fp32", clip_norm=1.0)
    batch = task.data.collate([task.data.sample("train", i, None) for i in range(len(PAIRS))])
    return task, model.eval(), [float(stepper([batch], step)["nll"]) for step in range(steps)]


@pytest.mark.parametrize("name", MODELS)
def test_six_sentences_are_memorised(name: str, tmp_path: Path) -> None:
    task, model, nll = trained(name, tmp_path, 120)
    assert nll[0] > 3 and nll[-1] < 0.15, nll[-1]  # smoothing leaves -ln 0.9 = 0.105
    answers = task.predict(model.eval(), [source for source, _ in PAIRS])
    assert [records[0]["text"] for records in answers] == [target for _, target in PAIRS]


@pytest.mark.parametrize("name", ["rnn_bahdanau", "rnn_luong"])
def test_attention_has_one_head_target_tokens_and_source_tokens_and_is_drawn(name: str, tmp_path: Path) -> None:
    task, model, _ = trained(name, tmp_path, 3, "task.predict.attention=true", "task.predict.longest_extra=4")
    batch = task.data.collate([task.data.view(source, id=i) for i, (source, _) in enumerate(PAIRS)])
    answers = task.answers(model, batch)
    for i, answer in enumerate(answers):
        shape = (1, len(answer["tokens"]) + 1, int(batch["source_lengths"][i]))
        assert answer["attention"].shape == shape
        torch.testing.assert_close(answer["attention"].sum(-1), torch.ones(shape[:2]))
        alone = task.answers(model, task.data.collate([task.data.view(PAIRS[i][0], id=i)]))[0]
        torch.testing.assert_close(answer["attention"], alone["attention"], rtol=0, atol=1e-5)
    assert [*task.show(batch, answers, tmp_path / "out")] == [answer["text"] for answer in answers]
    assert len([*(tmp_path / "out").glob("*.attention.svg")]) == len(PAIRS)


@pytest.mark.parametrize("name", ["rnn", "rnn_contextual"])
def test_a_picture_of_attention_that_the_model_does_not_have_is_refused(name: str, tmp_path: Path) -> None:
    task, model, _ = trained(name, tmp_path, 1, "task.predict.attention=true")
    with pytest.raises(UserError, match="EncoderDecoder has no module named cross_attention; use false"):
        task.predict(model, PAIRS[0][0])
