"""The task of word vectors: a step for any cut, queries, mistakes, and a small run through the doors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.data.batching import Loader
from common.errors import UserError
from common.train import optim
from common.train.assembly import load
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from seq2seq.importing.word2vec import read_vectors, write_vectors
from seq2seq.tasks.word_vectors import WordVectors

RATE = 0.02
PASSAGES = [3, 0, 5]
SPLITS = {"3": [[3, 0, 5]], "1+2": [[3], [0, 5]], "1+1+1": [[3], [0], [5]]}


def write_text(path: Path, sentences: int = 1500) -> Path:
    """Sentences about two topics: words of a topic occur together, after frequent words of both."""
    rng = np.random.default_rng(0)
    topics = [[f"{name}{i}" for i in range(12)] for name in ("cat", "dog")]
    with path.open("w") as file:
        for _ in range(sentences):
            words = [*rng.choice(topics[rng.integers(2)], 6), *rng.choice(["the", "a", "of"], 3)]
            file.write(" ".join(rng.permutation(words)) + "\n")
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("a text, of=words") / "train.txt")


def parts(text: Path, *keys: str) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Data, task, a model in fp64, and the config."""
    small = ["model.width=12", "data.words.min_count=1", "data.passage=300"]
    config = configure("train", ["model=word2vec", f"data.train={text}", *small, *keys])
    data = build(config["data"])
    task = build(config["task"], data=data)
    torch.manual_seed(0)
    model: nn.Module = build_model(config["model"], task).double()
    return data, task, model, config


def after_a_step(text: Path, split: list[list[int]], *keys: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    data, task, model, config = parts(text, *keys)
    options = construct(OptimizerOptions, {**config["optimizer"], "lr": RATE})
    stepper = Stepper(task, model, optim.build(model, options), torch.device("cpu"), "fp32", None)
    task.set_rate(RATE)
    loader = Loader(data, "train", seed=4, workers=0, pin=False)
    values = stepper(list(loader((0, tuple(part)) for part in split)), 0)
    return model.state_dict(), values


@pytest.mark.parametrize("keys", [[], ["task.loss.architecture=cbow", "task.loss.output=hierarchical_softmax"]])
def test_a_step_is_the_same_however_it_is_split(text: Path, keys: list[str]) -> None:
    expected, values = after_a_step(text, SPLITS["3"], *keys)
    _, _, fresh, _ = parts(text, *keys)
    # the outputs begin with zeros, so the inputs change from the second block on
    assert (expected["outputs"] - fresh.outputs).abs().max() > 1e-4
    for split in ("1+2", "1+1+1"):
        weights, again = after_a_step(text, SPLITS[split], *keys)
        # the sums of updates are rounded in another order, in fp64
        assert all((weights[name] - expected[name]).abs().max() < 1e-12 for name in expected)
        assert float(again["loss"]) == pytest.approx(float(values["loss"]), rel=1e-10)


def test_the_first_loss_is_that_of_coins(text: Path) -> None:
    """All output vectors are zero, so each of the K + 1 decisions costs ln 2, if no negative is the word itself."""
    data, task, model, _ = parts(text, "task.loss.negatives=2")
    batch = data.collate([data.sample("val", 0, None)])
    (answer,) = task.answers(model, batch)
    context = float((batch["left"] + batch["right"]).sum())
    assert answer["pairs"] == context
    assert 0.9 * 3 * np.log(2) < answer["nats"] / context <= 3 * np.log(2) + 1e-9


def test_pairs_are_counted_by_architecture(text: Path) -> None:
    batch = {"left": torch.tensor([0, 1, 0, 2]), "right": torch.tensor([1, 0, 0, 0])}
    counts = {
        name: parts(text, f"task.loss.architecture={name}")[1].normalisers(batch)["pairs"]
        for name in ("skip_gram", "cbow")
    }
    assert counts == {"skip_gram": 4.0, "cbow": 3.0}


def test_fewer_words_are_updated_at_once_if_some_are_frequent_or_the_rate_is_high(text: Path) -> None:
    _, task, *_ = parts(text, "task.loss.block=100000")
    sizes = [task._block(rate) for rate in (0.25, 0.025, 0.0025)]
    assert 1 <= sizes[0] < sizes[1] < sizes[2] < 100_000
    _, softmax, *_ = parts(text, "task.loss.output=hierarchical_softmax", "task.loss.block=100000")
    assert softmax._block(0.0025) < sizes[2], "the root of the tree is on every path"
    assert parts(text, "task.loss.block=7")[1]._block(1e-6) == 7
    assert softmax._block(1e6) == 1


@pytest.fixture
def queried(text: Path) -> tuple[WordVectors, Any]:
    """Vectors on a circle, 10 degrees apart, in the order of the vocabulary."""
    _, task, model, _ = parts(text, "task.predict.neighbours=2")
    angles = torch.arange(len(task.data.vocabulary)) * torch.pi / 18
    model.inputs.data.zero_()[:, :2] = torch.stack([angles.cos(), angles.sin()], 1)
    return task, model


def test_neighbours_of_a_word_are_those_with_the_largest_cosines(queried: tuple[WordVectors, Any]) -> None:
    task, model = queried
    words = task.data.vocabulary.words
    records = task.predict(model, words[3])
    assert {record["word"] for record in records} == {words[2], words[4]}
    assert records[0]["cosine"] == pytest.approx(np.cos(np.pi / 18), abs=1e-6)


def test_an_analogy_is_answered_without_its_own_words(queried: tuple[WordVectors, Any]) -> None:
    task, model = queried
    words = task.data.vocabulary.words
    angles = np.arange(len(words)) * np.pi / 18
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    target = vectors[8] - vectors[6] + vectors[5]
    cosines = vectors @ target / np.linalg.norm(target)
    expected = [i for i in np.argsort(-cosines).tolist() if i not in (8, 6, 5)][:2]
    records = task.predict(model, f"{words[8]} - {words[6]} + {words[5]}")
    assert [record["word"] for record in records] == [words[i] for i in expected]
    lists = task.predict(model, [words[3], words[4]])
    assert len(lists) == 2 and lists[0] == task.predict(model, words[3])


def test_the_similarity_of_two_words_or_sums_is_their_cosine(queried: tuple[WordVectors, Any]) -> None:
    task, model = queried
    words = task.data.vocabulary.words
    (record,) = task.predict(model, f"{words[3]} ~ {words[5]}")
    assert record == {"word": words[5], "cosine": pytest.approx(np.cos(2 * np.pi / 18), abs=1e-6)}
    (record,) = task.predict(model, f"{words[3]} ~ {words[0]} - {words[9]}")  # the second side is at -45 degrees
    assert record["word"] == f"{words[0]} - {words[9]}"
    assert record["cosine"] == pytest.approx(np.cos(np.pi * (30 + 45) / 180), abs=1e-6)


def test_queries_follow_the_case_of_the_vocabulary_and_may_begin_with_a_sign(queried: tuple[WordVectors, Any]) -> None:
    task, model = queried
    assert task.predict(model, "CAT3") == task.predict(model, "cat3")
    assert task.predict(model, "- cat3") != task.predict(model, "cat3")


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("catt3", "'catt3' is not among the 27 words of the vocabulary; did you mean cat3"),
        ("zzzzzz", "is not among .* vocabulary; give a word of the text that it was trained on."),
        ("cat1 cat2", "is no query; expected a word, or words with"),
        ("cat1 -", "is no query"),
        ("cat1 ~", "is no query"),
        ("cat1 ~ unheard", "not among the"),
        (" ", "is no query"),
    ],
)
def test_a_query_that_has_no_answer_is_one_sentence(queried: tuple[WordVectors, Any], query: str, reason: str) -> None:
    task, model = queried
    with pytest.raises(UserError, match=reason):
        task.predict(model, query)
    with pytest.raises(UserError, match=reason):
        list(task.read(query))


def test_lines_of_a_file_are_queries_and_unknown_words_are_listed_at_the_end(
    queried: tuple[WordVectors, Any], tmp_path: Path
) -> None:
    task, model = queried
    (tmp_path / "queries").write_text("cat3\n\nunheard\ncat3 - cat4 + cat5\n")
    lines = [
        line
        for batch in task.read(str(tmp_path / "queries"))
        for line in task.show(batch, task.answers(model, batch), tmp_path)
    ]
    assert [line.partition(":")[0] for line in lines] == ["cat3", "cat3 - cat4 + cat5"]
    assert len(task.unanswered) == 1 and task.unanswered[0].startswith("Line 3: The word 'unheard'")


@pytest.mark.parametrize(
    "state",
    [
        {"words": ["a", "b"], "counts": [2]},
        {"words": ["a", "a"], "counts": [2, 1]},
        {"words": ["a", "b"], "counts": [1, 2]},
        {"words": ["a"], "counts": [1]},
    ],
)
def test_an_altered_vocabulary_is_refused(text: Path, state: dict[str, Any]) -> None:
    _, task, *_ = parts(text)
    with pytest.raises(UserError, match="expected at least two different words and a count of each"):
        task.restore(state)


def test_a_file_of_another_program_is_refused(text: Path) -> None:
    with pytest.raises(UserError, match="neither a checkpoint of model=word2vec nor a file of word vectors"):
        parts(text)[1].adopt({}, None)


@pytest.mark.parametrize("binary", [False, True])
def test_a_file_of_word_vectors_is_asked_and_evaluated_without_a_loss(
    inside: Callable[..., str], text: Path, tmp_path: Path, binary: bool
) -> None:
    """The vectors are random, so the answers are compared with those of plain NumPy."""
    words = [f"{name}{i}" for name in ("cat", "dog") for i in range(12)]
    vectors = np.random.default_rng(3).normal(size=(len(words), 5)).astype(np.float32)
    write_vectors(tmp_path / "vectors", words, vectors, binary=binary)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    best = np.argsort(-(units @ units[3]))[1:4]
    keys = ["checkpoint=vectors", "model=word2vec"]
    output = inside("predict", *keys, "model.width=5", "input=cat3", "neighbours=3")
    assert output.strip() == f"cat3: {', '.join(f'{words[i]} {units[i] @ units[3]:.3f}' for i in best)}"
    (tmp_path / "similar.tsv").write_text("cat1\tcat2\t3\ncat1\tdog1\t2\ncat3\tdog4\t1\n")
    evaluation = ["task.evaluation.similarity_file=similar.tsv", f"data.train={text}", f"data.test={text}"]
    output = inside("evaluate", *keys, "model.width=5", *evaluation)
    numbers = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    cosines = [units[1] @ units[2], units[1] @ units[13], units[3] @ units[16]]
    expected = (
        1 - 6 * sum((np.argsort(np.argsort(cosines)) - np.array([2, 1, 0])) ** 2) / 24
    )  # Spearman's, without ties
    assert numbers == {"test/similarity_similar": pytest.approx(expected), "test/similarity_similar_known": 1.0}
    assert "inputs (24 x 5 in the file, 24 x 100 in the model)" in inside("predict", *keys, "input=cat3", code=2)


RUN = [
    *("model=word2vec", "model.width=16", "data.words.min_count=1", "data.passage=500", "trainer.epochs=8"),
    *("data.subsample=0", "trainer.log_every=5", "trainer.log=[]", "task.loss.block=32"),
]


@pytest.mark.parametrize("keys", [[], ["task.loss.architecture=cbow", "optimizer.lr=0.1"]])
@pytest.mark.parametrize("output", ["negative_sampling", "hierarchical_softmax"])
def test_a_run_learns_which_words_occur_together(
    inside: Callable[..., str], text: Path, tmp_path: Path, output: str, keys: list[str]
) -> None:
    inside("train", *RUN, *keys, f"task.loss.output={output}", f"data.train={text}", "run_dir=run")
    best = "checkpoint=run/checkpoints/best.pt"
    line = inside("predict", best, "input=cat3", "task.predict.neighbours=5").strip()
    assert line.startswith("cat3: ") and all(word.strip().startswith("cat") for word in line[6:].split(",")), line
    losses = [
        record["val/loss"]
        for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "val/loss" in record
    ]
    words, vectors = read_vectors(tmp_path / "run" / "predictions" / "vectors.txt")
    model, loaded = load("run/checkpoints/best.pt")
    task: Any = loaded
    coins = np.log(2) * task.targets.decisions(task.data.shares)  # the loss if all decisions were coins
    assert min(losses) < 0.95 * coins
    assert words == task.data.vocabulary.words
    np.testing.assert_array_equal(vectors, model.inputs.detach().numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize("key", ["optimizer=adamw", "optimizer.momentum=0.9", "optimizer.weight_decay=0.1"])
def test_an_optimizer_that_scales_steps_is_refused(inside: Callable[..., str], text: Path, key: str) -> None:
    assert "keep the model's own optimizer" in inside("train", *RUN, key, f"data.train={text}", code=2)


def test_a_short_text_without_a_test_split_is_announced_to_give_no_file_of_vectors(
    inside: Callable[..., str], tmp_path: Path
) -> None:
    write_text(tmp_path / "short.txt", 20)
    output = inside("train", *RUN, f"data.train={tmp_path / 'short.txt'}", "run_dir=run")
    assert "There is no test split, whose evaluation writes vectors.txt" in output


def test_a_run_is_evaluated_with_files_and_asked_from_the_command_line(
    inside: Callable[..., str], text: Path, tmp_path: Path
) -> None:
    inside("train", *RUN, f"data.train={text}", "run_dir=run", "trainer.epochs=2")
    (tmp_path / "questions.txt").write_text(": one\ncat1 cat2 cat3 cat4\ncat1 cat2 cat3 unheard\n")
    (tmp_path / "similar.tsv").write_text("cat1\tcat2\t9\ncat1\tdog1\t1\ncat3\tdog4\t2\n")
    best = "checkpoint=run/checkpoints/best.pt"
    files = ["task.evaluation.analogies_file=questions.txt", "task.evaluation.similarity_file=similar.tsv"]
    output = inside("evaluate", best, *files, "task.evaluation.vectors=binary", "output=numbers")
    numbers = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert numbers["test/analogies_known"] == 0.5 and numbers["test/similarity_similar_known"] == 1.0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert numbers["test/loss"] == results["test/loss"]
    assert len(read_vectors(tmp_path / "numbers" / "vectors.bin")[0]) == 27
    assert inside("predict", best, "input=cat1 - cat2 + dog1").startswith("cat1 - cat2 + dog1: ")
    assert "did you mean cat1" in inside("predict", best, "input=catt1", code=2)
