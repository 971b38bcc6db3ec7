"""The task of lanes: any cut of a step is the same step, answers, predictions, and the doors from drawing to files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.data.images import normalise
from common.errors import UserError
from common.machine.seeds import generator
from common.report.records import Records
from common.train import optim
from common.train.state import _per_micro_batch
from common.train.step import Stepper, step_normalisers
from detr.tasks.lane_shapes import LaneShapes
from tests.stepping import OPTIMIZER

FEW = ["data.train_count=8", "data.val_count=2", "data.test_count=4", "data.image_size=32"]
GROUP = "model.backbone.norm=group"


def normalise64(images: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    return normalise(images, sizes, torch.float64)


def parts(root: Path, *overrides: str) -> tuple[LaneShapes, nn.Module]:
    config = configure("train", ["model=lanes", f"data.root={root}", *FEW, *overrides])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    return task, build(config["model"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lanes")


def samples(task: LaneShapes) -> list[dict[str, Any]]:
    """Eight images, one of which has no lanes, and one lanes with fewer points."""
    made = [task.data.sample("train", i, generator("sample", i)) for i in range(8)]
    made[2] |= {"points": made[2]["points"][:0], "valid": made[2]["valid"][:0]}
    made[5]["valid"][0, ::2] = False
    return made


def batches(task: LaneShapes, counts: list[int]) -> list[dict[str, Any]]:
    iterator = iter(samples(task))
    return [task.data.collate([next(iterator) for _ in range(count)]) for count in counts]


def stepper(root: Path, dtype: torch.dtype, *overrides: str, training: bool = True) -> Stepper:
    task, model = parts(root, *overrides)
    model = model.to(dtype).train(training)
    return Stepper(task, model, optim.build(model, OPTIMIZER), torch.device("cpu"), "fp32", 0.1)


def updated(root: Path, counts: list[int], *overrides: str, training: bool = True) -> Tensor:
    """All fp64 parameters after one clipped AdamW step."""
    step = stepper(root, torch.float64, *overrides, training=training)
    step(batches(step.task, counts), 0)
    return torch.cat([p.detach().flatten() for p in step.parameters])


@pytest.mark.parametrize(("overrides", "training"), [([GROUP], True), ([], False)], ids=["group", "batch, evaluation"])
def test_a_step_does_not_depend_on_its_split(root, monkeypatch, overrides, training):
    monkeypatch.setattr("detr.tasks.lane_shapes.normalise", normalise64)
    whole = updated(root, [8], *overrides, training=training)
    for counts in ([3, 1, 4], [1] * 8):
        assert (updated(root, counts, *overrides, training=training) - whole).abs().max() <= 1e-10
    before = torch.cat([p.flatten() for p in stepper(root, torch.float64, *overrides).parameters])
    assert (whole - before).abs().max() > 1e-4, "the step must change the parameters"


def test_with_batch_norm_a_step_depends_on_its_split_and_the_summary_says_so(root, monkeypatch):
    monkeypatch.setattr("detr.tasks.lane_shapes.normalise", normalise64)
    assert (updated(root, [3, 1, 4]) - updated(root, [8])).abs().max() > 1e-6
    for overrides, lines in (([], 1), ([GROUP], 0)):
        step = stepper(root, torch.float32, *overrides)
        summary = _per_micro_batch(step)  # type: ignore[arg-type]
        assert len(summary) == lines and all("per micro-batch: BatchNorm (" in line for line in summary)


def test_parts_of_the_loss_are_named_and_add_up(root):
    task, model = parts(root)
    (batch,) = batches(task, [8])
    total, of = task.loss(model, batch, step_normalisers(task, [batch]))
    assert {*of} == {"class", "curve", "upper", "lower", "auxiliary"}
    assert total.item() == pytest.approx(sum(of.values()).item())


class Drawn(nn.Module):
    """A model that answers the curve x = 0.5 from y = 0.25 to 0.75, one that leaves the image, and no lane."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor, sizes: Tensor | None) -> list[dict[str, Tensor]]:
        logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [-3.0, 0.0]]).repeat(len(images), 1, 1)
        curves = torch.tensor(
            [[0.25, 0.75, 0, -1, 0, 0.5, 0, 0], [0.0, 1.0, 0, -1, 0, 0, 2, 0.5], [0.0, 1.0, 0, -1, 0, 0.3, 0, 0]]
        )
        return [{"logits": logits, "curves": curves.repeat(len(images), 1, 1)}]


def test_answers_have_lanes_at_the_rows_of_each_image(root):
    task, _ = parts(root)
    (answer, _) = task.answers(Drawn(), task.data.collate([task.data.sample("test", i, None) for i in (0, 1)]))
    rows = answer["rows"].numpy()
    expected = np.where((rows >= 8) & (rows <= 24), 16.0, -2.0)
    assert np.allclose(answer["lanes"][0], expected) and answer["scores"].tolist() == pytest.approx(
        [0.8808, 0.7311, 0.0474], abs=1e-4
    )
    x = 2 * rows - 16
    assert np.allclose(answer["lanes"][1], np.where((x >= 0) & (x <= 32), x, -2)) and answer["run_time"] > 0


@pytest.mark.parametrize(("shift", "rows"), [(0.4, 17), (-0.4, 17), (0.6, 15), (-0.6, 18)])
def test_a_predicted_end_means_the_row_nearest_to_it(root, shift, rows):
    """Rows of these images are a 32nd of the height apart; the lane shrinks by `shift` rows at both ends.

    Its upper end is in the first row, so there it cannot grow.
    """
    task, _ = parts(root)

    class Shifted(Drawn):
        def forward(self, images: Tensor, sizes: Tensor | None) -> list[dict[str, Tensor]]:
            (outputs,) = super().forward(images, sizes)
            outputs["curves"][:, 0, :2] += torch.tensor([shift, -shift]) / 32
            return [outputs]

    (answer,) = task.answers(Shifted(), task.data.collate([task.data.sample("test", 0, None)]))
    assert int((answer["lanes"][0] >= 0).sum()) == rows


def test_predictions_are_records_in_pixels_of_the_users_image(root):
    task, _ = parts(root)
    image = Image.new("RGB", (200, 144))
    records = task.predict(Drawn(), image)
    assert isinstance(records, Records) and [{*record} for record in records] == [{"points", "parameters", "score"}] * 2
    assert records[0]["points"][0] == pytest.approx([100, 36]) and records[0]["points"][-1] == pytest.approx([100, 108])
    assert records[0]["parameters"] == pytest.approx([0.25, 0.75, 0, -1, 0, 0.5, 0, 0])
    assert records._repr_png_() and len(task.predict(Drawn(), [image, image])) == 2


def test_a_folder_with_a_video_is_answered_and_answers_are_not_read_again(root, tmp_path):
    from tests.video_files import write_video

    task, _ = parts(root)
    write_video(tmp_path / "a.mp4", [0, 40])
    Image.new("RGB", (64, 48)).save(tmp_path / "z.png")
    for _ in range(2):
        lines = []
        for batch in task.read(str(tmp_path)):
            lines += task.show(batch, task.answers(Drawn(), batch), tmp_path / "answers")
        names = ["a.mp4 frame 0 at 0.000 s", "a.mp4 frame 1 at 0.040 s", "z.png"]
        assert lines == [f"{name}: 2 lanes (score >= 0.5)" for name in names] and not task.unanswered
    answers = [json.loads(line) for line in (tmp_path / "answers/a.mp4.lanes.jsonl").read_text().splitlines()]
    assert [answer["time"] for answer in answers] == [0.0, 0.04] and len(answers[0]["lanes"]) == 2
    assert answers[0]["lanes"][0]["points"][0] == [32.0, 12.0] and (tmp_path / "answers/a.mp4.lanes.mp4").exists()


def test_pictures_for_the_log_show_lanes_in_the_resized_image(root):
    task, _ = parts(root)
    batch = task.data.collate([task.data.sample("test", i, None) for i in (0, 1)])
    pictures = task.pictures(batch, task.answers(Drawn(), batch), 1)
    assert pictures.shape[:2] == (1, 3) and pictures.shape[2] % 32 == 0
    factor = pictures.shape[2] // 32
    assert pictures[0, :, 16 * factor, 16 * factor].tolist() != (batch["images"][0, :, 16, 16]).tolist()


def test_no_lane_in_any_image_gives_an_alarm(root):
    task, _ = parts(root)
    batch = task.data.collate([task.data.sample("val", 0, None)])
    answers = task.answers(Drawn(), batch)
    assert task.alarms(answers) == []
    answers[0]["scores"] = torch.tensor([0.1, 0.2, 0.5])
    (alarm,) = task.alarms(answers)
    assert alarm.startswith("the model finds no lane")


def test_lanes_and_boxes_do_not_go_together(root, tmp_path):
    with pytest.raises(UserError, match=r"data._target_=Shapes has no lanes"):
        run = configure("train", ["model=lanes", "data=shapes"])
        build(run["task"], data=build(run["data"]))
    run = configure("train", ["model=detr", "data=lanes"])
    with pytest.raises(UserError, match=r"data._target_=Lanes has no boxes with classes"):
        build(run["task"], data=build(run["data"])).model_arguments()
    task, model = parts(root)
    (batch,) = batches(task, [8])
    with pytest.raises(UserError, match=r"task.queries=3, but the model has 7 queries"):
        parts(root, "task.queries=3")[0].loss(model, batch, task.normalisers(batch))


def test_a_model_without_curves_and_a_foreign_file_are_refused(root):
    task, _ = parts(root)
    (batch, *_) = batches(task, [2])

    class Boxes(Drawn):
        def forward(self, images, sizes):
            return [{"logits": torch.zeros(2, 7, 2), "boxes_cxcywh": torch.zeros(2, 7, 4)}]

    with pytest.raises(UserError, match=r"model._target_=Boxes returns no curves \(logits, boxes_cxcywh\)"):
        task.loss(Boxes(), batch, task.normalisers(batch))
    with pytest.raises(UserError, match="no checkpoint of this program"):
        task.adopt({})


def test_the_mean_road_is_part_of_a_checkpoint(root):
    task, _ = parts(root)
    state = task.state()
    assert len(state["mean_road"]) >= 2 and all(len(lane) == 4 for lane in state["mean_road"])
    other, _ = parts(root, "data.train_count=9")
    other.restore(state)
    assert other.state() == state and not other.data.folder.exists()
    other.restore({})
    assert other.road == []


@pytest.mark.slow
def test_the_model_fits_a_handful_of_images(root):
    step = stepper(root, torch.float32, "data.image_size=64")
    step.clip_norm = None
    micro_batches = batches(step.task, [8])
    losses = [float(step(micro_batches, number)["loss"]) for number in range(400)]
    assert losses[-1] < 0.25 * losses[0]


def test_the_doors_train_evaluate_and_predict(inside, tmp_path):
    short = [
        "trainer.steps=4",
        "trainer.eval_every=2",
        "trainer.log_every=1",
        "schedule.warmup=1",
        "trainer.device=cpu",
    ]
    printed = inside("train", "model=lanes", "data.root=roads", *FEW, "data.batch_size=4", *short, "run_dir=run")
    assert "per micro-batch: BatchNorm" in (tmp_path / "run/train.log").read_text() + printed
    results = json.loads((tmp_path / "run/results.json").read_text())
    checkpoint = "checkpoint=run/checkpoints/best.pt"
    printed = inside("evaluate", checkpoint, "output=numbers", "details=true", "trainer.device=cpu")
    numbers = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    assert numbers == {key: value for key, value in results.items() if key.startswith("test/")}
    assert {*numbers} == {
        f"test/{name}" for name in ("accuracy", "FP", "FN", "straight_accuracy", "mean_road_accuracy")
    }
    lines = [json.loads(line) for line in (tmp_path / "numbers/lanes.json").read_text().splitlines()]
    assert [line["raw_file"] for line in lines] == [f"test/00000{i}.png" for i in (1, 2, 3, 4)]
    folder = next((tmp_path / "roads").iterdir())
    image = folder / "test/000001.png"
    printed = inside("predict", checkpoint, f"input={image}", "threshold=0.0", "output=out", "trainer.device=cpu")
    assert printed.startswith("000001.png: ") and "(score >= 0)" in printed
    content = json.loads((tmp_path / "out/000001.png.lanes.json").read_text())
    assert content["file"] == str(image) and all(
        {*lane} == {"points", "parameters", "score"} for lane in content["lanes"]
    )
    assert (tmp_path / "out/000001.png.lanes.jpg").stat().st_size > 0
