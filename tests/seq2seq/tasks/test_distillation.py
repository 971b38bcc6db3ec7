"""A translator that learns from another one: its loss, its step, and teachers that do not suit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.config.migrations import migrate_config
from common.data.loading import Loader
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.task import Batch, Teacher
from common.train import assembly, optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from seq2seq.importing.layouts import MASKED_LOGIT
from seq2seq.tokenizers.bpe import BOS, PAD

CPU = torch.device("cpu")
TINY = ["model.width=16", "model.heads=2", "model.feedforward=24", "model.encoder_layers=1", "model.decoder_layers=1"]
SMALL = ["model=seq2seq", "data=parallel_text", *TINY, "trainer.device=cpu", "trainer.precision=fp32"]
SMALL += ["data.val_count=0", "data.test_count=0", "data.batch_size=400", "data.longest=60"]
SMALL += ["data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=262"]


@pytest.fixture
def keys(tmp_path: Path) -> list[str]:
    """The command line of a small model and data of 40 numbers of one to nine digits."""
    rng = generator("numbers", 0)
    rows = [torch.randint(10, (1 + i % 9,), generator=rng).tolist() for i in range(40)]
    lines = ["\t".join((" ".join(map(str, row)), "".join("abcdefghij"[digit] for digit in row))) for row in rows]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")
    return [*SMALL, f"data.train.pairs={tmp_path}/pairs.tsv"]


def randomise(model: nn.Module, seed: int) -> None:
    for name, parameter in model.named_parameters():
        mean = float(name.endswith("norm.weight"))
        nn.init.normal_(parameter, mean=mean, std=0.3, generator=torch.Generator().manual_seed(seed))


def write_teacher(file: Path, keys: list[str]) -> Path:
    """Write a checkpoint of a translator of another width with random weights."""
    config = configure("train", [*keys, "model.width=24"])
    task = build(config["task"], data=build(config["data"]))
    model = build_model(config["model"], task)
    randomise(model, 1)
    content = {"step": 3, "model": model.state_dict(), "average": None, "task": task.state(), "config": config}
    checkpoint.save(file, content)
    return file


def assembled(file: Path, keys: list[str], *more: str) -> assembly.Components:
    """The parts of a student's run, with random weights."""
    parts = assembly.assemble(configure("train", [*keys, f"task.distillation.teacher={file}", *more]))
    randomise(parts.model, 2)
    return parts


def training_batches(task: Any, counts: list[int]) -> list[Batch]:
    indices = iter([5, 0, 11, 7, 2, 9, 14, 3])
    cuts = [(0, tuple(next(indices) for _ in range(count))) for count in counts]
    return [*Loader(task.data, "train", seed=3, workers=0, pin=False)(cuts)]


def arguments(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch["source"], batch["source_lengths"], batch["target_in"]


def plain_loss(kind: str, temperature: float, logits: Tensor, teacher: Tensor) -> Tensor:
    """The mean over tokens, for logits (N, V)."""
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    p, q = ((part / temperature).softmax(1) for part in (teacher, logits))
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize(("kind", "temperature"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_the_loss_is_the_weighted_sum_of_the_plain_losses_of_real_tokens(
    keys: list[str], tmp_path: Path, kind: str, temperature: float
) -> None:
    options = [f"task.distillation.{key}" for key in (f"kind={kind}", f"temperature={temperature}", "weight=0.3")]
    parts = assembled(write_teacher(tmp_path / "teacher.pt", keys), keys, *options)
    task, model = parts.task, parts.model
    (batch,) = training_batches(task, [8])
    real = batch["target_out"] != PAD
    logits, of_teacher = (network(*arguments(batch))[real] for network in (model, task.teacher.model))
    labels = F.cross_entropy(logits, batch["target_out"][real], label_smoothing=0.1)
    distilled = plain_loss(kind, temperature, logits, of_teacher)
    loss, terms = task.loss(model, batch, task.normalisers(batch))
    torch.testing.assert_close(loss, 0.7 * labels + 0.3 * distilled, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["teacher"], distilled.detach(), rtol=1e-5, atol=0)
    assert terms.keys() == {"nll", "teacher"} and abs(labels.item() - distilled.item()) > 0.01
    assert not real.all() and not any(p.requires_grad for p in task.teacher.model.parameters())


def test_simcut_and_a_teacher_add_up(keys: list[str], tmp_path: Path) -> None:
    file = write_teacher(tmp_path / "teacher.pt", keys)
    losses = {}
    for weight in (0, 2):
        parts = assembled(file, keys, f"task.loss.simcut.weight={weight}", "task.loss.simcut.cutoff=0.3")
        (batch,) = training_batches(parts.task, [8])
        losses[weight], terms = parts.task.loss(parts.model, batch, parts.task.normalisers(batch))
    assert terms.keys() == {"nll", "teacher", "simcut"} and terms["simcut"] > 0.01
    torch.testing.assert_close(losses[2] - losses[0], 2 * terms["simcut"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_step_with_a_teacher_does_not_depend_on_the_micro_batches(keys: list[str], tmp_path: Path, kind: str) -> None:
    file = write_teacher(tmp_path / "teacher.pt", keys)

    def parameters_after(counts: list[int]) -> Tensor:
        parts = assembled(file, keys, f"task.distillation.kind={kind}")
        parts.task.teacher.model.double()
        options = construct(OptimizerOptions, configure("train", keys)["optimizer"])
        stepper = Stepper(parts.task, parts.model.double(), optim.build(parts.model, options), CPU, "fp32", 0.1)
        stepper(training_batches(parts.task, counts), 0)
        return torch.cat([p.detach().flatten() for p in stepper.parameters])

    whole = parameters_after([8])
    for counts in ([3, 1, 4], [1] * 8):
        assert (parameters_after(counts) - whole).abs().max() < 1e-10


@pytest.mark.parametrize("mask", [MASKED_LOGIT, -torch.inf])
@pytest.mark.parametrize("masks", ["both", "student", "teacher"])
def test_masked_entries_leave_the_loss_finite_without_gradients(
    keys: list[str], tmp_path: Path, masks: str, mask: float
) -> None:
    """In fp16, masked logits are infinite."""
    keys = [*keys, "model.output_bias=true"]
    parts = assembled(write_teacher(tmp_path / "teacher.pt", keys), keys, "task.distillation.weight=1.0")
    task, model = parts.task, parts.model
    networks = {"both": [model, task.teacher.model], "student": [model], "teacher": [task.teacher.model]}[masks]
    with torch.no_grad():
        for network in networks:
            network.output_bias[[PAD, BOS]] = mask
    (batch,) = training_batches(task, [8])
    loss, terms = task.loss(model, batch, task.normalisers(batch))
    loss.backward()
    assert terms["teacher"].isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
    if masks == "both":
        assert not model.output_bias.grad[[PAD, BOS]].any()
        real = batch["target_out"] != PAD
        logits, of_teacher = (network(*arguments(batch))[real][:, 2:] for network in (model, task.teacher.model))
        expected = plain_loss("soft", 1.0, logits.detach(), of_teacher)
        torch.testing.assert_close(terms["teacher"], expected, rtol=1e-5, atol=0)


def test_a_teacher_with_other_tokenizers_is_refused(keys: list[str], tmp_path: Path) -> None:
    file = write_teacher(tmp_path / "teacher.pt", [*keys, "data.tokenizer.vocabulary=261"])
    with pytest.raises(UserError, match=rf"^task\.distillation\.teacher={file}: the teacher has other tokenizers than"):
        assembled(file, keys)


def test_a_teacher_that_is_no_translator_is_refused(keys: list[str], tmp_path: Path) -> None:
    parts = assembled(write_teacher(tmp_path / "teacher.pt", keys), keys)
    with pytest.raises(UserError, match=r"^the teacher is no translator; give a checkpoint of one\.$"):
        parts.task.set_teacher(Teacher(nn.Identity(), object(), "file", ""))


def test_a_config_of_an_earlier_version_has_no_teacher(keys: list[str]) -> None:
    config = configure("train", keys)
    former = migrate_config(config)
    del former["task"]["distillation"]
    assert migrate_config(former) == config
    task = build(former["task"], data=None)
    assert task.teacher_file is None and task.distillation is None
