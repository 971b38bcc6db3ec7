"""The doors as a user of masked language models uses them: pretraining, filling in, classification, translation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from berts import redrawn, sentences, word_piece

from common.files import checkpoint
from scripts import export

Door = Callable[..., str]
SHAPE = [*("model.width=16", "model.heads=2", "model.feedforward=24"), "model.longest=40", "model.blocks.dropout=0.05"]
SMALL = [*SHAPE, "model.layers=2", "schedule.warmup=1", "trainer.log_every=2", "optimizer.lr=1e-2"]
RUN = [*SMALL, "trainer.steps=20", "trainer.eval_every=10", "trainer.ema_decay=0.5", "data.batch_size=400"]
RUN += ["data.longest=20", "data.tokenizer.vocabulary=70", "trainer.device=cpu"]
TEXTS = sentences(200, longest=12)
pytestmark = pytest.mark.slow


def results_of(folder: Path) -> dict[str, float]:
    numbers = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in numbers.items() if name.startswith("test/")}


def numbers_of(output: str) -> dict[str, float]:
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a path that has a meaning in Hydra's grammar."""
    file = tmp_path_factory.mktemp("my texts, of=mine") / "sentences [en].txt"
    file.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(door: Door, tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, door("train", "model=bert", *RUN, f"data.train={text}", f"run_dir={folder}")


@pytest.fixture
def best(trained: tuple[Path, str]) -> str:
    return f"checkpoint={trained[0]}/checkpoints/best.pt"


def test_a_run_prints_its_numbers_beside_those_of_the_unigram_model(trained: tuple[Path, str]) -> None:
    folder, output = trained
    numbers = results_of(folder)
    assert {"test/nats", "test/accuracy", "test/unigram_nats", "test/unigram_accuracy"} <= numbers.keys()
    assert numbers["test/nats"] < 4.5 and "test/unigram_nats" in output and "word_piece with 70 entries" in output
    assert (folder / "predictions" / "masked.csv").exists()


def test_evaluation_gives_the_numbers_of_training_without_the_file_of_train(
    inside: Door, trained: tuple[Path, str], best: str, text: Path, tmp_path: Path
) -> None:
    assert numbers_of(inside("evaluate", best)) == results_of(trained[0])
    (tmp_path / "test.txt").write_text("\n".join(TEXTS[:20]) + "\n")
    numbers = numbers_of(inside("evaluate", best, "data.train=missing.txt", f"data.test={tmp_path}/test.txt"))
    assert numbers.keys() >= {"test/nats", "test/unigram_nats"}


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(
    inside: Door, trained: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    """With workers and smaller micro-batches in the first part."""
    command = ["model=bert", *RUN, f"data.train={text}", f"run_dir={tmp_path / 'two'}"]
    inside("train", *command, "trainer.workers=2")
    (tmp_path / "two/results.json").unlink()
    checkpoints = sorted((tmp_path / "two/checkpoints").glob("step_*.pt"))
    checkpoints[-1].unlink()
    inside("train", *command, "resume=auto")
    assert (trained[0] / "metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()


def test_blanks_are_filled_in_from_the_command_line(inside: Door, best: str, tmp_path: Path) -> None:
    lines = inside("predict", best, "input=the man [MASK] a [MASK], and a dog.", "top=3").splitlines()
    assert len(lines) == 3 and "[MASK]" not in lines[0] and lines[0].endswith(", and a dog.")
    assert [len(line.split(", ")) for line in lines[1:]] == [3, 3]
    (tmp_path / "in.txt").write_text("a [MASK]\n<mask> dog\n")
    assert len(inside("predict", best, f"input={tmp_path}/in.txt").splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=nowhere.txt"], "nowhere.txt"),
        (["input=a [MASK]", "topp=3"], "did you mean"),
    ],
)
def test_mistakes_end_in_one_sentence(inside: Door, best: str, arguments: list[str], message: str) -> None:
    assert message in inside("predict", best, *arguments, code=2)


def test_a_line_without_a_blank_is_listed_at_the_end(door: Door, best: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a [MASK]\na dog\n")
    output = door("predict", best, f"input={tmp_path}/in.txt", code=1)
    assert "Line 2 was not answered: it has no blank; write [MASK] in place of a word." in output
    output = door("predict", best, "input=Is this a dog?", code=1)
    assert "Line 1 was not answered: it has no blank; write [MASK] in place of a word." in output


def test_a_classifier_starts_from_the_masked_language_model(inside: Door, best: str, tmp_path: Path) -> None:
    rows = [f"{'animal' if 'dog' in text else 'other'}\t{text}" for text in TEXTS]
    (tmp_path / "texts.tsv").write_text("\n".join(rows) + "\n")
    command = ["model=bert_classifier", *RUN, f"data.train={tmp_path}/texts.tsv", f"run_dir={tmp_path / 'run'}", best]
    output = inside("train", *command)
    assert "was read as the label" in output and "2 classes: animal, other" in output
    assert {"test/accuracy", "test/f1_macro", "test/loss"} <= results_of(tmp_path / "run").keys()
    own = f"checkpoint={tmp_path}/run/checkpoints/best.pt"
    assert numbers_of(inside("evaluate", own)) == results_of(tmp_path / "run")
    (line,) = inside("predict", own, "input=a dog runs").splitlines()
    assert {part.split(" ")[0] for part in line.split("\t")} == {"animal", "other"}
    stored = checkpoint.load(tmp_path / "run/checkpoints/best.pt")["task"]["tokenizer"]
    assert stored == checkpoint.load(Path(best.partition("=")[2]))["task"]["tokenizer"]
    assert export.main([own, "--format", "torch"]) == 0


def test_a_translators_encoder_starts_from_the_masked_language_model(
    door: Door, inside: Door, best: str, tmp_path: Path
) -> None:
    (tmp_path / "pairs.tsv").write_text("".join(f"{text}\t{text.upper()}\n" for text in TEXTS))
    shape = [*SHAPE, "model.encoder_layers=2", "model.decoder_layers=1", "model.longest=39"]
    command = ["model=bert_translator", "data=parallel_text", *shape, "data.longest=30", "data.batch_size=600"]
    command += ["data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=275", "data.tokenizer.joint=false"]
    command += ["trainer.steps=4", "trainer.eval_every=4", "trainer.log_every=2", "trainer.device=cpu"]
    command += ["schedule.warmup=1", f"data.train.pairs={tmp_path}/pairs.tsv", best]
    output = door("train", *command, f"run_dir={tmp_path / 'run'}")
    tensors = {*checkpoint.load(Path(best.partition("=")[2]))["model"]}
    kept = {name for name in tensors if name.startswith(("embeddings.", "encoder."))}
    assert f": {len(kept)} tensors; re-initialised: embedding.weight, decoder." in output
    assert "70 + 275 entries" in output
    own = f"checkpoint={tmp_path}/run/checkpoints/best.pt"
    assert numbers_of(inside("evaluate", own)) == results_of(tmp_path / "run")
    (tmp_path / "in.txt").write_text("a dog runs\n\n")
    assert len(inside("predict", own, f"input={tmp_path}/in.txt").split("\n")) == 3
    assert export.main([own, "--format", "torch"]) == 0
    message = inside("train", *command, "task.keep_tokenizers=false", f"run_dir={tmp_path / 'no'}", code=2)
    assert "task.keep_tokenizers=false with the checkpoint of a masked language model" in message


def test_a_file_of_transformers_fills_in_blanks_as_transformers_does(inside: Door, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = word_piece()
    ids = {entry: id for id, entry in enumerate(tokenizer.entries)}
    theirs = transformers.BertTokenizer(vocab=ids)
    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**options, vocab_size=tokenizer.size, max_position_embeddings=40)
    model: Any = redrawn(transformers.BertForMaskedLM(config))
    model.save_pretrained(tmp_path / "bert")
    theirs.save_pretrained(tmp_path / "bert")
    keys = [f"checkpoint={tmp_path}/bert/model.safetensors", "model=bert", *SHAPE, "model.layers=2"]
    keys += ["trainer.device=cpu", "trainer.precision=fp32"]
    text = "A man sees a [MASK]."
    lines = inside("predict", *keys, f"input={text}", "top=4").splitlines()
    with torch.no_grad():
        encoded = theirs(text, return_tensors="pt")
        logits = model(**encoded).logits[0][encoded.input_ids[0] == theirs.mask_token_id][0]
    logits[: len(tokenizer.special_entries.ids)] = -torch.inf
    shares, best = logits.softmax(0).topk(4)
    expected = [f"{tokenizer.entries[i]} {share:.4f}" for share, i in zip(shares.tolist(), best.tolist(), strict=True)]
    assert lines[1].removeprefix("  1: ").split(", ") == expected
    (tmp_path / "bert/tokenizer.json").unlink()
    message = inside("predict", *keys, f"input={text}", code=2)
    assert "contains no tokenizer" in message
    (tmp_path / "bert/vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    assert "is the tokenizer of another model" in inside("predict", *keys, f"input={text}", code=2)
