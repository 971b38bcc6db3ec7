"""The doors with a GPT-2 file of another program: continue prompts, score a text, train further."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seq2seq.importing.gpt2 import adopt
from seq2seq.models.gpt import Gpt, GptBlockOptions
from seq2seq.tokenizers import files
from tests.gpt2_files import (
    ENTRIES,
    HEADS,
    LAYERS,
    LONGEST,
    VOCABULARY,
    WIDTH,
    state_dict,
    write_model,
    write_tokenizer,
)

Door = Callable[..., str]
SHAPE = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH, "longest": LONGEST}
KEYS = ["model=gpt2", *(f"model.{name}={value}" for name, value in SHAPE.items())]
KEYS += ["data.block=16", "data.stride=8", "data.batch_size=64", "data.cache=null", "trainer.device=cpu"]
KEYS += ["trainer.precision=fp32"]
TEXT = "the cat and the dog see the other cat.\n" * 12
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


def model() -> Gpt:
    blocks = GptBlockOptions(dropout=0.0, attention_dropout=0.0, norm_eps=1e-5, activation="gelu_tanh")
    built = Gpt(**SHAPE, vocabulary=ENTRIES, blocks=blocks).eval()
    built.load_state_dict(adopt(dict(state_dict()), None).weights)
    return built


@torch.no_grad()
def test_prompts_are_continued_greedily_as_repeated_whole_passes_do(inside: Door, file: Path) -> None:
    output = inside("predict", f"checkpoint={file}", *KEYS, "input=the cat", "method=greedy", "longest_extra=6")
    tokenizer, _ = files.read(file.parent)
    ids = tokenizer.encode("the cat")
    for _ in range(6):
        ids.append(int(model()(torch.tensor([ids]))[0, -1].argmax()))
    end = tokenizer.special.end
    expected = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    assert expected in output and len(expected) > len("the cat")


@torch.no_grad()
def test_evaluation_predicts_every_token_once_from_the_tokens_before_it(inside: Door, file: Path, text: Path) -> None:
    """Windows of 16 tokens at a stride of 8; the first token follows the end token of the preceding document."""
    output = inside("evaluate", f"checkpoint={file}", *KEYS, f"data.test={text}", "output=scores")
    numbers = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    tokenizer, _ = files.read(file.parent)
    ids = [tokenizer.special.begin, *tokenizer.encode(TEXT)]
    nats = 0.0
    for start in range(1, len(ids), 8):
        end = min(start + 8, len(ids))
        first = max(1, end - 16)
        logits = model()(torch.tensor([ids[first - 1 : end - 1]]))[0]
        losses = F.cross_entropy(logits, torch.tensor(ids[first:end]), reduction="none")
        nats += float(losses[start - first :].sum())
    value = next(numbers[name] for name in numbers if name.endswith("bits_per_byte"))
    assert value == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_a_run_from_the_file_has_its_tokenizer_and_its_checkpoint_continues_prompts(
    inside: Door, file: Path, text: Path, tmp_path: Path
) -> None:
    run = [*KEYS, f"data.train={text}", "trainer.steps=4", "schedule.warmup=1", "trainer.eval_every=4"]
    output = inside("train", f"checkpoint={file}", *run, f"run_dir={tmp_path / 'run'}", "trainer.workers=0")
    assert f"{ENTRIES:,} entries" in output and "initialised at random" not in output
    best = next((tmp_path / "run/checkpoints").glob("best*.pt"))
    output = inside("predict", f"checkpoint={best}", "input=the cat", "method=greedy", "trainer.device=cpu")
    assert any(line.startswith("the cat") and len(line) > len("the cat") for line in output.splitlines()), output


# Mistakes.


def test_a_prompt_longer_than_the_context_is_named(door: Door, file: Path) -> None:
    output = door("predict", f"checkpoint={file}", *KEYS, f"input={'x ' * 20}", code=1)
    assert "has 40 tokens, more than model.longest=16, the context of the model; give a shorter prompt" in output


def test_a_block_longer_than_the_context_is_refused(inside: Door, file: Path, text: Path) -> None:
    message = inside("evaluate", f"checkpoint={file}", *KEYS, "data.block=32", f"data.test={text}", code=2)
    assert "data.block=32 is more than model.longest=16" in message


def test_a_tokenizer_of_another_model_is_refused(inside: Door, tmp_path: Path) -> None:
    file = write_model(tmp_path)
    write_tokenizer(tmp_path, "vocab.json", [*VOCABULARY, "\u0120cat"])
    message = inside("predict", f"checkpoint={file}", *KEYS, "input=the cat", code=2)
    assert f"it has {ENTRIES + 1} entries, and the embeddings have {ENTRIES} rows" in message


def test_without_a_tokenizer_the_file_has_no_text(inside: Door, tmp_path: Path) -> None:
    file = write_model(tmp_path)
    (tmp_path / "merges.txt").unlink()
    message = inside("predict", f"checkpoint={file}", *KEYS, "input=the cat", code=2)
    assert "contains no tokenizers, expected one" in message
