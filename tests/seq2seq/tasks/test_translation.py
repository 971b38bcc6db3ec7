"""The task of translation: loss, answers, users' lines, state and scores."""

import math
import pickle
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.decoding.decode import decode
from common.decoding.given import score
from common.errors import UserError
from common.machine import device
from common.machine.seeds import generator
from common.task import Adopted
from common.train import assembly, evaluator
from seq2seq.importing.layouts import MASKED_LOGIT
from seq2seq.tasks.translation import Translation
from seq2seq.tokenizers.bpe import BOS, EOS, SPECIAL

CPU = torch.device("cpu")
ENGLISH = "zero one two three four five six seven eight nine".split()
GERMAN = "null eins zwei drei vier fünf sechs sieben acht neun".split()
TINY = ["model.width=16", "model.heads=2", "model.feedforward=24", "model.encoder_layers=2", "model.decoder_layers=2"]
DATA = ["data.val_count=5", "data.test_count=15", "data.longest=60", "data.batch_size=200"]
TOKENS = ["data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=262", "task.predict.longest_extra=12"]
Built = Callable[..., tuple[Translation, nn.Module]]


def number(digits: list[int]) -> tuple[str, str]:
    return " ".join(ENGLISH[d] for d in digits), " ".join(GERMAN[d] for d in digits)


@pytest.fixture
def built(tmp_path: Path) -> Built:
    """Returns a function that makes the task of a command line, on sixty numbers of one to nine digits, and a model.

    The model is small and has large weights.
    """
    rng = generator("numbers", 0)
    pairs = [number(torch.randint(10, (1 + i % 9,), generator=rng).tolist()) for i in range(60)]
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join("\t".join(pair) for pair in dict.fromkeys(pairs)), encoding="utf-8")

    def make(*keys: str) -> tuple[Translation, nn.Module]:
        config = configure("train", ["model=seq2seq", "data=parallel_text", *TINY, *DATA, *TOKENS, *keys,
                                    f"data.train.pairs={file}"])  # fmt: skip
        task = build(config["task"], data=build(config["data"]))
        model = build(config["model"], **task.model_arguments())
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3, generator=rng)
        return task, model.eval()

    return make


def evaluation_batch(task: Translation, count: int = 6) -> dict[str, Any]:
    return task.data.collate([task.data.sample("test", i, None) for i in range(count)])


def users_batch(task: Translation, *lines: str) -> dict[str, Any]:
    """The batch that `read` makes from a file with these lines."""
    return task.data.collate([task._view(line, i + 1) for i, line in enumerate(lines)])


class Oracle(nn.Module):
    """A model that has memorised the translations: `logit` is that of the next token, all others are zero."""

    def __init__(self, task: Translation, pairs: list[tuple[str, str]], logit: float = 5.0):
        super().__init__()
        source, target = task.data.tokenizers()
        self.translations = {tuple(source.encode(a)): [*target.encode(b), EOS] for a, b in pairs}
        self.vocabulary_size, self.logit = target.size, logit

    def forward(self, source: Tensor, lengths: Tensor, target_in: Tensor) -> Tensor:
        logits = torch.zeros(*target_in.shape, self.vocabulary_size)
        for i, row in enumerate(source.tolist()):
            translation = self.translations[tuple(row[: int(lengths[i]) - 1])]
            for t, token in enumerate(translation[: target_in.shape[1]]):
                logits[i, t, token] = self.logit
        return logits

    def encode(self, source: Tensor, lengths: Tensor) -> SimpleNamespace:
        return SimpleNamespace(source=source, lengths=lengths, tokens=0)

    def step(self, state: SimpleNamespace, tokens: Tensor) -> Tensor:
        state.tokens += 1
        return self(state.source, state.lengths, tokens.new_zeros(len(tokens), state.tokens))[:, -1]

    def reorder(self, state: SimpleNamespace, rows: Tensor) -> SimpleNamespace:
        return SimpleNamespace(source=state.source[rows], lengths=state.lengths[rows], tokens=state.tokens)


# Training.


def test_the_loss_of_the_real_tokens_is_divided_by_those_of_the_step(built: Built) -> None:
    task, model = built("task.loss.smoothing=0.2")
    batch = evaluation_batch(task)
    real = int((batch["target_out"] != 0).sum())
    assert task.normalisers(batch) == {"tokens": real}
    loss, parts = task.loss(model, batch, {"tokens": 2.0 * real})
    logits = model(batch["source"], batch["source_lengths"], batch["target_in"]).flatten(0, 1)
    targets = batch["target_out"].flatten()
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, ignore_index=0)
    plain = F.cross_entropy(logits, targets, ignore_index=0)
    torch.testing.assert_close(loss, expected / 2)
    torch.testing.assert_close(parts["nll"], plain.detach() / 2)
    assert loss.requires_grad and parts.keys() == {"nll"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_entries_that_an_imported_model_masks_do_not_enter_its_loss(built: Built, precision: str) -> None:
    """As if the vocabulary lacked them; with -1e9 in the mean, the loss was some 100,000 nats in every step."""
    task, model = built("model.output_bias=true", "task.loss.smoothing=0.1")
    batch = evaluation_batch(task)
    with torch.no_grad():
        model.output_bias[[0, BOS]] = MASKED_LOGIT
    with device.autocast(CPU, precision):
        loss, parts = task.loss(model, batch, task.normalisers(batch))
        logits = model(batch["source"], batch["source_lengths"], batch["target_in"])[..., 2:].float()
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch["target_out"].flatten() - 2, label_smoothing=0.1, ignore_index=-2
    )
    torch.testing.assert_close(loss, expected)
    assert parts["nll"] < 20
    loss.backward()
    assert not model.output_bias.grad[[0, BOS]].any() and model.output_bias.grad.any()


def test_a_model_of_other_words_gets_no_output_bias_of_a_checkpoint(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with as many entries: a fairseq model's bias, and its masked entry, belong to its words."""
    task, model = built("model.output_bias=true")
    theirs = {name: torch.full_like(value, 0.25) for name, value in model.state_dict().items()}
    monkeypatch.setattr("seq2seq.tasks.translation.importing.adopt", lambda *_: Adopted(theirs, {}, []))
    torch.save({"theirs": torch.zeros(1)}, tmp_path / "theirs.pt")
    message = assembly.load_initial_weights(model, task, tmp_path / "theirs.pt")
    assert message.endswith("; re-initialised: output_bias, embedding.weight")
    assert not (model.output_bias == 0.25).any() and (model.encoder.norm.weight == 0.25).all()


def test_the_data_determine_the_vocabularies(built: Built) -> None:
    assert built()[0].model_arguments() == {"vocabularies": (262, 262), "joint": True}
    keys = ["data.tokenizer.joint=false", "model.tied=target", "data.tokenizer.vocabulary=261"]
    task, model = built(*keys)
    assert task.model_arguments() == {"vocabularies": (261, 261), "joint": False}
    source, target = task.data.tokenizers()
    assert source.state() != target.state() and model.source_embedding.num_embeddings == 261


def test_tied_all_with_separate_vocabularies_is_refused(built: Built) -> None:
    with pytest.raises(UserError, match=r"model.tied=all .* data.tokenizer.joint=false .* model.tied=target"):
        built("data.tokenizer.joint=false", "data.tokenizer.vocabulary=261")


# Answers.


def test_an_answer_has_text_tokens_and_score(built: Built) -> None:
    task, model = built("task.predict.candidates=3")
    batch = evaluation_batch(task)
    expected = decode(model, batch["source"], batch["source_lengths"], task.options, SPECIAL, batch["ids"])
    target = task.data.tokenizers()[1]
    for answer, hypotheses in zip(task.predict(model, batch), expected, strict=True):
        assert answer["tokens"] == hypotheses[0].tokens and answer["score"] == hypotheses[0].score
        assert answer["text"] == target.decode(answer["tokens"])
        candidates = [{"text": target.decode(each.tokens), "score": each.score} for each in hypotheses]
        assert answer["candidates"] == candidates and len(candidates) == 3
        assert "attention" not in answer
    answers = built()[0].predict(model, batch)
    assert all(answer.keys() == {"text", "score", "tokens", "reference_log_probability", "reference_tokens"}
               for answer in answers)  # fmt: skip


def test_the_log_probability_of_a_reference_is_its_score(built: Built) -> None:
    task, model = built("task.loss.smoothing=0.3")
    batch = evaluation_batch(task)
    scored = score(
        model, batch["source"], batch["source_lengths"], batch["target_out"], batch["target_lengths"], SPECIAL
    )
    for answer, (total, tokens), length in zip(
        task.predict(model, batch), scored, batch["target_lengths"].tolist(), strict=True
    ):
        assert answer["reference_tokens"] == tokens == length
        assert answer["reference_log_probability"] == pytest.approx(total, abs=1e-4)  # float32, some 40 tokens


def test_the_translation_of_an_empty_sentence_is_empty(built: Built) -> None:
    for keys in ([], ["task.predict.candidates=2", "task.predict.attention=true"]):
        task, model = built(*keys)
        lines = ["", "one two", " \t ", "three"]
        answers = task.predict(model, users_batch(task, *lines))
        assert [answer["text"] for answer in (answers[0], answers[2])] == ["", ""]
        assert answers[0]["tokens"] == [] and answers[0]["score"] == 0 and "attention" not in answers[0]
        alone = task.predict(model, users_batch(task, "", "one two"))[1]
        assert answers[1]["tokens"] == alone["tokens"] and answers[1]["text"]
        assert [answer["text"] for answer in task.predict(model, users_batch(task, "", " "))] == ["", ""]
        printed = [*task.show(users_batch(task, *lines), [answers[0]] * 4, Path("nowhere"))]
        assert printed == (["1\t0.0000\t", "2\t0.0000\t", "3\t0.0000\t", "4\t0.0000\t"] if keys else [""] * 4)


def test_a_sentence_longer_than_the_models_limit_is_refused(built: Built) -> None:
    task, model = built("model.longest=20")
    with pytest.raises(UserError, match=r"Sentence 1 has 43 tokens, more than model.longest=20; split it"):
        task.predict(model, users_batch(task, "one two three four five six seven eight nine"))


@pytest.mark.parametrize("method", ["beam", "given"])
def test_lines_that_cannot_be_translated_do_not_change_the_answers_to_others(
    built: Built, tmp_path: Path, method: str
) -> None:
    """One is too long for the model and one is Latin-1; each has an empty line, and a sentence for the end."""
    task, model = built("model.longest=30", f"task.predict.method={method}", "task.predict.attention=true")
    target = b"\teins" * (method == "given")
    texts = [b"one two", b"nine " * 9, b"sch\xf6n", b"", b"three"]
    (tmp_path / "all.txt").write_bytes(b"".join(text + target + b"\n" for text in texts))
    (tmp_path / "good.txt").write_bytes(b"".join(texts[i] + target + b"\n" for i in (0, 3, 4)))
    (batch,), (good_batch,) = (task.read(str(tmp_path / f"{name}.txt")) for name in ("all", "good"))
    answers = task.predict(model, batch)
    assert task.unanswered == [
        "Line 2 was not translated: it has 47 tokens, more than model.longest=30; split it into sentences, or raise "
        "that limit.",
        "Line 3 was not translated: it is not valid UTF-8 (byte 0xf6); convert the text to UTF-8, or correct the line.",
    ]
    expected = task.predict(model, good_batch)
    assert len(task.unanswered) == 2
    for i, answer in zip((0, 3, 4), expected, strict=True):
        assert answers[i]["tokens"] == answer["tokens"] and answers[i]["score"] == answer["score"]
        assert answers[i].keys() == answer.keys()
    lines = [*task.show(batch, answers, tmp_path / "new")]
    expected_lines = [*task.show(good_batch, expected, tmp_path / "new")]
    if method == "given":  # lines have numbers
        assert [line.split("\t", 1)[1] for line in lines] == [line.split("\t", 1)[1] for line in expected_lines]
        assert [line.split("\t")[0] for line in lines] == ["1", "4", "5"]
    else:
        assert lines == [expected_lines[0], "", "", *expected_lines[1:]]
    (tmp_path / "bad.txt").write_bytes(texts[1] + target)
    (batch,) = task.read(str(tmp_path / "bad.txt"))
    assert [answer["text"] for answer in task.predict(model, batch)] == [""], "none can be translated"


def test_a_line_of_several_files_that_cannot_be_translated_is_named_with_its_file(built: Built, tmp_path: Path) -> None:
    task, model = built()
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"three\nsch\xf6n\n")
    first, second = task.read(str(tmp_path / "*.txt"))
    task.predict(model, first)
    assert first["ids"] == [1, 2] and second["ids"] == [3, 4] and task.unanswered == []
    task.predict(model, second)
    (sentence,) = task.unanswered
    assert sentence.startswith(f"Line 4 ({tmp_path}/b.txt:2) was not translated: it is not valid UTF-8")


def test_predictions_of_sentences_are_named_records(
    built: Built, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    task, model = built()
    sentences = ["one two", "", "three"]
    answers = task.answers(model, users_batch(task, *sentences))
    expected = [[{"text": answer["text"], "score": pytest.approx(answer["score"])}] for answer in answers]
    assert task.predict(model, "one two") == expected[0] and isinstance(task.predict(model, "one two"), list)
    assert task.predict(model, sentences) == task.predict(model, tuple(sentences)) == expected
    (tmp_path / "a.txt").write_text("one two\n\nthree\n")
    assert task.predict(model, tmp_path / "a.txt") == expected and not recwarn
    assert task.predict(model, []) == [] and len(task.predict(model, ["one"] * 70)) == 70
    with pytest.warns(UserWarning, match=r"is taken as a sentence; Path\('.*a.txt'\) reads the file"):
        assert len(task.predict(model, str(tmp_path / "a.txt"))) == 1
    for other in (3, ["one", 3], b"one"):
        with pytest.raises(
            UserError, match=r"^A sentence \(str\), a list of sentences, or the pathlib\.Path of a text"
        ):
            task.predict(model, other)


def test_a_sentence_that_cannot_be_translated_is_named(built: Built) -> None:
    task, model = built("model.longest=30")
    with pytest.raises(UserError, match=r"^Sentence 2 has 47 tokens, more than model\.longest=30"):
        task.predict(model, ["one", "nine " * 9])
    task, model = built("task.predict.method=given")
    (record,) = task.predict(model, "one\teins")
    assert record["text"] == "eins" and record["score"] < 0
    with pytest.raises(UserError, match=r"^Sentence 1 was not translated: it has no tab"):
        task.predict(model, "one")


def test_a_prediction_shows_itself_as_text_with_all_candidates(built: Built) -> None:
    task, model = built("task.predict.candidates=3", "task.predict.attention=true")
    records = pickle.loads(pickle.dumps(task.predict(model, "one <b>")))
    assert len(records) == 3 and records[0]["score"] >= records[1]["score"] >= records[2]["score"]
    shown = records._repr_html_()
    assert shown.startswith("<p>one &lt;b&gt;<br>") and "<svg" in shown and records._repr_png_() is None
    assert all(escape(record["text"]) in shown for record in records)
    both = task.predict(model, ["one", "two"])._repr_html_()
    assert both.index("<p>one<br>") < both.index("<p>two<br>")


def test_a_users_lines_are_copied_to_the_models_device(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """predict.py and `load` pass batches of `read`, which are on the CPU, whatever the model's device."""
    task, model = built()
    meta = torch.device("meta")
    monkeypatch.setattr(model, "parameters", lambda: iter([torch.zeros(1, device=meta)]))
    devices = []

    def copy(batch: dict[str, Any], target: torch.device) -> dict[str, Any]:
        devices.append(target)
        return batch

    monkeypatch.setattr("seq2seq.tasks.translation.to_device", copy)
    task.predict(model, users_batch(task, "one"))
    assert devices == [meta]


def test_given_translations_are_scored_unchanged(built: Built) -> None:
    task, model = built("task.predict.method=given", "task.predict.penalty=average", "task.predict.alpha=1")
    batch = users_batch(task, "one two\teins zwei", "three\tacht neun null")
    answers = task.predict(model, batch)
    assert [answer["text"] for answer in answers] == ["eins zwei", "acht neun null"]
    scored = score(
        model, batch["source"], batch["source_lengths"], batch["target_out"], batch["target_lengths"], SPECIAL
    )
    assert [answer["score"] for answer in answers] == pytest.approx([total / n for total, n in scored])
    lines = [*task.show(batch, answers, Path("nowhere"))]
    assert lines[0] == f"1\t{answers[0]['score']:.4f}\teins zwei" and lines[1].startswith("2\t")


def test_given_lines_without_exactly_one_tab_are_problems_and_blank_ones_are_skipped(
    built: Built, tmp_path: Path
) -> None:
    """A third column is not read as a part of the translation, whose score would then be another."""
    task, model = built("task.predict.method=given")
    (tmp_path / "in.txt").write_text("one\teins\none eins\n\none\teins\tCC-BY\n" + "\n" * 99)
    (batch,) = task.read(str(tmp_path / "in.txt"))
    answers = task.predict(model, batch)
    assert batch["ids"] == [1, 2, 4] and [*task.show(batch, answers, tmp_path)] == [
        f"1\t{answers[0]['score']:.4f}\teins"
    ]
    layout = "task.predict.method=given expects a sentence, a tab, and its translation."
    assert task.unanswered == [
        f"Line 2 was not translated: it has no tab; {layout}",
        f"Line 4 was not translated: it has 2 tabs; {layout}",
    ]


def test_more_candidates_than_a_method_has_are_refused(built: Built) -> None:
    for keys, limit in (
        (["method=greedy"], "at most 1 with method=greedy"),
        (["beam=2"], "at most 2 with method=beam"),
    ):
        with pytest.raises(UserError, match=f"task.predict.candidates=3: expected {limit}"):
            built("task.predict.candidates=3", *(f"task.predict.{key}" for key in keys))


def test_attention_has_heads_target_tokens_and_source_tokens(built: Built) -> None:
    """Rows are the translation's tokens and EOS, independent of the rest of the batch."""
    task, model = built("task.predict.attention=true")
    batch = evaluation_batch(task)
    answers = task.predict(model, batch)
    for i, answer in enumerate(answers):
        length = int(batch["source_lengths"][i])
        assert answer["attention"].shape == (2, len(answer["tokens"]) + 1, length)
        torch.testing.assert_close(answer["attention"].sum(-1), torch.ones(2, len(answer["tokens"]) + 1))
        alone = task.predict(model, task.data.collate([task.data.sample("test", i, None)]))[0]
        torch.testing.assert_close(answer["attention"], alone["attention"])
    assert len({*batch["source_lengths"].tolist()}) > 2


def test_attention_of_a_model_without_cross_attention_is_refused(built: Built) -> None:
    task, _ = built("task.predict.attention=true")
    pairs = task.data.pairs("test")
    with pytest.raises(UserError, match="Oracle has no module named cross_attention; use false"):
        task.predict(Oracle(task, pairs), evaluation_batch(task))


# A user's lines.


def test_files_and_pipes_are_read_in_numbered_lines(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = built()
    text = "one\n\ntwo three\n" + "four\n" * 100
    (tmp_path / "in.txt").write_text(text)
    with (tmp_path / "in.txt").open() as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        for input in (str(tmp_path / "in.txt"), "-"):
            batches = [*task.read(input)]
            assert [i for batch in batches for i in batch["ids"]] == [*range(1, 104)]
            assert [text for batch in batches for text in batch["source_texts"]] == text.splitlines()
            assert len(batches) == 2 and "target_out" not in batches[0]


def test_a_translation_with_line_feeds_is_printed_in_one_line(built: Built) -> None:
    task, _ = built()
    batch = users_batch(task, "one", "two")
    answers = [{"text": "a\nb\r\nc\td", "score": -1.0, "tokens": []}, {"text": "e", "score": -2.0, "tokens": []}]
    assert [*task.show(batch, answers, Path("nowhere"))] == ["a b  c\td", "e"]
    for answer in answers:
        answer["candidates"] = [{"text": answer["text"], "score": -1.25}, {"text": "x", "score": -12.5}]
    expected = ["1\t-1.2500\ta b  c\td", "1\t-12.5000\tx", "2\t-1.2500\te", "2\t-12.5000\tx"]
    assert [*built("task.predict.candidates=2")[0].show(batch, answers, Path("nowhere"))] == expected


def test_pictures_of_attention_have_the_lines_numbers_and_all_tokens(built: Built, tmp_path: Path) -> None:
    task, model = built("task.predict.attention=true")
    batch = users_batch(task, "one two", "", "<three>")
    answers = task.predict(model, batch)
    assert len([*task.show(batch, answers, tmp_path / "new/folder")]) == 3
    files = sorted((tmp_path / "new/folder").iterdir())
    assert [file.name for file in files] == ["000001.attention.svg", "000003.attention.svg"]
    picture = files[1].read_text("utf-8")
    assert picture.count('class="column"') == batch["source_lengths"][2]
    assert picture.count('class="row"') == len(answers[2]["tokens"]) + 1
    assert "&lt;three&gt;" in picture and "&lt;/s&gt;" in picture


def test_translations_have_no_pictures_in_the_log(built: Built) -> None:
    task, model = built()
    batch = evaluation_batch(task)
    assert task.pictures(batch, task.predict(model, batch), 4) is None and task.advice(False) == []


# State in checkpoints.


@pytest.mark.parametrize("joint", [True, False])
def test_a_restored_task_translates_without_data(built: Built, joint: bool) -> None:
    keys = [] if joint else ["data.tokenizer.joint=false", "model.tied=target", "data.tokenizer.vocabulary=261"]
    task, model = built(*keys)
    state = task.state()
    assert len(state["tokenizers"]) == 1 + (not joint)
    assert all(type(text) is str for text in state["tokenizers"]), "plain types"
    config = configure("predict", ["model=seq2seq", "data=parallel_text", "checkpoint=x.pt", "input=-", *keys])
    restored: Translation = build(config["task"], data=build(config["data"]))  # without files
    restored.restore(state)
    assert restored.state() == state and restored.model_arguments() == task.model_arguments()
    restored.options = task.options
    result, expected = (
        each.predict(model, users_batch(each, "one two", "nine"))[0]["text"] for each in (restored, task)
    )
    assert result == expected != ""


@pytest.mark.parametrize("state", [{}, {"tokenizers": []}])
def test_a_checkpoint_without_tokenizers_is_refused(built: Built, state: dict[str, Any]) -> None:
    task, _ = built()
    with pytest.raises(UserError, match="contains no tokenizers"):
        task.restore(state)


def test_a_tokenizer_of_another_program_is_refused(built: Built) -> None:
    task, _ = built()
    with pytest.raises(UserError, match="was not written by this program"):
        task.restore({"tokenizers": ['{"version": "1.0"}']})


def test_a_new_run_uses_its_checkpoints_tokenizers_unless_keep_tokenizers_is_false(built: Built) -> None:
    inherited = built("data.tokenizer.vocabulary=270")[0].state()
    task, _ = built()
    trained = task.state()
    task.inherit({})  # of another program
    assert task.state() == trained != inherited
    task.inherit(inherited)
    assert task.state() == inherited and task.model_arguments()["vocabularies"] == (270, 270)
    assert max(max(task.data.sample("train", i, None)["source"]) for i in range(task.data.count("train"))) >= 262
    task, _ = built("task.keep_tokenizers=false")
    task.inherit(inherited)
    assert task.state() == trained


# Scores.


def test_a_model_that_has_memorised_test_has_perfect_scores_and_the_loss_worked_out_by_hand(built: Built) -> None:
    """A logit of 5 among 261 of 0: each token costs ln(e^5 + 261) - 5."""
    task, _ = built()
    model = Oracle(task, task.data.pairs("test"))
    numbers, metric = evaluate(task, model)
    assert (
        numbers["bleu"] == pytest.approx(100) and numbers["exact_match"] == 1 and numbers["chrf"] == pytest.approx(100)
    )
    cost = math.log(math.exp(5) + 261) - 5
    assert numbers["loss"] == pytest.approx(cost, abs=1e-6)
    assert numbers["perplexity"] == pytest.approx(math.exp(cost), rel=1e-6)
    assert task.goal.name in numbers and len(metric.samples) == 15


def test_one_wrong_sentence_of_fifteen_costs_a_fifteenth_of_exact_match(built: Built) -> None:
    task, _ = built()
    pairs = task.data.pairs("test")
    numbers, _ = evaluate(task, Oracle(task, [(pairs[0][0], "falsch"), *pairs[1:]]))
    assert numbers["exact_match"] == pytest.approx(14 / 15) and numbers["bleu"] < 100


@pytest.mark.parametrize("method", ["greedy", "beam", "sample", "given"])
def test_scores_do_not_depend_on_the_batches(built: Built, method: str) -> None:
    task, model = built(f"task.predict.method={method}")
    (numbers, metric), (numbers_in_parts, metric_in_parts) = evaluate(task, model, 2000), evaluate(task, model, 60)
    assert [row[:4] for row in metric.samples] == [row[:4] for row in metric_in_parts.samples]
    assert numbers == pytest.approx(numbers_in_parts, rel=1e-5)
    assert numbers["loss"] > 0 and (numbers["exact_match"] == 1) == (method == "given")


def evaluate(task: Translation, model: nn.Module, batch_size: int = 200) -> tuple[dict[str, float], Any]:
    options = {"device": CPU, "precision": "fp32", "batch_size": batch_size, "workers": 0}
    return evaluator.evaluate(task, task.data, model, "test", **options)


def test_a_model_with_one_translation_for_all_sentences_raises_an_alarm(built: Built) -> None:
    task, _ = built()
    same = [{"text": "die die die"}] * 10
    (alarm,) = task.alarms(same)
    assert 'all sentences are translated as "die die die"' in alarm and "schedule.warmup" in alarm
    assert task.alarms(same[:9]) == [] and task.alarms([*same, {"text": "der"}]) == []


def test_bos_and_eos_are_never_in_a_translation(built: Built) -> None:
    task, model = built("task.predict.method=sample", "task.predict.temperature=3")
    for answer in task.predict(model, evaluation_batch(task)):
        assert not {BOS, EOS, 0} & {*answer["tokens"]} and answer["text"]


@pytest.mark.parametrize("lowercase", ["true", "false"])
def test_scores_are_case_insensitive_if_the_tokenizer_is_lower_case(built: Built, lowercase: str) -> None:
    task, _ = built(f"data.tokenizer.lowercase={lowercase}")
    assert task.metric("val").scorers["bleu"].metric.lowercase is (lowercase == "true")
