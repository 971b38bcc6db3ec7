"""Classification of texts: learning, starting from a masked language model, predictions, and mistakes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from berts import bert, redrawn, sentences, word_piece
from tokenizing import BYTE_OPTIONS

from common.config.check import build, build_model
from common.config.compose import configure
from common.data.batching import Loader
from common.errors import UserError
from common.files import checkpoint
from common.train import assembly, optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from seq2seq.tasks.sentence_classification import SentenceClassification
from seq2seq.tokenizers.bpe import Tokenizer

TEXTS = sentences(60)
SMALL = ["width=16", "heads=2", "layers=1", "feedforward=24", "longest=40", "blocks.dropout=0"]
SMALL += ["blocks.attention_dropout=0"]
OPTIMIZER = OptimizerOptions(
    name="adamw", lr=1e-2, weight_decay=0.0, decay_norms=False, betas=(0.9, 0.98), eps=1e-8, momentum=0.0, rates={},
    layer_decay=1.0, reference_batch=None, scaling="linear",
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "texts.tsv"
    rows = [f"{'animal' if 'dog' in text or 'horse' in text else 'other'}\t{text}" for text in TEXTS]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def config_of(file: Path, *keys: str) -> dict[str, Any]:
    command = ["model=bert_classifier", *(f"model.{key}" for key in SMALL), f"data.train={file}"]
    return configure("train", [*command, "data.tokenizer.vocabulary=70", *keys])


def task_of(file: Path, *keys: str) -> SentenceClassification:
    config = config_of(file, *keys)
    task: SentenceClassification = build(config["task"], data=build(config["data"]))
    return task


def task_and_model(file: Path, *keys: str) -> tuple[SentenceClassification, Any]:
    task = task_of(file, *keys)
    torch.manual_seed(0)
    return task, build_model(config_of(file, *keys)["model"], task)


def test_a_small_model_learns_which_word_decides(file):
    task, model = task_and_model(file, "data.val_share=0", "data.test_share=0")
    (batch,) = Loader(task.data, "train", seed=0, workers=0, pin=False)([(0, tuple(range(60)))])
    optimizer = optim.build(model, OPTIMIZER)
    for _ in range(60):
        loss, parts = task.loss(model, batch, task.normalisers(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metric = task.metric("train")
    metric.update(batch, task.answers(model.eval(), batch))
    metric.gather()
    assert parts == {} and metric.compute()["accuracy"] > 0.95 and metric.compute()["f1_macro"] > 0.95
    records = task.predict(model, TEXTS)
    names = {text: record[0]["name"] for text, record in zip(TEXTS, records, strict=True)}
    answers = task.answers(model, batch)
    assert [names[text] for text in batch["texts"]] == [answer["name"] for answer in answers]
    assert {*names.values()} == {"animal", "other"}
    assert sum(record["share"] for record in records[0]) == pytest.approx(1.0, abs=1e-5)


def test_a_step_is_the_same_however_it_is_split(file):
    """In double precision, so that only an error and not rounding can cause a difference."""
    weights = []
    for cut in ([8], [3, 1, 4], [1] * 8):
        task, model = task_and_model(file, "task.loss.smoothing=0.1")
        redrawn(model).double()
        indices = iter(range(8))
        keys = [(0, tuple(next(indices) for _ in range(count))) for count in cut]
        micro_batches = list(Loader(task.data, "train", seed=0, workers=0, pin=False)(keys))
        Stepper(task, model, optim.build(model, OPTIMIZER), torch.device("cpu"), "fp32", None)(micro_batches, 0)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-9)


def test_a_run_starts_from_a_masked_language_model_and_takes_its_tokenizer(file, tmp_path):
    tokenizer = word_piece(75)
    masked = bert(tokenizer.size, layers=1, longest=40)
    config = configure("train", ["model=bert", *(f"model.{key}" for key in SMALL)])
    state = {"tokenizer": tokenizer.state(), "token_counts": [0] * tokenizer.size}
    content = {"step": 1, "model": dict(masked.state_dict()), "average": None, "task": state, "config": config}
    checkpoint.save(tmp_path / "bert.pt", content)
    parts = assembly.assemble(config_of(file, f"checkpoint={tmp_path}/bert.pt", "trainer.device=cpu"))
    task: Any = parts.task
    assert task.data.text_tokenizer().state() == tokenizer.state()
    for name, tensor in parts.model.state_dict().items():
        if name.startswith(("embeddings.", "encoder.")):
            assert torch.equal(tensor, masked.state_dict()[name]), name
    assert "re-initialised: representation.weight, representation.bias, head.weight, head.bias" in parts.weights_line
    assert "unused: output_bias, transform.bias" in parts.weights_line


def test_predictions_need_no_data_and_list_the_most_probable_classes(file, tmp_path):
    trained, model = task_and_model(file)
    task = task_of(tmp_path / "missing.tsv")
    task.restore(trained.state())
    redrawn(model)
    (batch,) = task.read("a dog runs")
    (line,) = task.show(batch, task.answers(model, batch), tmp_path)
    assert {part.split(" ")[0] for part in line.split("\t")} == {"animal", "other"}
    path = tmp_path / "lines.txt"
    path.write_text(f"a dog\n\n{'a dog ' * 30}\n")
    (batch,) = task.read(str(path))
    assert [*task.show(batch, task.answers(model, batch), tmp_path)][1] == ""
    assert "Line 3 was not answered: it has" in task.unanswered[0]


def test_mistakes_end_in_one_sentence(file):
    task, _ = task_and_model(file)
    with pytest.raises(UserError, match="contains no tokenizer"):
        task.restore({"classes": ["a"]})
    with pytest.raises(UserError, match="has no classifier and no classes; first train one"):
        task.restore({"tokenizer": task.state()["tokenizer"], "classes": []})
    with pytest.raises(UserError, match="is of the kind bpe, and a WordPiece or"):
        task.inherit({"tokenizer": Tokenizer.train([], BYTE_OPTIONS).state()})


def test_advice_and_alarms(file, tmp_path):
    task, _ = task_and_model(file)
    assert task.advice(False) == [] and task.alarms([{"label": 1, "name": "other"}] * 9) == []
    assert 'all texts are classified as "other"' in task.alarms([{"label": 1, "name": "other"}] * 10)[0]
    (tmp_path / "one.tsv").write_text("".join(f"good\t{text}\n" for text in TEXTS))
    assert "all texts have the class 'good'" in task_and_model(tmp_path / "one.tsv")[0].advice(False)[0]
