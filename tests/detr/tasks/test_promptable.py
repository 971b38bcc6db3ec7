"""The task of promptable masks: steps, their splits, evaluation, and runs through the doors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor, nn

import predict
from common.cli import main as cli
from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.errors import UserError
from common.train import optim
from common.train.assembly import load, stored_config
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from detr.data.nested_shapes import draw

SMALL = ("model.width=16", "model.decoder.heads=2", "model.decoder.feedforward=24", "model.decoder.iou_hidden=16")


def made(*overrides: str) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    config = configure("train", ["model=promptable", *SMALL, *overrides])
    task = build(config["task"], data=build(config["data"]))
    return task, build_model(config["model"], task)


def samples(count: int = 8) -> list[dict[str, Any]]:
    """Pictures of unequal sizes with figures; the third has no object, the fifth an object without a pixel."""
    made_samples = []
    for i in range(count):
        pixels, masks, _ = draw(np.random.default_rng(i), 64, plain=False)
        height, width = 64 - 5 * (i % 4), 64 - 7 * (i % 3)
        stacked = torch.from_numpy(np.stack(masks))[:, :height, :width]
        stacked = stacked[:0] if i == 2 else stacked[stacked.flatten(1).any(1)]
        if i == 4:
            stacked = torch.cat((stacked, torch.zeros_like(stacked[:1])))
        made_samples.append(
            {
                "id": i,
                "file": str(i),
                "image": torch.from_numpy(pixels).permute(2, 0, 1)[:, :height, :width],
                "original_size": (height, width),
                "boxes": torch.zeros(len(stacked), 4),
                "labels": torch.zeros(len(stacked), dtype=torch.int64),
                "masks": stacked,
            }
        )
    return made_samples


def batches(counts: list[int], task: Any) -> list[dict[str, Any]]:
    """Micro-batches of these numbers of images, in order; the seed of a sample is a function of its id."""
    iterator, made_batches = iter(samples(sum(counts))), []
    for count in counts:
        batch = task.data.collate([next(iterator) for _ in range(count)])
        made_batches.append(batch | {"seeds": [1000 + i for i in batch["ids"]]})
    return made_batches


def gradient(split: list[int], *overrides: str) -> Tensor:
    task, model = made(*overrides)
    options = construct(OptimizerOptions, configure("train", ["model=promptable"])["optimizer"])
    stepper = Stepper(task, model, optim.build(model, options), torch.device("cpu"), "fp32", None)
    stepper(batches(split, task), 0)
    return torch.cat([p.grad.flatten() for p in stepper.parameters if p.grad is not None])


@pytest.mark.parametrize("split", [[3, 1, 4], [1] * 8])
def test_a_step_with_one_round_does_not_depend_on_the_split(split: list[int]) -> None:
    whole, in_parts = (gradient(s, "task.prompting.rounds=1") for s in ([8], split))
    assert (whole - in_parts).norm() <= 1e-5 * whole.norm(), "fp32 sums in another order"


def test_clicks_after_the_first_are_named_as_depending_on_the_split() -> None:
    assert made()[0].per_micro_batch == ("clicks after the first",)
    assert made("task.prompting.rounds=1")[0].per_micro_batch == ()


def test_normalisers_count_the_prompts_of_objects_with_a_pixel() -> None:
    task, _ = made("task.prompting.objects=100")
    (batch,) = batches([8], task)
    assert task.normalisers(batch) == {"prompts": 2.0 * (len(batch["masks"]) - 1)}
    few, _ = made("task.prompting.objects=2")
    assert few.normalisers(batch)["prompts"] <= 2 * 2 * 7


def test_the_total_is_the_sum_of_the_parts_and_every_parameter_is_trained() -> None:
    task, model = made("task.prompting.boxes=0.5")
    (batch,) = batches([8], task)
    loss, parts = task.loss(model, batch, task.normalisers(batch))
    assert {*parts} == {"focal", "dice", "iou"}
    assert float(loss.detach()) == pytest.approx(sum(map(float, parts.values())), rel=1e-5)
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_loss_is_in_fp32_under_autocast() -> None:
    task, model = made("task.prompting.rounds=1")
    (batch,) = batches([8], task)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = task.loss(model, batch, task.normalisers(batch))
    assert loss.dtype == torch.float32 and {part.dtype for part in parts.values()} == {torch.float32}
    exact = task.loss(model, batch, task.normalisers(batch))[0]
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)  # bf16 has 8 bits


def test_a_micro_batch_without_objects_gives_a_loss_of_zero_with_a_gradient() -> None:
    task, model = made()
    batch = task.data.collate([samples()[2]]) | {"seeds": [5]}
    assert task.normalisers(batch) == {"prompts": 0.0}
    loss, _ = task.loss(model, batch, {"prompts": 1.0})
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.width=36", "model.decoder.heads=2"), r"model.width=36 must be divisible by 8 and by twice .*heads=2"),
        (("model.decoder.heads=3",), r"model.width=16 must be divisible by 8 and by twice model.decoder.heads=3"),
        (("model.mask_channels=6",), r"model.mask_channels=6 must be divisible by 4"),
    ],
)
def test_widths_that_do_not_fit_are_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(*overrides)


def test_data_without_masks_are_refused() -> None:
    with pytest.raises(UserError, match=r"Lanes has no masks, which promptable models need; give data with masks"):
        made("data=lanes")


def test_a_folder_without_a_prompt_is_refused_once(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    task, _ = made()
    with pytest.raises(UserError, match=r"give points=x,y or boxes=x,y,x,y"):
        task.read(str(tmp_path))
    assert task.unanswered == []


@pytest.mark.slow
def test_a_compiled_model_runs_compiled_code_in_a_step() -> None:
    task, model = made("task.prompting.rounds=1")
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend)
    (batch,) = batches([4], task)
    loss, _ = task.loss(model, batch, task.normalisers(batch))
    plain, _ = task.loss(made("task.prompting.rounds=1")[1], batch, task.normalisers(batch))
    torch.testing.assert_close(loss, plain)
    assert len(graphs) >= 2, "the image encoder and the mask decoder"


def test_a_batch_without_seeds_is_refused() -> None:
    task, model = made()
    batch = task.data.collate(samples(2))
    with pytest.raises(UserError, match="need a seed"):
        task.loss(model, batch, {"prompts": 1.0})


def test_evaluation_gives_the_same_answer_to_an_image_in_any_batch() -> None:
    task, model = made()
    model.eval()
    (whole,) = batches([8], task)
    together = task.answers(model, whole)
    for i, batch in enumerate(batches([1] * 8, task)):
        (alone,) = task.answers(model, batch)
        for key in ("ious", "predicted", "oracle"):
            # A mask's logit that rounds to the other side of 0 changes an IoU by about one pixel of some hundred.
            torch.testing.assert_close(together[i][key], alone[key], rtol=0, atol=0.02)
    assert [len(answer["ious"]) for answer in together][2] == 0, "the image without an object"


def test_masks_that_miss_everything_cause_an_alarm() -> None:
    task, _ = made()
    bad, good = {"ious": torch.zeros(3, 3)}, {"ious": torch.full((1, 3), 0.5)}
    assert "no mask overlaps" in task.alarms([bad])[0] and task.alarms([bad, good]) == [] and task.alarms([]) == []


@pytest.mark.slow
def test_a_few_pictures_are_learnt_by_heart() -> None:
    """Of eight pictures; the control is the model before the first step.

    The learning rate falls to 0 in the second half: at its peak, the IoU varies by 0.05 from one step to the next.
    """
    task, model = made("model.width=32", "task.prompting.boxes=0.0")
    options = construct(OptimizerOptions, {**configure("train", ["model=promptable"])["optimizer"], "lr": 3e-3})
    stepper = Stepper(task, model, optim.build(model, options), torch.device("cpu"), "fp32", 1.0)
    (batch,) = batches([8], task)

    def mean_iou() -> float:
        answers = task.answers(model, batch)
        return float(torch.cat([answer["ious"][:, 2] for answer in answers]).mean())

    before = mean_iou()
    for step in range(350):
        for group in stepper.optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, 2 - 2 * step / 350)
        stepper([batch | {"seeds": [step * 100 + i for i in batch["ids"]]}], step)
    assert before < 0.4 and mean_iou() > 0.7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, which evaluates val and test."""
    import train

    folder = tmp_path_factory.mktemp("promptable")
    sizes = ["train_count=8", "val_count=2", "test_count=3", "batch_size=4"]
    arguments = ["model=promptable", *SMALL, f"run_dir={folder}/run", f"data.root={folder}/data", "trainer.device=cpu"]
    arguments += ["trainer.steps=2", *(f"data.{size}" for size in sizes)]
    with pytest.raises(SystemExit) as stopped:
        cli.launch(train.train, "train", arguments=arguments)
    assert stopped.value.code == 0
    return folder / "run"


def test_a_run_logs_its_metrics_and_names_what_depends_on_the_micro_batch(checkpoint: Path) -> None:
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    keys = set().union(*lines)
    assert {"val/mIoU_1", "val/mIoU_3", "val/oracle_1", "test/iou_error_1", "train/focal"} <= keys
    assert "per micro-batch: clicks after the first" in (checkpoint / "train.log").read_text()


def photo(folder: Path, width: int = 90, height: int = 60) -> Path:
    pixels, _, _ = draw(np.random.default_rng(5), 64, plain=False)
    Image.fromarray(pixels).resize((width, height)).save(folder / "photo.png")
    return folder / "photo.png"


def predicted(checkpoint: Path, folder: Path, *arguments: str) -> int:
    command = [f"checkpoint={checkpoint}", f"output={folder}/answers", "trainer.device=cpu", *arguments]
    with pytest.raises(SystemExit) as stopped:
        cli.launch(predict.predict, "predict", stored_config, command)
    return int(stopped.value.code or 0)


def test_predict_writes_masks_in_the_pixels_of_the_photo(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = photo(tmp_path)
    assert predicted(checkpoint, tmp_path, f"input={file}", "points=30,20") == 0
    assert capsys.readouterr().out.startswith("photo.png: 1 object, predicted IoU")
    answer = json.loads((tmp_path / "answers/photo.png.prompted.json").read_text())
    (item,) = answer["objects"]
    assert item["prompt"] == {"points": [[30, 20]]} and len(item["masks"]) == 3
    scores = [mask["score"] for mask in item["masks"]]
    assert scores == sorted(scores, reverse=True)
    for mask in item["masks"]:
        decoded = rle.decode(mask["segmentation"])
        assert decoded.shape == (60, 90) and decoded.sum() == mask["area"]
    numbers = np.asarray(Image.open(tmp_path / "answers/photo.png.prompted.png"))
    assert np.array_equal(numbers, rle.decode(item["masks"][0]["segmentation"]))
    assert Image.open(tmp_path / "answers/photo.png.prompted.jpg").size[0] >= 400


def test_several_points_give_one_mask_and_several_boxes_one_object_each(checkpoint: Path, tmp_path: Path) -> None:
    file = photo(tmp_path)
    assert predicted(checkpoint, tmp_path, f"input={file}", "points=30,20,35,25", "background=80,50") == 0
    answer = json.loads((tmp_path / "answers/photo.png.prompted.json").read_text())
    assert [len(item["masks"]) for item in answer["objects"]] == [1]
    assert predicted(checkpoint, tmp_path, f"input={file}", "boxes=5,5,40,40,50,10,90,60") == 0
    answer = json.loads((tmp_path / "answers/photo.png.prompted.json").read_text())
    assert [item["prompt"]["box"] for item in answer["objects"]] == [[5, 5, 40, 40], [50, 10, 90, 60]]


def test_a_prompt_outside_the_photo_is_refused_and_in_a_folder_skipped(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = photo(tmp_path)
    assert predicted(checkpoint, tmp_path, f"input={file}", "points=95,20") == 2
    assert "points=95,20 is outside of photo.png, which has 90 x 60 pixels" in capsys.readouterr().err
    (tmp_path / "images").mkdir()
    photo(tmp_path / "images")
    Image.new("RGB", (120, 80)).save(tmp_path / "images/wide.png")
    assert predicted(checkpoint, tmp_path, f"input={tmp_path}/images", "points=95,20") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("wide.png") and "outside of photo.png" in captured.err


def test_predict_without_a_prompt_says_which_to_give(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predicted(checkpoint, tmp_path, f"input={photo(tmp_path)}") == 2
    assert "give points=x,y or boxes=x,y,x,y" in capsys.readouterr().err


def test_written_pictures_are_not_read_again(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(tmp_path)
    for _ in range(2):
        assert predicted(checkpoint, tmp_path, f"input={tmp_path}", "points=30,20") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_notebook_gets_the_same_masks_as_records(checkpoint: Path, tmp_path: Path) -> None:
    file = photo(tmp_path)
    model, task = load(checkpoint / "checkpoints/best.pt", "task.predict.points=[30,20]", "trainer.device=cpu")
    (item,) = task.predict(model, file)
    assert predicted(checkpoint, tmp_path, f"input={file}", "points=30,20", "trainer.precision=fp32") == 0
    answer = json.loads((tmp_path / "answers/photo.png.prompted.json").read_text())
    assert item["masks"] == answer["objects"][0]["masks"]
    assert task.predict(model, [file, file])[1][0]["masks"] == item["masks"]
    assert task.predict(model, file)._repr_png_() is not None
