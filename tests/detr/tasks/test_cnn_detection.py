"""The task of CNN detectors: steps, targets, answers of any number, warnings, and runs through the doors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.errors import UserError
from common.files.log import Log
from common.train import assembly, optim
from common.train.optim import OptimizerOptions, ScheduleOptions
from common.train.state import Run
from common.train.step import Stepper
from scripts import export
from tests.ranks import run_ranks

SMALL = ("faster_rcnn", "retinanet", "fcos")
CLASSES = [{"id": i + 1, "name": name} for i, name in enumerate(("circle", "square", "triangle"))]


def made_task(name: str, *overrides: str) -> Any:
    config = configure("train", [f"model={name}", *overrides])
    task = build(config["task"], data=build(config["data"]))
    task.restore({"categories": CLASSES})
    return task


def made_model(name: str, *overrides: str) -> nn.Module:
    torch.manual_seed(0)
    config = configure("train", [f"model={name}", *overrides])
    model: nn.Module = build_model(config["model"], made_task(name))
    return model


def samples(side: int | None = None) -> list[dict[str, Any]]:
    """Eight images of unequal sizes, or squares with a side of `side` pixels; two have no object."""
    rng = torch.Generator().manual_seed(1)
    images = []
    for i, count in enumerate([2, 0, 5, 1, 3, 1, 0, 4]):
        height, width = (side, side) if side else (33 + 9 * i, 120 - 11 * i)
        corners = torch.rand(count, 2, generator=rng) * torch.tensor([width, height]) * 0.5
        images.append(
            {
                "id": i,
                "file": str(i),
                "image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=rng),
                "original_size": (2 * height, width),
                "boxes": torch.cat([corners, corners + torch.tensor([width, height]) * 0.4], dim=1),
                "labels": torch.randint(0, 3, (count,), generator=rng),
            }
        )
    return images


def batches(counts: list[int], part: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
    iterator = iter(samples() if part is None else part)
    return [made_task("fcos").data.collate([next(iterator) for _ in range(count)]) for count in counts]


def gradient(name: str, micro_batches: list[dict[str, Any]], *overrides: str) -> Tensor:
    """The gradient of a step that is not clipped, all parameters in one vector."""
    model = made_model(name, *overrides)
    options = construct(OptimizerOptions, configure("train", [f"model={name}"])["optimizer"])
    stepper = Stepper(made_task(name), model, optim.build(model, options), torch.device("cpu"), "fp32", None)
    torch.manual_seed(1)
    stepper(micro_batches, 0)
    return torch.cat([p.grad.flatten() for p in stepper.parameters if p.grad is not None])


@pytest.mark.parametrize("split", [[3, 1, 4], pytest.param([1] * 8, marks=pytest.mark.slow)])
def test_a_step_of_retinanet_does_not_depend_on_the_split(split: list[int]) -> None:
    whole, in_parts = gradient("retinanet", batches([8])), gradient("retinanet", batches(split))
    assert (whole - in_parts).norm() <= 1e-5 * whole.norm(), "fp32 sums in another order"


def test_the_parts_that_depend_on_the_micro_batch_are_named() -> None:
    names = {name: made_model(name).per_micro_batch for name in SMALL}
    assert names["retinanet"] == () and "samples" in names["faster_rcnn"][0] and "positive" in names["fcos"][0]
    padded = made_model("retinanet", "model.official_padding=true")
    assert padded.per_micro_batch == ("padding",)


@pytest.mark.slow
def test_what_is_named_does_depend_on_the_micro_batch() -> None:
    controls = [("fcos", samples(64), []), ("retinanet", samples(), ["model.official_padding=true"])]
    for name, images, overrides in controls:
        whole, in_parts = (gradient(name, batches(split, images), *overrides) for split in ([8], [3, 1, 4]))
        assert (whole - in_parts).norm() > 1e-3 * whole.norm(), "the control"


def test_a_step_of_faster_rcnn_is_a_function_of_the_seed() -> None:
    first, second = (gradient("faster_rcnn", batches([2, 2])) for _ in range(2))
    assert torch.equal(first, second)


def gradient_of_rank(name: str) -> Tensor:
    from common.data.batching import rank_samples
    from common.machine import distributed

    return gradient(name, batches([4], rank_samples(samples(), distributed.rank(), 2)))


def gradients_of_rank() -> list[Tensor]:
    return [gradient_of_rank(name) for name in SMALL]


@pytest.mark.slow
def test_two_processes_add_up_their_gradients(tmp_path: Path) -> None:
    first, second = run_ranks(tmp_path, 2, gradients_of_rank)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.isfinite().all() and a.any()
    whole = gradient("retinanet", batches([8]))
    assert (first[SMALL.index("retinanet")] - whole).norm() <= 1e-5 * whole.norm(), "fp32 sums in another order"


@pytest.mark.parametrize("name", SMALL)
def test_boxes_without_an_extent_are_no_targets(name: str) -> None:
    task, model = made_task(name), made_model(name).train()
    (batch,) = batches([4])
    batch["boxes"][0, 2] = batch["boxes"][0, 0]
    batch["boxes"][2, 3] = batch["boxes"][2, 1]
    assert [len(target["boxes"]) for target in task.targets(batch)] == [1, 0, 4, 1]
    loss, parts = task.loss(model, batch, task.normalisers(batch))
    assert loss.isfinite() and len(parts) >= 2
    assert float(loss.detach()) == pytest.approx(sum(map(float, parts.values())), rel=1e-5)


class FixedModel(nn.Module):
    """A model with `counts[i]` detections in image i of a batch."""

    def __init__(self, counts: list[int]):
        super().__init__()
        self.weight, self.counts = nn.Parameter(torch.zeros(())), counts

    def forward(self, images: Tensor, sizes: Tensor | None, targets: Any = None) -> dict[str, Any]:
        box = torch.tensor([[8.0, 16.0, 24.0, 32.0]])
        answers = [
            {
                "boxes": box.repeat(count, 1) + torch.arange(count)[:, None],
                "scores": torch.linspace(0.9, 0.6, count),
                "labels": torch.arange(count) % 3,
            }
            for count in self.counts[: len(images)]
        ]
        return {"detections": answers}


def test_detections_of_any_number_become_metrics_files_and_pictures(tmp_path: Path) -> None:
    task = made_task("faster_rcnn", f"data.root={tmp_path}", "data.train_count=4", "data.val_count=4")
    task.restore({"categories": task.data.categories()})
    batch = task.data.collate([task.data.sample("val", i, None) for i in range(4)])
    answers = task.answers(FixedModel([3, 0, 1, 7]), batch)
    assert [len(answer["boxes"]) for answer in answers] == [3, 0, 1, 7]
    metric = task.metric("val")
    metric.update(batch, answers)
    metric.gather()
    assert 0 <= metric.compute()["AP"] <= 1
    metric.write(tmp_path)
    entries = json.loads((tmp_path / "boxes.json").read_text())
    assert [sum(entry["image_id"] == id for entry in entries) for id in batch["ids"]] == [3, 0, 1, 7]
    assert entries[0]["bbox"] == [8, 16, 16, 16]
    assert task.pictures(batch, answers, 3).shape[0] == 3
    assert task.alarms(answers) == [] and "detects nothing" in task.alarms([answers[1]])[0]


def test_answers_are_in_pixels_of_the_original_images(tmp_path: Path) -> None:
    (batch,) = batches([2])  # their heights were twice as large
    answers = made_task("fcos").answers(FixedModel([1, 2]), batch)
    assert answers[0]["boxes"].tolist() == [[8, 32, 24, 64]] and len(answers[1]["boxes"]) == 2


def test_records_respect_threshold_and_suppression(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    task = made_task("fcos", "task.predict.threshold=0.7")
    records = task.predict(FixedModel([4]), str(tmp_path / "a.png"))
    assert [record["name"] for record in records] == ["circle", "square", "triangle"]
    assert task.predict(FixedModel([0]), str(tmp_path / "a.png")) == []
    task = made_task("fcos", "task.predict.threshold=0", "task.predict.nms=0.4")
    assert len(task.predict(FixedModel([4]), str(tmp_path / "a.png"))) == 3, "the two circles overlap"


def test_training_from_scratch_on_few_images_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = ["data.train_count=12", "data.val_count=3", "data.test_count=3"]
    task = made_task("retinanet", f"data.root={tmp_path}", *counts)
    assert task.advice(pretrained=False) == []
    monkeypatch.setattr(type(task.data), "drawn", False)
    (advice,) = task.advice(pretrained=False)
    assert "only 12 training images" in advice and "configs/weights.yaml" in advice and "DETR" not in advice
    assert task.advice(pretrained=True) == []


def test_a_model_without_losses_is_refused() -> None:
    (batch,) = batches([2])
    with pytest.raises(UserError, match="FixedModel, which returns no losses in training mode"):
        made_task("fcos").loss(FixedModel([1, 1]), batch, {"images": 2.0})


def test_export_is_refused_by_name() -> None:
    parts = assembly.Components(None, made_task("fcos"), made_model("fcos"), None, None, "")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"FCOS of torchvision cannot be exported.*use predict\.py"):
        export.make_plan(parts)


def started_run(folder: Path, *overrides: str) -> tuple[assembly.Components, Run]:
    config = configure("train", [*overrides, "trainer.log=[]", "trainer.workers=0"])
    parts = assembly.assemble(config)
    run = Run(
        task=parts.task,
        data=parts.data,
        model=parts.model,
        optimizer=construct(OptimizerOptions, config["optimizer"]),
        schedule=construct(ScheduleOptions, config["schedule"]),
        config=config,
        seed=0,
        folder=folder,
    )
    return parts, run


def test_sharding_is_refused(tmp_path: Path) -> None:
    data = [f"data.root={tmp_path}", "data.train_count=4", "data.val_count=1", "data.test_count=1"]
    parts, run = started_run(tmp_path / "run", "model=fcos", *data, "trainer.strategy=fsdp")
    with Log(run.folder, main=True) as log, pytest.raises(UserError, match=r"trainer\.strategy=fsdp: .*use .*=ddp"):
        parts.trainer.fit(run, log, on=parts.device, resume=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_four_drawn_images_are_overfitted(name: str, tmp_path: Path) -> None:
    """The test images are the training images."""
    _, made = started_run(tmp_path / "first", "model=fcos", f"data.root={tmp_path}", "data.train_count=4")
    made.data.count("train")
    (annotations,) = tmp_path.rglob("train.json")
    files = [f"data.{split}.annotations={annotations}" for split in ("train", "val", "test")]
    files += [f"data.{split}.images={annotations.parent / 'train'}" for split in ("train", "val", "test")]
    sizes = ["data.augmentation.kind=none", "data.augmentation.eval_size=64", "data.augmentation.max_size=64"]
    length = ["trainer.steps=250", "trainer.eval_every=250", "data.batch_size=4", "trainer.precision=fp32"]
    parts, run = started_run(tmp_path / "run", f"model={name}", "data=coco", *files, *sizes, *length)
    with Log(run.folder, main=True) as log:
        numbers = parts.trainer.fit(run, log, on=parts.device, resume=False)
    assert numbers["test/AP"] >= 0.9, numbers


TINY = [
    *("trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=1", "trainer.log=[]", "trainer.precision=fp32"),
    *("data.train_count=20", "data.val_count=3", "data.test_count=3", "data.batch_size=4", "schedule.warmup=1"),
    "model.detections.threshold=0.01",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_run_is_evaluated_resumed_exactly_and_predicts(name: str, inside: Any, tmp_path: Path) -> None:
    data = [f"data.root={tmp_path / 'shapes'}"]
    output = inside("train", f"model={name}", *TINY, *data, "run_dir=whole")
    assert ("per micro-batch" in output) == (name != "retinanet")
    inside("train", f"model={name}", *TINY, *data, "run_dir=parts")
    for folder in ("whole", "parts"):
        assert Path(folder, "metrics.jsonl").exists()
    assert Path("whole/metrics.jsonl").read_bytes() == Path("parts/metrics.jsonl").read_bytes()
    halfway, last, best = (Path("parts/checkpoints", f"{f}.pt") for f in ("step_00000002", "step_00000004", "best"))
    last.unlink()
    Path("parts/results.json").unlink()
    best.write_bytes(halfway.read_bytes())
    assert "resuming at 2" in inside("train", f"model={name}", *TINY, *data, "run_dir=parts", "resume=auto")
    assert Path("whole/metrics.jsonl").read_bytes() == Path("parts/metrics.jsonl").read_bytes() and last.exists()
    checkpoint = "checkpoint=whole/checkpoints/best.pt"
    assert "AP50" in inside("evaluate", checkpoint, *data)
    Image.new("RGB", (100, 40)).save("photo.png")
    assert "photo.png: " in inside("predict", checkpoint, "input=photo.png", "task.predict.threshold=0")
    objects = json.loads(Path("predictions/photo.png.boxes.json").read_text())["objects"]
    assert all(0 <= object["box"][2] <= 100 for object in objects)
    inside("train", f"model={name}", *TINY, *data, "run_dir=tuned", checkpoint, "trainer.steps=1")
