"""A classifier that learns from a teacher: its loss, its step, its checkpoints, and teachers that do not suit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from resuming import cut_back
from teaching import SMALL, write_teacher
from torch import Tensor, nn

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.config.migrations import migrate_config
from common.data.batching import Loader
from common.errors import UserError
from common.files import checkpoint
from common.task import Batch, Teacher
from common.train import assembly, optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from vit.tasks.distillation import check_teacher

Door = Callable[..., str]
CPU = torch.device("cpu")
MIXED = ["data.augmentation.mixup=0.8", "data.augmentation.cutmix=1.0", "data.augmentation.repeats=2"]
RUN = [*SMALL, "trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=1", "schedule.warmup=1"]
WITH_TOKEN = "model.distillation_token=true"


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return write_teacher(tmp_path / "the teacher, of=mine.pt")


def assembled(file: Path | None, *keys: str) -> assembly.Components:
    """The parts of a student's run, with non-zero heads."""
    of_teacher = [f"task.distillation.teacher={file}"] if file else []
    parts = assembly.assemble(configure("train", [*SMALL, *of_teacher, *keys]))
    random = torch.Generator().manual_seed(5)
    for name, parameter in parts.model.named_parameters():
        if "head" in name:
            nn.init.normal_(parameter, std=0.3, generator=random)
    return parts


def training_batch(task: Any, count: int = 6) -> Batch:
    (batch,) = Loader(task.data, "train", seed=1, workers=0, pin=False)([(0, tuple(range(count)))])
    return batch


def plain_loss(kind: str, temperature: float, logits: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the samples, for logits (B, K)."""
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    p, q = ((part / temperature).softmax(1) for part in (teacher, logits))
    return temperature**2 * (p * (p / q).log()).sum(1).mean()


# The loss.


@pytest.mark.parametrize("token", [False, True], ids=["one head", "two heads"])
@pytest.mark.parametrize(("kind", "temperature"), [("hard", 1.0), ("soft", 1.0), ("soft", 3.0)])
def test_the_loss_is_the_weighted_sum_of_the_plain_losses(
    teacher: Path, token: bool, kind: str, temperature: float
) -> None:
    """The class head learns from smoothed and mixed labels, and the distillation head from the teacher."""
    options = [f"task.distillation.{key}" for key in (f"kind={kind}", f"temperature={temperature}", "weight=0.3")]
    parts = assembled(teacher, *options, *MIXED, f"model.distillation_token={token}")
    task, model, batch = parts.task, parts.model.train(), training_batch(parts.task)
    images = task.data.inputs(batch, CPU)
    outputs, of_teacher = model(images), task.teacher.model(images)
    logits, student = outputs if token else (outputs, outputs)
    own, partner = (F.one_hot(batch[key], 10) for key in ("labels", "other_labels"))
    targets = batch["shares"][:, None] * own + (1 - batch["shares"])[:, None] * partner
    labels = F.cross_entropy(logits, targets, label_smoothing=0.1)
    distilled = plain_loss(kind, temperature, student, of_teacher)
    loss, terms = task.loss(model, batch, task.normalisers(batch))
    torch.testing.assert_close(loss, 0.7 * labels + 0.3 * distilled, rtol=1e-5, atol=0)
    torch.testing.assert_close(terms, {"labels": labels.detach(), "teacher": distilled.detach()}, rtol=1e-5, atol=0)
    assert abs(labels.item() - distilled.item()) > 0.01


def test_without_a_teacher_the_mean_of_both_heads_learns_from_the_labels() -> None:
    parts = assembled(None, WITH_TOKEN)
    batch = training_batch(parts.task)
    mean = parts.model.eval()(parts.task.data.inputs(batch, CPU))
    loss, terms = parts.task.loss(parts.model.train(), batch, parts.task.normalisers(batch))
    expected = F.cross_entropy(mean, batch["labels"], label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert terms == {} and parts.task.teacher is None


def test_a_distilled_teacher_teaches_the_mean_of_its_heads(tmp_path: Path) -> None:
    parts = assembled(write_teacher(tmp_path / "two heads.pt", WITH_TOKEN), "task.distillation.weight=1.0")
    batch = training_batch(parts.task)
    images = parts.task.data.inputs(batch, CPU)
    teacher = parts.task.teacher.model
    expected = F.cross_entropy(parts.model(images), teacher(images).argmax(1))
    assert isinstance(teacher(images), Tensor) and teacher.distillation_token is not None
    loss, _ = parts.task.loss(parts.model, batch, parts.task.normalisers(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


# The teacher.


def test_the_teacher_is_in_evaluation_mode_without_gradients_and_unchanged_by_steps(teacher: Path) -> None:
    parts = assembled(teacher, WITH_TOKEN)
    task, model = parts.task, parts.model.train()
    before = {name: tensor.clone() for name, tensor in task.teacher.model.state_dict().items()}
    assert not any(p.requires_grad for p in task.teacher.model.parameters())
    config = configure("train", SMALL)
    optimizer = optim.build(model, construct(OptimizerOptions, config["optimizer"]))
    stepper = Stepper(task, model, optimizer, CPU, "fp32", 1.0)
    start = optim_vector(model)
    for step in range(3):
        stepper([training_batch(task)], step)
    assert not torch.equal(optim_vector(model), start), "the student learns"
    assert not any(module.training for module in task.teacher.model.modules())
    for name, tensor in task.teacher.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def optim_vector(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_averaged_weights_teach_and_the_digest_is_that_of_the_weights(tmp_path: Path, teacher: Path) -> None:
    content = checkpoint.load(teacher)
    weights = {name: tensor + 0.5 for name, tensor in content["model"].items()}
    checkpoint.save(tmp_path / "ema.pt", {**content, "average": {"updates": 3, "weights": weights}})
    raw, averaged = (assembled(file).task.teacher for file in (teacher, tmp_path / "ema.pt"))
    assert torch.equal(averaged.model.head.bias, raw.model.head.bias + 0.5) and averaged.digest != raw.digest
    checkpoint.save(tmp_path / "copy.pt", {**content, "step": 9})
    assert assembled(tmp_path / "copy.pt").task.teacher.digest == raw.digest
    assert "averaged (EMA)" in averaged.title and "ema.pt: step 3" in averaged.title


def test_a_teacher_does_not_change_the_initial_weights_of_the_student(teacher: Path) -> None:
    with_teacher, without = (assembled(file).model.state_dict() for file in (teacher, None))
    torch.testing.assert_close(with_teacher, without, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["data.image_size=12"], r"trained on images with data\.image_size=\[12, 12\], and this run has .*=\[8, 8\]"),
        (["data.mean=[0.5]"], r"data\.mean=\[0\.5\], and this run has data\.mean=\[0\.306\]; give the same value"),
        (["data=fashion_mnist", "model.patch_size=4"], r"10 classes \(T-shirt/top, .*the data have 10 \(0, 1, 2"),
    ],
)
def test_a_teacher_of_other_images_or_classes_is_refused(tmp_path: Path, keys: list[str], sentence: str) -> None:
    file = write_teacher(tmp_path / "other.pt", *keys)
    with pytest.raises(UserError, match=rf"^task\.distillation\.teacher={file}: the teacher .*{sentence}") as caught:
        assembled(file)
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(".")


def test_classes_are_compared_by_name_and_order_and_nameless_ones_by_number(teacher: Path) -> None:
    parts = assembled(None)

    def notes(names: list[str]) -> list[str]:
        task = build(configure("train", SMALL)["task"], data=parts.data)
        task.restore({"classes": names})
        return check_teacher(Teacher(parts.model, task, "file", ""), parts.task.classes, parts.data)

    assert notes(list("0123456789")) == []
    for wrong in (list("0123456798"), list("012345678"), [f"class {i}" for i in range(9)]):
        with pytest.raises(UserError, match="give a teacher that was trained on the same classes in the same order"):
            notes(wrong)
    [note] = notes([f"class {i}" for i in range(10)])
    assert note.startswith("the teacher's file does not name its 10 classes; they are taken to have the order of")


def test_a_missing_file_another_programs_file_and_no_classifier_are_refused(tmp_path: Path, teacher: Path) -> None:
    prefix = r"^task\.distillation\.teacher=.*: "
    with pytest.raises(UserError, match=rf"{prefix}.*there is no such file"):
        assembled(tmp_path / "missing.pt")
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "foreign.pth")
    sentence = r"a file of another program does not say which model it holds; .*python scripts/import_weights\.py "
    with pytest.raises(UserError, match=prefix + sentence):
        assembled(tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"the teacher is no image classifier; give a checkpoint of one\.$"):
        check_teacher(Teacher(nn.Identity(), object(), "file", ""), ["a"], assembled(None).data)
    config = configure("train", ["model=igpt", "data=digits", "model.width=8", "model.layers=1", "model.heads=1"])
    pixels = build(config["task"], data=build(config["data"]))  # it has the classes, the size and the mean of the data
    content = {"model": build_model(config["model"], pixels).state_dict(), "task": pixels.state(), "config": config}
    checkpoint.save(tmp_path / "igpt.pt", {"step": 3, "average": None, **content})
    with pytest.raises(UserError, match=rf"{prefix}the teacher is no image classifier; give a checkpoint of one\.$"):
        assembled(tmp_path / "igpt.pt")


# Steps, checkpoints and resuming.


@pytest.mark.parametrize("token", [False, True], ids=["one head", "two heads"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_step_does_not_depend_on_how_it_is_cut(teacher: Path, kind: str, token: bool) -> None:
    keys = [f"task.distillation.kind={kind}", "task.distillation.temperature=2.0", *MIXED]

    def parameters_after(lengths: list[int]) -> Tensor:
        parts = assembled(teacher, *keys, f"model.distillation_token={token}")
        for network in (parts.model, parts.task.teacher.model):
            network.double().register_forward_pre_hook(lambda _, images: (images[0].double(),))
        options = construct(OptimizerOptions, configure("train", SMALL)["optimizer"])
        stepper = Stepper(parts.task, parts.model.train(), optim.build(parts.model, options), CPU, "fp32", 0.1)
        rest = iter([5, 0, 11, 7, 2, 9, 14, 3])
        cuts = [(0, tuple(next(rest) for _ in range(length))) for length in lengths]
        stepper([*Loader(parts.task.data, "train", seed=3, workers=0, pin=False)(cuts)], 0)
        return optim_vector(parts.model)

    whole = parameters_after([8])
    for lengths in ([3, 1, 4], [1] * 8):
        assert (parameters_after(lengths) - whole).abs().max() < 1e-10


def losses(folder: Path) -> bytes:
    return (folder / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_distilled_run_resumes_exactly_and_is_evaluated_without_the_teacher(
    inside: Door, teacher: Path, tmp_path: Path
) -> None:
    line = [*RUN, WITH_TOKEN]
    of_teacher = f"task.distillation.teacher={teacher}"
    output = inside("train", *line, of_teacher, f"run_dir={tmp_path / 'whole'}")
    assert f"teacher   {teacher}: step 3, raw; Classifier, " in output and "parameters, fp32, not trained" in output
    content = checkpoint.load(tmp_path / "whole/checkpoints/step_00000004.pt")
    sizes = {name: tensor.numel() for name, tensor in content["model"].items()}
    config = configure("train", [*line, of_teacher])
    student = build_model(config["model"], build(config["task"], data=build(config["data"])))
    assert sizes == {name: tensor.numel() for name, tensor in student.state_dict().items()}
    assert content["task"] == {"classes": list("0123456789")} and len(content["teacher"]) == 32
    assert {name for name in content["optimizer"]} <= {*sizes}
    first = json.loads(losses(tmp_path / "whole").splitlines()[0])
    assert {"train/labels", "train/teacher", "train/loss"} <= first.keys()
    expected = (first["train/labels"] + first["train/teacher"]) / 2
    assert first["train/loss"] == pytest.approx(expected, rel=1e-6)

    cut = cut_back(tmp_path / "whole", tmp_path / "cut", 2)
    moved = teacher.rename(tmp_path / "moved.pt")
    inside("train", *line, f"task.distillation.teacher={moved}", f"run_dir={cut}", "resume=auto")
    assert losses(cut) == losses(tmp_path / "whole")

    other = write_teacher(tmp_path / "other.pt", seed=1)
    cut = cut_back(tmp_path / "whole", tmp_path / "again", 2)
    message = inside("train", *line, f"task.distillation.teacher={other}", f"run_dir={cut}", "resume=auto", code=2)
    assert "the teacher is not the one that the run of" in message and "other.pt: step 3, raw) differ" in message
    assert "give allow_changes=[task.distillation.teacher]" in message
    allowed = "allow_changes=[task.distillation.teacher]"
    inside("train", *line, f"task.distillation.teacher={other}", f"run_dir={cut}", "resume=auto", allowed)
    assert losses(cut) != losses(tmp_path / "whole")
    message = inside(
        "train", *line, f"run_dir={cut_back(tmp_path / 'whole', tmp_path / 'c', 2)}", "resume=auto", code=2
    )
    assert "there is none" in message and "the teacher is not the one" in message

    for file in (moved, other):
        file.unlink()
    file = f"checkpoint={tmp_path / 'whole/checkpoints/best.pt'}"
    numbers = json.loads(next(text for text in inside("evaluate", file).splitlines() if text.startswith("{")))
    results = json.loads((tmp_path / "whole/results.json").read_text())
    assert numbers == {name: value for name, value in results.items() if name.startswith("test/")}


def test_a_head_for_other_classes_is_not_taken_over(tmp_path: Path) -> None:
    file = write_teacher(tmp_path / "classes.pt", WITH_TOKEN, "data=fashion_mnist", "model.patch_size=4")
    line = assembled(None, WITH_TOKEN, "model.width=24", f"checkpoint={file}", "model.patch_size=4").weights_line
    assert "head.weight" in line and "distillation_head.weight" in line and "distillation_token" not in line


def test_a_config_of_an_earlier_version_has_no_teacher_and_no_distillation_token() -> None:
    config = configure("train", SMALL)
    former = migrate_config({**config, "task": {**config["task"]}, "model": {**config["model"]}})
    del former["task"]["distillation"], former["model"]["distillation_token"]
    assert migrate_config(former) == config
    task = build({key: value for key, value in config["task"].items() if key != "distillation"}, data=None)
    assert task.teacher_file is None and task.distillation is None


def test_options_out_of_range_are_refused() -> None:
    for key, words in {
        "task.distillation.kind=herd": "did you mean hard?",
        "task.distillation.weight=1.5": "task.distillation.weight=1.5: expected",
        "task.distillation.temperature=0": "task.distillation.temperature=0: expected",
    }.items():
        with pytest.raises(UserError) as caught:
            configure("train", [*SMALL, key])
        assert words in str(caught.value)


def test_null_in_place_of_the_options_means_no_teacher() -> None:
    task = build(configure("train", [*SMALL, "task.distillation=null"])["task"], data=None)
    assert task.teacher_file is None and task.distillation is None
