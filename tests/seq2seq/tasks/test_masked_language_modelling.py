"""Masked language modelling: fixed masks in evaluation, normalisers before the cut, learning, and filling in blanks."""

import io
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from berts import WORDS, redrawn, sentences

from common.config.check import build, build_model
from common.config.compose import configure
from common.data.batching import Loader
from common.errors import UserError
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from seq2seq.tasks.masked_language_modelling import MaskedLanguageModelling, _filled, _records

SMALL = ["width=16", "heads=2", "layers=1", "feedforward=24", "longest=40", "blocks.dropout=0"]
SMALL += ["blocks.attention_dropout=0"]
OPTIMIZER = OptimizerOptions(
    name="adamw", lr=1e-2, weight_decay=0.0, decay_norms=False, betas=(0.9, 0.98), eps=1e-8, momentum=0.0, rates={},
    layer_decay=1.0, reference_batch=None, scaling="linear",
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences(80, longest=12)) + "\n", encoding="utf-8")
    return path


def task_and_model(file: Path, *keys: str) -> tuple[MaskedLanguageModelling, Any]:
    command = ["model=bert", *(f"model.{key}" for key in SMALL), f"data.train={file}", "data.tokenizer.vocabulary=70"]
    config = configure("train", [*command, *keys])
    task: MaskedLanguageModelling = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    return task, build_model(config["model"], task)


def batches(task: MaskedLanguageModelling, keys: list[tuple[int, tuple[int, ...]]]) -> list[dict[str, Any]]:
    return list(Loader(task.data, "train", seed=3, workers=0, pin=False)(keys))


def test_the_loss_is_the_mean_over_masked_tokens_computed_plainly(file):
    task, model = task_and_model(file)
    (batch,) = batches(task, [(0, tuple(range(10)))])
    masked = task._mask(batch)
    real = torch.arange(masked.inputs.shape[1]) < batch["lengths"][:, None]
    logits = model(masked.inputs, real)
    chosen = torch.zeros(real.shape, dtype=torch.bool)
    chosen.view(-1)[masked.selected] = True
    expected = F.cross_entropy(logits[chosen], batch["tokens"][chosen])
    loss, parts = task.loss(model, batch, task.normalisers(batch))
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    assert parts == {} and task.normalisers(batch) == {"tokens": float(chosen.sum())}
    assert int(chosen.sum()) == sum(max(1, round(0.15 * n)) for n in batch["lengths"].tolist())


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_step_is_the_same_however_it_is_split(file, whole_words):
    """In double precision, so that only an error and not rounding can cause a difference."""
    weights = []
    for cut in ([8], [3, 1, 4], [1] * 8):
        task, model = task_and_model(file, f"task.masks.whole_words={whole_words}")
        redrawn(model).double()
        indices = iter(range(8))
        keys = [(0, tuple(next(indices) for _ in range(count))) for count in cut]
        stepper = Stepper(task, model, optim.build(model, OPTIMIZER), torch.device("cpu"), "fp32", None)
        stepper(batches(task, keys), 0)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-9)


def test_masks_change_from_epoch_to_epoch_and_are_fixed_in_evaluation(file):
    task, _ = task_and_model(file)
    first, again, next_epoch = batches(task, [(0, (0, 1, 2)), (0, (0, 1, 2)), (1, (0, 1, 2))])
    assert torch.equal(task._mask(first).inputs, task._mask(again).inputs)
    assert not torch.equal(task._mask(first).inputs, task._mask(next_epoch).inputs)
    val = [task.data.sample("val", i, None) for i in range(4)]
    together = task._mask(task.data.collate(val))
    alone = task._mask(task.data.collate(val[2:3]))
    length = len(val[2]["tokens"])
    assert torch.equal(together.inputs[2, :length], alone.inputs[0])


def test_a_small_model_learns_a_few_sentences_and_the_numbers_show_it(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"the {animal} {verb} the {thing}" for animal, verb, thing in
                              zip(WORDS[2:6], WORDS[7:11], WORDS[11:15], strict=True)) + "\n")  # fmt: skip
    keys = ["data.val_share=0", "data.test_share=0", "data.tokenizer.vocabulary=40", "task.predict.top=2"]
    task, model = task_and_model(path, *keys)
    optimizer = optim.build(model, OPTIMIZER)
    for epoch in range(150):
        (batch,) = batches(task, [(epoch, (0, 1, 2, 3))])
        loss, _ = task.loss(model, batch, task.normalisers(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metric = task.metric("train")
    metric.update(batch, task.answers(model.eval(), {key: value for key, value in batch.items() if key != "seeds"}))
    metric.gather()
    numbers = metric.compute()
    assert numbers["nats"] < 0.5 * numbers["unigram_nats"] and numbers["accuracy"] > numbers["unigram_accuracy"]
    assert numbers["unigram_nats"] < math.log(40), "that of equal probabilities"


def test_the_unigram_model_counts_train_and_is_stored(file):
    task, model = task_and_model(file)
    batch = task.data.collate([task.data.sample("val", i, None) for i in range(3)])
    answers = task.answers(model, batch)
    counts = torch.tensor(task.state()["token_counts"], dtype=torch.float64)
    shares = (counts + 1) / (counts + 1).sum()
    targets = task._mask(batch).targets
    assert sum(answer["unigram_nats"] for answer in answers) == pytest.approx(-shares[targets].log().sum().item())
    assert sum(answer["unigram_correct"] for answer in answers) == int((targets == counts.argmax()).sum())
    restored, _ = task_and_model(file)
    restored.data.train = "missing.txt"
    restored.restore(task.state())
    assert restored.state() == task.state() and restored.answers(model, batch) == answers


def test_the_unigram_model_has_no_numbers_for_a_checkpoint_without_counts(file):
    """That of imported weights. A guess would look like a measured number."""
    task, model = task_and_model(file)
    batch = task.data.collate([task.data.sample("val", i, None) for i in range(3)])
    state = task.state()
    assert not task.evaluation_notes()
    task.restore({**state, "token_counts": []})
    metric = task.metric("val")
    metric.expected = None
    metric.update(batch, task.answers(model, batch))
    metric.gather()
    assert metric.compute().keys() == {"nats", "accuracy"} and len(metric.details()) == 2
    assert "how often each token occurs" in task.evaluation_notes()[0]


def test_a_sample_longer_than_the_model_allows_is_refused_with_the_datas_key(file):
    task, model = task_and_model(file)
    batch = task.data.collate([task.data.sample("val", 0, None)])
    model.longest = 3
    for compute in (lambda: task.answers(model, batch), lambda: task.loss(model, batch, task.normalisers(batch))):
        with pytest.raises(UserError, match=r"more than model.longest=3.*give data.longest=3"):
            compute()


def test_blanks_are_filled_with_shares_that_are_those_of_the_model(file):
    task, model = task_and_model(file, "task.predict.top=3")
    redrawn(model)
    records = task.predict(model, "the man [MASK] a dog")
    assert [{*record} for record in records] == [{"name", "share", "text"}] * 3
    tokenizer = task.data.text_tokenizer()
    tokens = torch.tensor([[2, *tokenizer.encode_with_blanks("the man [MASK] a dog"), 3]])
    logits = model(tokens)[0][tokens[0] == 4][0]
    logits[[0, 1, 2, 3, 4]] = -torch.inf
    shares, ids = logits.softmax(0).topk(3)
    assert [record["name"] for record in records] == [tokenizer.entries[i] for i in ids.tolist()]
    assert [record["share"] for record in records] == pytest.approx(shares.tolist(), rel=1e-4)
    assert all(record["name"].removeprefix("##") in record["text"] for record in records)
    several = task.predict(model, ["<mask> man", "[MASK] and [MASK] and the dog"])
    assert len(several) == 2 and [len(blank) for blank in several[1]] == [3, 3]
    assert "<small>" in several[0]._repr_html_()


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("a [MASK].", ["horse"], "a horse."),
        ("[MASK] and <mask>", ["one", "two"], "one and two"),
        ("walk [MASK] here", ["##ing"], "walking here"),
    ],
)
def test_fillings_are_put_into_the_text(text, names, expected):
    assert _filled(text, names) == expected


def test_a_filling_without_a_space_before_it_is_joined_except_at_the_start():
    records = _records("a [MASK] runs", [[("##s", 0.6), ("man", 0.4)]])
    assert [(record["name"], record["text"]) for record in records[0]] == [("##s", "as runs"), ("man", "a man runs")]
    assert _records("<mask> runs", [[("##He", 1.0)]]) == [[{"name": "He", "share": 1.0, "text": "He runs"}]]


def test_a_text_on_the_command_line_and_lines_of_a_file_are_answered(file, tmp_path):
    task, model = task_and_model(file, "task.predict.top=2")
    (batch,) = task.read("the man [MASK] a [MASK]")
    lines = list(task.show(batch, task.answers(model, batch), tmp_path))
    assert len(lines) == 3 and lines[0].startswith("the man") and lines[2].startswith("  2: ")
    assert "[MASK]" not in lines[0] and len(lines[1].split(", ")) == 2
    path = tmp_path / "lines.txt"
    path.write_bytes(b"a [MASK]\n\nno blank here\n" + b"a [MASK] " * 30 + b"\n\xff [MASK]\n<mask> runs\n")
    (batch,) = task.read(str(path))
    answers = task.answers(model, batch)
    shown = list(task.show(batch, answers, tmp_path))
    assert ["blanks" in answer for answer in answers] == [True, False, False, False, True]
    assert len(shown) == 2 + 1 + 1 + 1 + 2
    assert task.unanswered[0].startswith("Line 3 was not answered: it has no blank; write [MASK]")
    assert "more than model.longest=40" in task.unanswered[1] and "not valid UTF-8" in task.unanswered[2]


def test_standard_input_is_read(file, monkeypatch, tmp_path):
    task, model = task_and_model(file)
    path = tmp_path / "in.txt"
    path.write_text("a [MASK]\n")
    with path.open() as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream.buffer))
        (batch,) = task.read("-")
    assert len(task.answers(model, batch)[0]["blanks"]) == 1


def test_mistakes_end_in_one_sentence(file):
    task, model = task_and_model(file)
    with pytest.raises(UserError, match=r"Text 1 was not answered: it has no blank; write \[MASK\] in place of a word"):
        task.predict(model, "a dog")
    with pytest.raises(UserError, match=r"Text 2 was not answered: it has \d+ tokens, more than model.longest=40"):
        task.predict(model, ["a [MASK]", "a [MASK] " * 30])
    with pytest.raises(UserError, match=r"A text .str., a list of texts"):
        task.predict(model, 5)
    with pytest.raises(UserError, match=r"contains no tokenizer"):
        task.restore({})
    with pytest.raises(UserError, match=r"counts 2 entries, and its tokenizer has 70"):
        task.restore({**task.state(), "token_counts": [1, 2]})
        task.answers(model, task.data.collate([task.data.sample("val", 0, None)]))


def test_a_model_worse_than_equal_probabilities_raises_an_alarm(file):
    task, _ = task_and_model(file)
    good, bad = ({"tokens": 1, "nats": nats} for nats in (4.0, 5.0))
    assert task.alarms([good] * 20) == [] and task.alarms([bad] * 5) == []
    assert "5.00 nats per masked token are more than the 4.25" in task.alarms([bad] * 20)[0]
