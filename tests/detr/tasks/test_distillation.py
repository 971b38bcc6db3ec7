"""A detector that learns from a teacher: its loss and step, its checkpoints, and teachers that do not suit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import cut_back
from torch import Tensor, nn

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.data.batching import Loader
from common.errors import UserError
from common.files import checkpoint
from common.task import Batch, Teacher
from common.train import assembly, optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper, step_normalisers
from detr.criterion.answers import group_by_set, stack_layers
from tests.stepping import SPLITS, batches, normalise64

Door = Callable[..., str]
CPU = torch.device("cpu")
SMALL = ["model.width=32", "model.heads=2", "model.decoder_layers=2", "model.feedforward=24", "trainer.device=cpu"]
SMALL += ["model.encoder_layers=1", "trainer.precision=fp32", "data.batch_size=4", "data.train_count=16"]
SMALL += ["data.val_count=4", "data.test_count=4"]
RUN = ["model=detr", *SMALL, "trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=1", "schedule.warmup=1"]
KINDS = pytest.mark.parametrize(
    ("of_student", "kind"), [("detr", "soft"), ("deformable_detr", "hard"), ("dino", "soft")]
)
LOW = "task.distillation.min_score=0.05"  # weights are sampled, so that predictions are not confident
CLASSES = [{"id": i, "name": str(i)} for i in range(3)]


@pytest.fixture(autouse=True)
def folder_of_shapes(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are drawn once, into a folder of the tests."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())


def write_teacher(file: Path, *keys: str, seed: int = 3, classes: list[dict[str, Any]] | None = None) -> Path:
    """Write a checkpoint of a detector with more queries than the student, sampled weights and clear logits."""
    config = configure("train", [*keys, *SMALL, "model.queries=14"])
    task = build(config["task"], data=build(config["data"]))
    if classes is not None:
        task.restore({"categories": classes})
    torch.manual_seed(seed)
    model = build_model(config["model"], task)
    _sample_zeros(model)
    content = {"step": 3, "model": model.state_dict(), "average": None, "task": task.state(), "config": config}
    checkpoint.save(file, content)
    return file


def _sample_zeros(model: nn.Module) -> None:
    """Sample the class heads, which begin with one probability, and the offsets.

    Initial offsets are whole cells, at which the derivative of bilinear interpolation jumps.
    """
    for name, parameter in model.named_parameters():
        if "class_head" in name or name.endswith("sampling_offsets.bias"):
            nn.init.normal_(parameter, std=0.3)


def assembled(kind: str, file: Path | None, *keys: str) -> assembly.Components:
    of_teacher = [f"task.distillation.teacher={file}"] if file else []
    parts = assembly.assemble(configure("train", [f"model={kind}", *SMALL, *of_teacher, *keys]))
    _sample_zeros(parts.model)
    return parts


def training_batch(task: Any, count: int = 4) -> Batch:
    (batch,) = Loader(task.data, "train", seed=1, workers=0, pin=False)([(0, tuple(range(count)))])
    return batch


def vector(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# The loss.


@KINDS
def test_the_loss_is_the_weighted_sum_of_those_of_labels_and_teacher(
    tmp_path: Path, of_student: str, kind: str
) -> None:
    file = write_teacher(tmp_path / "teacher.pt", f"model={of_student}")
    keys = [LOW, f"task.distillation.kind={kind}", "task.distillation.weight=0.3"]
    parts = assembled(of_student, file, *keys)
    task, batch = parts.task, training_batch(parts.task)
    normalisers = step_normalisers(task, [batch])
    loss, terms = task.loss(parts.model, batch, normalisers)
    labels, of_labels = assembled(of_student, None).task.loss(parts.model, batch, normalisers)
    assert terms["teacher"] > 0 and of_labels.keys() == terms.keys() - {"teacher"}
    torch.testing.assert_close(loss, 0.7 * labels + 0.3 * terms["teacher"], rtol=1e-5, atol=0)
    outputs = stack_layers(group_by_set(task._forward(parts.model, batch))["queries"])
    targets = task._teacher_targets(task.teacher, 0.05, batch)
    assert min(targets.counts) > 0
    values = task.teacher_criterion("teacher", outputs, targets, normalisers)
    torch.testing.assert_close(terms["teacher"], sum(value.sum() for value in values.values()).detach())
    assert normalisers["teacher.box"] == len(batch["boxes"])


@pytest.mark.parametrize("of_student", ["detr", "dino"])
def test_a_teacher_without_a_confident_prediction_adds_nothing_and_the_loss_is_finite(
    tmp_path: Path, of_student: str
) -> None:
    file = write_teacher(tmp_path / "teacher.pt", f"model={of_student}")
    parts = assembled(of_student, file, "task.distillation.min_score=1.0")
    batch = training_batch(parts.task)
    normalisers = step_normalisers(parts.task, [batch])
    loss, terms = parts.task.loss(parts.model, batch, normalisers)
    labels, _ = assembled(of_student, None).task.loss(parts.model, batch, normalisers)
    assert terms["teacher"] == 0
    torch.testing.assert_close(loss, labels / 2)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in parts.model.parameters())


def test_images_without_objects_learn_from_the_teacher_alone(tmp_path: Path) -> None:
    """Their normaliser is 1, as the trainer sets it."""
    parts = assembled("deformable_detr", write_teacher(tmp_path / "teacher.pt", "model=deformable_detr"), LOW)
    batch = training_batch(parts.task)
    batch |= {"boxes": batch["boxes"][:0], "labels": batch["labels"][:0], "counts": [0] * len(batch["counts"])}
    loss, terms = parts.task.loss(parts.model, batch, step_normalisers(parts.task, [batch]))
    assert terms["teacher"] > 0 and loss.isfinite() and terms["box"] == 0


# Steps.


@KINDS
def test_a_step_does_not_depend_on_how_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_student: str, kind: str
) -> None:
    """On images of unequal size, of which two have no object: the cuts differ in padding."""
    monkeypatch.setattr("detr.tasks.detection.normalise", normalise64)
    file = write_teacher(tmp_path / "teacher.pt", f"model={of_student}", classes=CLASSES)

    def stepped(counts: list[int]) -> tuple[Tensor, Tensor]:
        keys = [f"task.distillation.kind={kind}", f"task.distillation.teacher={file}", LOW]
        config = configure("train", [f"model={of_student}", *SMALL, *keys])
        task = build(config["task"], data=build(config["data"]))
        task.restore({"categories": CLASSES})
        torch.manual_seed(0)
        student = build_model(config["model"], task).double()
        _sample_zeros(student)
        stored = assembly.restore(configure("evaluate", [f"checkpoint={file}"], assembly.stored_config))
        task.set_teacher(Teacher(stored.model.double().requires_grad_(False), stored.task, "", ""))
        options = construct(OptimizerOptions, config["optimizer"])
        before = vector(student)
        stepper = Stepper(task, student, optim.build(student, options), CPU, "fp32", 0.1)
        parts = [batch | {"seeds": [1000 + id for id in batch["ids"]]} for batch in batches(counts)]
        assert stepper(parts, 0)["teacher"] > 0
        return before, vector(student)

    before, whole = stepped(SPLITS["1x8"])
    assert (stepped(SPLITS["3+1+4"])[1] - whole).abs().max() <= 1e-10
    assert (whole - before).abs().max() > 1e-5, "the step changes the parameters"


# The teacher.


def test_the_teacher_is_in_evaluation_mode_without_gradients_and_unchanged_by_steps(tmp_path: Path) -> None:
    parts = assembled("detr", write_teacher(tmp_path / "teacher.pt", "model=detr", "model.dropout=0.1"), LOW)
    task, model = parts.task, parts.model.train()
    before = {name: tensor.clone() for name, tensor in task.teacher.model.state_dict().items()}
    optimizer = optim.build(model, construct(OptimizerOptions, configure("train", RUN)["optimizer"]))
    stepper, start = Stepper(task, model, optimizer, CPU, "fp32", 1.0), vector(model)
    for step in range(2):
        stepper([training_batch(task)], step)
    assert not torch.equal(vector(model), start), "the student learns"
    assert not any(module.training for module in task.teacher.model.modules())
    assert not any(p.requires_grad for p in task.teacher.model.parameters())
    torch.testing.assert_close(task.teacher.model.state_dict(), before, rtol=0, atol=0)
    assert task.state() == assembled("detr", None).task.state(), "the teacher is no part of a checkpoint"


def test_classes_are_compared_by_name_and_order_and_nameless_ones_by_number(tmp_path: Path) -> None:
    parts = assembled("detr", None)
    ours = [category["name"] for category in parts.task.categories]

    def notes(names: list[str]) -> list[str]:
        task = build(configure("train", RUN)["task"], data=parts.data)
        task.restore({"categories": [{"id": 5 + i, "name": name} for i, name in enumerate(names)]})
        return parts.task.set_teacher(Teacher(parts.model, task, "file", ""))

    assert notes(ours) == [], "category ids may differ"
    for wrong in (ours[::-1], ours[:-1], [f"class {i}" for i in range(len(ours) - 1)]):
        with pytest.raises(UserError, match="give a teacher that was trained on the same classes in the same order"):
            notes(wrong)
    [note] = notes([f"class {i}" for i in range(len(ours))])
    assert note.startswith(f"the teacher's file does not name its {len(ours)} classes; they are taken to have the ord")


def test_a_teacher_of_another_kind_or_with_incomparable_probabilities_is_refused(tmp_path: Path) -> None:
    prefix = r"^task\.distillation\.teacher=.*: the teacher "
    file = write_teacher(tmp_path / "sigmoid.pt", "model=deformable_detr")
    with pytest.raises(
        UserError, match=rf"{prefix}has task\.loss\.classification=sigmoid, and this run has softmax.*hard"
    ):
        assembled("detr", file)
    parts = assembled("detr", file, "task.distillation.kind=hard", LOW)
    batch = training_batch(parts.task)
    assert parts.task.loss(parts.model, batch, step_normalisers(parts.task, [batch]))[1]["teacher"] > 0
    with pytest.raises(UserError, match=r"^the teacher is no detector with queries; give a checkpoint of a DETR"):
        parts.task.set_teacher(Teacher(nn.Identity(), object(), "file", ""))


@pytest.mark.slow
def test_a_distilled_run_resumes_exactly_and_is_evaluated_without_the_teacher(inside: Door, tmp_path: Path) -> None:
    file = write_teacher(tmp_path / "teacher.pt", "model=detr")
    line = [*RUN, f"task.distillation.teacher={file}", LOW]
    output = inside("train", *line, f"run_dir={tmp_path / 'whole'}")
    assert f"teacher   {file}: step 3, raw; Detector, " in output and "parameters, fp32, not trained" in output
    content = checkpoint.load(tmp_path / "whole/checkpoints/step_00000004.pt")
    assert len(content["teacher"]) == 32 and content["task"].keys() == {"categories"}
    assert not any("teacher" in name for name in content["model"])
    lines = (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert json.loads(lines.splitlines()[0])["train/teacher"] > 0
    cut = cut_back(tmp_path / "whole", tmp_path / "cut", 2)
    inside("train", *line, f"run_dir={cut}", "resume=auto")
    assert (cut / "metrics.jsonl").read_bytes() == lines
    file.unlink()
    best = f"checkpoint={tmp_path / 'whole/checkpoints/best.pt'}"
    numbers = json.loads(next(text for text in inside("evaluate", best).splitlines() if text.startswith("{")))
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert numbers == {name: value for name, value in results.items() if name.startswith("test/")}
