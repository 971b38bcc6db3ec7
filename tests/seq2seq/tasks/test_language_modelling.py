"""The task of language modelling: loss, exact code lengths, prompts and their refusals, state and streaming."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from common.train import evaluator
from seq2seq.tasks.language_modelling import LanguageModelling
from seq2seq.tokenizers.characters import Characters

CPU = torch.device("cpu")
WORDS = "zero one two three four five six seven eight nine".split()
CONTENT = "".join(f"{WORDS[n % 10]} {WORDS[n // 10 % 10]} {WORDS[n * n % 7]}\n" for n in range(100))
TINY = ["model.width=16", "model.heads=2", "model.layers=2", "model.feedforward=24", "model.longest=40"]
BPE = ["data.tokenizer.kind=bpe", "data.tokenizer.vocabulary=290"]
Built = Callable[..., tuple[LanguageModelling, nn.Module]]


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Returns a function that makes the task of a command line on CONTENT, and a small model with large weights."""
    (tmp_path / "all.txt").write_text(CONTENT)

    def make(*keys: str) -> tuple[LanguageModelling, nn.Module]:
        data = [f"data.train={tmp_path / 'all.txt'}", "data.block=16", "data.batch_size=64", "data.cache=null"]
        config = configure("train", ["model=gpt", *TINY, *data, "task.predict.longest_extra=12", *keys])
        task = build(config["task"], data=build(config["data"]))
        assert isinstance(task, LanguageModelling)
        model = build(config["model"], **task.model_arguments())
        rng = generator("weights", 0)
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3, generator=rng)
        return task, model.eval()

    return make


def evaluated(task: LanguageModelling, model: nn.Module, split: Any = "test", **options: Any) -> dict[str, float]:
    keys: dict[str, Any] = {"device": CPU, "precision": "fp32", "batch_size": 64, "workers": 0}
    return evaluator.evaluate(task, task.data, model, split, **keys | options)[0]


def prompt_batch(*texts: str, raw: bool = True) -> dict[str, Any]:
    ids = [*range(1, len(texts) + 1)]
    return {"ids": ids, "prompts": [*texts], "problems": {}, "origins": {}, "raw": raw}


# Loss and code length.


def test_the_loss_of_the_targets_that_count_is_divided_by_those_of_the_step(built: Built) -> None:
    task, model = built("data.stride=4")
    batch = task.data.collate([task.data.sample("val", i, None) for i in (0, 3, 7)])
    assert task.normalisers(batch) == {"tokens": 12.0}
    loss, parts = task.loss(model, batch, {"tokens": 24.0})
    logits = model(batch["tokens"])
    expected = F.cross_entropy(logits[batch["counts"]], batch["targets"][batch["counts"]])
    torch.testing.assert_close(loss, expected / 2)
    assert loss.requires_grad and parts == {}


def test_a_step_is_the_same_however_it_is_cut(built: Built) -> None:
    task, model = built()
    samples = [task.data.epoch_sample("train", i, 1) for i in range(6)]
    whole = task.data.collate(samples)
    total = task.normalisers(whole)
    task.loss(model, whole, total)[0].backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for part in (samples[:1], samples[1:4], samples[4:]):
        task.loss(model, task.data.collate(part), total)[0].backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("keys", [[], BPE], ids=["characters", "bpe"])
def test_the_code_length_is_that_of_each_token_computed_alone(built: Built, keys: list[str]) -> None:
    """For each token, the model sees exactly the context that the window of this token has."""
    task, model = built("data.stride=5", *keys)
    numbers = evaluated(task, model)
    tokens = [task.data.text_tokenizer().special.begin, *task.data.tokens("test").tolist()]
    nats = 0.0
    with torch.no_grad():
        for i in range(1, len(tokens)):
            end = min(len(tokens) - 1, ((i - 1) // 5 + 1) * 5)
            context = tokens[max(0, end - 16) : i]
            nats += float(F.cross_entropy(model(torch.tensor([context]))[:, -1].double(), torch.tensor([tokens[i]])))
    text = CONTENT[-task.data.amounts("test").characters :]
    bits = nats / math.log(2)
    assert numbers["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert numbers["bits_per_character"] == pytest.approx(bits / len(text), rel=1e-5)
    assert numbers["perplexity"] == pytest.approx(math.exp(nats / (len(tokens) - 1)), rel=1e-4)
    assert numbers["bits_per_token"] > 1


def test_the_code_length_does_not_depend_on_the_batches(built: Built) -> None:
    task, model = built("data.stride=3")
    assert evaluated(task, model) == pytest.approx(evaluated(task, model, batch_size=16), rel=1e-6)
    part = evaluated(task, model, samples=5)
    assert part["bits_per_token"] != evaluated(task, model)["bits_per_token"]


def test_a_block_longer_than_the_context_is_refused(built: Built) -> None:
    task, model = built("data.block=41")
    with pytest.raises(UserError, match=r"data.block=41 is more than model.longest=40"):
        evaluated(task, model)


def test_pictures_of_attention_are_refused(built: Built) -> None:
    with pytest.raises(UserError, match="no cross-attention"):
        built("task.predict.attention=true")


def test_the_results_state_the_stride(built: Built) -> None:
    task, _ = built("data.stride=3", "data.tokenizer.lowercase=true")
    first, second = task.evaluation_notes()
    assert "at least 13 tokens" in first and "stride of 3" in first and "lowercases" in second


def test_a_model_worse_than_chance_is_reported(built: Built) -> None:
    task, _ = built()
    size = task.data.text_tokenizer().size
    assert task.alarms([{"nats": 10 * math.log(size), "tokens": 10}]) == []
    assert "optimizer.lr" in task.alarms([{"nats": 20 * math.log(size), "tokens": 10}])[0]


# Prompts.


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
@pytest.mark.parametrize("keys", [[], BPE], ids=["characters", "bpe"])
def test_a_record_has_the_text_and_score_of_a_continuation(built: Built, method: str, keys: list[str]) -> None:
    task, model = built(f"task.predict.method={method}", *keys)
    records = task.predict(model, ["one ", "zero one two"])
    (alone,) = task.predict(model, "zero one two")
    assert records[1] == [alone] or method == "sample", "a sample also depends on the number of the prompt"
    for (record,), prompt in zip(records, ("one ", "zero one two"), strict=True):
        assert record.keys() == {"text", "score"} and record["text"] and record["score"] < 0
        assert not record["text"].startswith(prompt)


def test_the_score_of_a_continuation_is_its_log_probability(built: Built) -> None:
    task, model = built("task.predict.method=greedy", "task.predict.penalty=none")
    (answer,) = task.answers(model, prompt_batch("one t"))
    ids = task.data.encode("one t")
    logits = model(torch.tensor([[*ids, *answer["tokens"]]])).log_softmax(-1)[0, len(ids) - 1 : -1]
    expected = logits.gather(1, torch.tensor(answer["tokens"])[:, None]).sum().detach()
    assert answer["score"] == pytest.approx(float(expected), abs=1e-4) and len(answer["tokens"]) == 12
    assert answer["text"] == task.data.text_tokenizer().decode(answer["tokens"])


def test_given_texts_are_scored(built: Built) -> None:
    task, model = built("task.predict.method=given", "task.predict.penalty=none")
    good, empty = task.predict(model, ["one two", ""])
    begin = task.data.text_tokenizer().special.begin
    tokens = torch.tensor([[begin, *task.data.encode("one two")]])
    expected = -F.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:], reduction="sum").detach()
    assert good == [{"text": "one two", "score": pytest.approx(float(expected), abs=1e-4)}]
    assert empty == [{"text": "", "score": 0.0}]
    lines = [*task.show(prompt_batch("one two", raw=False), task.answers(model, prompt_batch("one two")), Path("x"))]
    assert lines == [f"1\t{good[0]['score']:.4f}\tone two"]


def test_a_text_as_long_as_the_context_is_scored_and_a_longer_one_is_not(built: Built) -> None:
    task, model = built("task.predict.method=given", "model.longest=16")
    fits, longer = task.answers(model, prompt_batch("one two zero one", "one two zero one "))
    assert len(fits["tokens"]) == 16 and "it has 17 tokens" in longer["problem"]


def test_samples_differ_and_their_seed_repeats_them(built: Built) -> None:
    keys = ["task.predict.method=sample", "task.predict.candidates=3"]
    task, model = built(*keys)
    (records,) = [task.predict(model, "one ")]
    assert len({record["text"] for record in records}) == 3 and records == task.predict(model, "one ")
    assert records != built(*keys, "task.predict.seed=1")[0].predict(model, "one ")
    answers = task.answers(model, prompt_batch("one "))
    lines = [*task.show(prompt_batch("one "), answers, Path("x"))]
    assert [line.split("\t")[0] for line in lines] == ["1"] * 3 and all("one " in line for line in lines)
    assert not any("\n" in line for line in lines)


def test_an_unknown_token_is_never_written(built: Built) -> None:
    task, model = built("task.predict.method=sample", "task.predict.candidates=20", "task.predict.temperature=100")
    characters = {*"".join(record["text"] for record in task.predict(model, "one"))}
    assert "\ufffd" not in characters and len(characters) > 10


def test_prompts_that_cannot_be_continued_are_listed_and_change_no_others(built: Built, tmp_path: Path) -> None:
    task, model = built("task.predict.method=greedy")
    texts = [b"one ", b"x" * 41, b"\xffone", "größe".encode(), b"", b"two"]
    (tmp_path / "in.txt").write_bytes(b"\n".join(texts))
    (batch,) = task.read(str(tmp_path / "in.txt"))
    answers = task.answers(model, batch)
    assert [i for i, answer in enumerate(answers) if "problem" in answer] == [1, 2, 3]
    assert task.unanswered == [
        "Line 2 was not continued: it has 41 tokens, more than model.longest=40, the context of the model; give a "
        "shorter prompt.",
        "Line 3 was not continued: it is not valid UTF-8 (byte 0xff); convert the text to UTF-8, or correct the line.",
        "Line 4 was not continued: the vocabulary lacks its characters 'ö', 'ß'; write the prompt without them.",
    ]
    for i, text in ((0, "one "), (5, "two")):
        assert answers[i]["tokens"] == task.answers(model, prompt_batch(text))[0]["tokens"]
    assert answers[4]["text"], "an empty prompt is the begin token"
    lines = [*task.show(batch, answers, tmp_path)]
    assert [bool(line) for line in lines] == [True, False, False, False, True, True]
    assert lines[0].startswith("one ") and not any("\n" in line for line in lines)
    for text, message in (("größe", "Prompt 1 was not continued: the vocabulary lacks"), ("x" * 41, "more than model")):
        with pytest.raises(UserError, match=message):
            task.predict(model, text)


def test_a_prompt_of_the_whole_context_gets_one_token(built: Built) -> None:
    task, model = built("task.predict.method=greedy")
    answers = task.answers(model, prompt_batch("o" * 40, "o" * 35))
    assert [len(answer["tokens"]) for answer in answers] == [1, 6]


def test_a_raw_text_keeps_its_line_feeds(built: Built) -> None:
    task, _ = built()
    answers = [{"text": " two\nthree\\", "score": -1.0, "tokens": [5]}]
    assert [*task.show(prompt_batch("one"), answers, Path("x"))] == ["one two\nthree\\"]
    assert [*task.show(prompt_batch("one", raw=False), answers, Path("x"))] == [r"one two\nthree\\"]


# Streaming.


@pytest.mark.parametrize("method", ["greedy", "sample"])
@pytest.mark.parametrize("keys", [[], BPE], ids=["characters", "bpe"])
def test_a_stream_is_the_text_that_is_shown_piece_by_piece(built: Built, method: str, keys: list[str]) -> None:
    task, model = built(f"task.predict.method={method}", *keys)
    batch, pieces = prompt_batch("one t"), []
    assert task.stream(model, batch, pieces.append)
    (shown,) = task.show(batch, task.answers(model, batch), Path("x"))
    assert "".join(pieces) == shown + "\n" and len(pieces) > 5


def test_what_is_not_one_text_is_not_streamed(built: Built) -> None:
    beam, model = built("task.predict.method=beam")
    several, _ = built("task.predict.method=sample", "task.predict.candidates=2")
    greedy, _ = built("task.predict.method=greedy")
    for task, batch in (
        (beam, prompt_batch("o")),
        (several, prompt_batch("o")),
        (greedy, prompt_batch("o", raw=False)),
    ):
        assert not task.stream(model, batch, lambda text: pytest.fail(text))
    assert greedy.stream(model, prompt_batch("ß"), lambda text: pytest.fail(text))
    assert "'ß'" in greedy.unanswered[0]


def test_a_terminals_lines_are_raw_prompts(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = built()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("seq2seq.tasks.prompts.lines", lambda input, count: iter([]))
    assert [*task.read("-")] == []


# State.


@pytest.mark.parametrize("keys", [[], BPE], ids=["characters", "bpe"])
def test_the_state_holds_the_tokenizer(built: Built, keys: list[str], tmp_path: Path) -> None:
    task, model = built("task.predict.method=greedy", *keys)
    expected = task.predict(model, "one two")
    other, _ = built("task.predict.method=greedy", *keys)
    other.data.use(Characters.train(["abc"], task.data.tokenizer))
    other.restore(task.state())
    assert other.state() == task.state() and other.model_arguments() == task.model_arguments()
    (tmp_path / "all.txt").unlink()
    assert other.predict(model, "one two") == expected, "without the text"


def test_a_run_keeps_the_tokenizer_of_its_checkpoint_if_it_should(built: Built) -> None:
    task, _ = built()
    state = {"tokenizers": [Characters.train(["abc"], task.data.tokenizer).state()]}
    task.inherit(state)
    assert task.model_arguments() == {"vocabulary": 7}
    other, _ = built("task.keep_tokenizer=false")
    other.inherit(state)
    assert other.model_arguments()["vocabulary"] > 7
    task.inherit({})


def test_weights_without_a_tokenizer_are_refused(built: Built) -> None:
    task, _ = built()
    for states in ([], ["a", "b"]):
        with pytest.raises(UserError, match="tokenizers, expected one"):
            task.restore({"tokenizers": states})
