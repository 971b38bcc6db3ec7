"""Pre-training by masked patches: masks, loss, metric, pictures, and the classifier that starts from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from common.config.check import build, construct
from common.config.compose import configure
from common.data.batching import Loader
from common.errors import UserError
from common.files import checkpoint
from common.task import Batch
from common.train import assembly, optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from vit.criterion.masked_pixels import MaskOptions, patch_images, patch_pixels, sample_visible
from vit.evaluation.reconstruction import ReconstructionMetric, draw_reconstruction

Door = Callable[..., str]
CPU = torch.device("cpu")
SIZES = ["width=16", "layers=1", "heads=2", "feedforward=24"]
ENCODER = [f"model.{size}" for size in SIZES]
SMALL = ["model=mae", *ENCODER, "model.decoder.width=8", "model.decoder.layers=1", "data.batch_size=8"]
SMALL += ["trainer.device=cpu", "trainer.precision=fp32"]


def built(*keys: str) -> tuple[Any, Any]:
    """The task of a command line, and its model."""
    config = configure("train", [*SMALL, *keys])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    return task, build(config["model"], **task.model_arguments())


def batches(task: Any, lengths: list[int], epoch: int = 0) -> list[Batch]:
    indices = iter([5, 0, 11, 7, 2, 9, 14, 3])
    keys = [(epoch, tuple(next(indices) for _ in range(length))) for length in lengths]
    return [*Loader(task.data, "train", seed=1, workers=0, pin=False)(keys)]


def evaluation_batch(task: Any, indices: list[int]) -> Batch:
    return task.data.collate([task.data.sample("test", i, None) for i in indices])


# Masks.


def test_a_mask_depends_on_the_seed_and_the_view_alone() -> None:
    options = MaskOptions(share=0.75, normalise=False)
    whole = sample_visible(options, [3, 8, 5], 6, 49)
    assert whole.shape == (6, 12), "12 = int(49 * 0.25)"
    assert all(len({*row}) == 12 and 0 <= min(row) and max(row) < 49 for row in whole.tolist())
    for i, seed in enumerate([3, 8, 5]):
        assert torch.equal(sample_visible(options, [seed], 2, 49), whole[2 * i : 2 * i + 2])
    assert len({tuple(row) for row in whole.tolist()}) == 6


def test_every_patch_is_masked_equally_often() -> None:
    """Of 4,000 masks, each patch of 16 is visible in a quarter, within five standard deviations of 27."""
    counts = sample_visible(MaskOptions(share=0.75, normalise=False), [*range(4000)], 4000, 16).flatten().bincount()
    assert len(counts) == 16 and (counts - 1000).abs().max() < 5 * 27.4


@pytest.mark.parametrize("share", [0.0, 0.01, 0.95, 1.0])
def test_a_share_that_masks_nothing_or_everything_is_refused(share: float) -> None:
    task, model = built(f"task.mask.share={share}")
    if share == 0.01:  # 15 of 16 patches stay visible
        task.answers(model, evaluation_batch(task, [0]))
        return
    with pytest.raises(UserError, match=rf"task\.mask\.share={share} leaves (0|16) of 16 patches visible"):
        task.answers(model, evaluation_batch(task, [0]))


def test_masks_differ_between_epochs() -> None:
    task, _ = built("data.augmentation.crop=none", "data.augmentation.policy=none")
    first, second = (batches(task, [8], epoch)[0]["seeds"] for epoch in (0, 1))
    assert len({*first, *second}) == 16


# The loss.


@pytest.mark.parametrize("normalise", [False, True])
def test_the_loss_is_the_mean_over_masked_patches_of_their_pixels_error(normalise: bool) -> None:
    task, model = built(f"task.mask.normalise={normalise}", "data.augmentation.repeats=2", "model.patch_size=4")
    [batch] = batches(task, [3])
    images = task.data.inputs(batch, CPU)
    kept = sample_visible(task.mask, batch["seeds"], 6, 4)
    predicted = model(images, kept)
    errors = []
    for image, visible, pixels in zip(images, kept.tolist(), predicted, strict=True):
        for patch in {0, 1, 2, 3} - {*visible}:
            row, column = divmod(patch, 2)
            target = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            if normalise:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((pixels[patch] - target).square().mean())
    loss, parts = task.loss(model, batch, task.normalisers(batch))
    torch.testing.assert_close(loss, torch.stack(errors).mean(), rtol=1e-5, atol=0)
    assert len(errors) == 6 * 3 and parts == {} and loss.item() > 0.1


def test_patches_are_put_together_again() -> None:
    images = torch.randn(2, 3, 8, 12)
    pixels = patch_pixels(images, 4)
    assert pixels.shape == (2, 6, 48)
    assert torch.equal(pixels[1, 4].view(4, 4, 3), images[1, :, 4:, 4:8].permute(1, 2, 0)), "row, column, channel"
    assert torch.equal(patch_images(pixels, 4, (2, 3)), images)


def test_a_step_does_not_depend_on_how_it_is_cut() -> None:
    def parameters_after(lengths: list[int]) -> Tensor:
        task, model = built("data.augmentation.repeats=2")
        model.double().register_forward_pre_hook(lambda _, inputs: (inputs[0].double(), inputs[1]))
        options = construct(OptimizerOptions, configure("train", SMALL)["optimizer"])
        Stepper(task, model, optim.build(model, options), CPU, "fp32", 0.1)(batches(task, lengths), 0)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = parameters_after([8])
    for lengths in ([3, 1, 4], [1] * 8):
        assert (parameters_after(lengths) - whole).abs().max() < 1e-10


def test_digits_are_learnt() -> None:
    """In 60 steps on eight images, the error falls below half of that of the mean, which is about one."""
    task, model = built("data.augmentation.crop=none", "data.augmentation.policy=none", "optimizer.lr=5e-3")
    options = construct(OptimizerOptions, configure("train", [*SMALL, "optimizer.lr=5e-3"])["optimizer"])
    stepper = Stepper(task, model, optim.build(model, options), CPU, "fp32", 1.0)
    losses = [float(stepper(batches(task, [8], step), step)["loss"]) for step in range(60)]
    assert losses[0] > 0.8 and sum(losses[-5:]) / 5 < 0.6 * losses[0]


# Answers and metric.


def test_an_answer_does_not_depend_on_its_batch_and_is_the_same_in_every_evaluation() -> None:
    task, model = built()
    model.eval()
    whole = task.answers(model, evaluation_batch(task, [4, 7, 9]))
    [alone] = task.answers(model, evaluation_batch(task, [7]))
    assert whole[1]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert torch.equal(whole[1]["masked"], alone["masked"]) and alone["masked"].sum() == 12
    assert not torch.equal(whole[0]["masked"], whole[1]["masked"])
    other, _ = built("task.predict.seed=1")
    [answer] = other.answers(model, evaluation_batch(other, [7]))
    assert not torch.equal(answer["masked"], alone["masked"])


def test_patches_of_one_value_cannot_be_normalised() -> None:
    task, model = built("task.mask.normalise=true", "model.patch_size=1")
    [batch] = batches(task, [3])
    with pytest.raises(
        UserError, match=r"^task\.mask\.normalise=true: the variance of a patch of one value .*=false\.$"
    ):
        task.loss(model, batch, task.normalisers(batch))


@pytest.mark.parametrize("normalise", [False, True])
def test_a_reconstruction_has_the_images_visible_pixels_and_a_perfect_one_all(normalise: bool) -> None:
    task, model = built(f"task.mask.normalise={normalise}", "model.patch_size=4", "data.image_size=12")
    batch = evaluation_batch(task, [0, 1])
    images = task.data.thumbnails(batch, 2)
    for answer, image in zip(task.answers(model.eval(), batch), images, strict=True):
        visible = ~answer["masked"].repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert answer["reconstruction"].shape == image.shape == (3, 12, 12)
        difference = answer["reconstruction"].int() - image.int()
        assert not difference[:, visible].any() and difference[:, ~visible].abs().max() > 1

    class Perfect(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = model.patches

        def forward(self, pixels: Tensor, visible: Tensor) -> Tensor:
            target = patch_pixels(pixels, 4)
            if normalise:
                target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
            return target

    for answer, image in zip(task.answers(Perfect(), batch), images, strict=True):
        assert answer["loss"] < 1e-10 and torch.equal(answer["reconstruction"], image)


def test_the_metric_is_the_mean_over_the_images(tmp_path: Path) -> None:
    metric = ReconstructionMetric(3)
    metric.update({"ids": [2, 0]}, [{"loss": 0.5}, {"loss": 1.0}])
    metric.update({"ids": [1]}, [{"loss": 3.0}])
    metric.gather()
    assert metric.compute() == {"loss": 1.5}
    assert metric.details() == [("image", "loss"), (1, 3.0), (0, 1.0), (2, 0.5)]
    metric.write(tmp_path)
    assert (tmp_path / "losses.csv").read_text().split() == ["id,loss", "0,1", "1,3", "2,0.5"]


def test_the_picture_shows_masked_patches_in_grey() -> None:
    image, other = (torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (200, 90))
    masked = torch.tensor([[True, False], [False, False]])
    picture = draw_reconstruction(image, other, masked)
    side = picture.shape[-2]
    assert picture[0, 0, 0] == 128 and picture[0, -1, 0] == 200 and picture[0, 0, side + 8] == 90
    assert picture[0, 0, -1] == 200 and picture.shape[-1] == 3 * side + 16


# Runs.


def test_a_run_is_evaluated_predicts_pictures_and_starts_a_classifier(inside: Door, tmp_path: Path) -> None:
    line = [*SMALL, "trainer.steps=4", "trainer.eval_every=2", "trainer.log_every=1"]
    inside("train", *line, f"run_dir={tmp_path / 'run'}")
    file = f"checkpoint={tmp_path / 'run/checkpoints/best.pt'}"
    numbers = json.loads(next(text for text in inside("evaluate", file).splitlines() if text.startswith("{")))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert numbers == {"test/loss": results["test/loss"]} and results["direction"] == "minimize"
    assert len((tmp_path / "run/predictions/losses.csv").read_text().splitlines()) == 401

    Image.new("L", (20, 20), 90).save(tmp_path / "photo.png")
    output = inside("predict", file, f"input={tmp_path / 'photo.png'}", f"output={tmp_path / 'out'}")
    assert output.startswith("photo.png: loss ") and output.endswith(" on 12 of 16 patches\n")
    assert json.loads((tmp_path / "out/photo.png.reconstruction.json").read_text())["masked"] == 12
    with Image.open(tmp_path / "out/photo.png.reconstruction.png") as picture:
        assert picture.size == (3 * 400 + 16, 400)

    classifier = ["model=vit", *ENCODER, "trainer.device=cpu", "trainer.precision=fp32", file]
    parts = assembly.assemble(configure("train", classifier))
    assert "; re-initialised: head.weight, head.bias; unused: " in parts.weights_line
    content = checkpoint.load(tmp_path / "run/checkpoints/best.pt")
    weights = content["average"]["weights"]
    for name, tensor in parts.model.state_dict().items():
        assert name.startswith("head") or torch.equal(tensor, weights[name]), name
    assert parts.model.positions.grid.requires_grad, "the classifier trains them"


def test_a_probe_trains_the_head_alone(inside: Door, tmp_path: Path) -> None:
    inside("train", *SMALL, "trainer.steps=1", f"run_dir={tmp_path / 'run'}")
    file = tmp_path / "run/checkpoints/best.pt"
    frozen = ["+optimizer.rates={encoder:0,patches:0,positions:0,class_token:0}"]
    line = ["model=vit", *ENCODER, "trainer.device=cpu", "trainer.precision=fp32", "trainer.steps=2", *frozen]
    inside("train", *line, f"checkpoint={file}", f"run_dir={tmp_path / 'probe'}")
    before = checkpoint.load(file)["average"]["weights"]
    after = checkpoint.load(tmp_path / "probe/checkpoints/best.pt")["model"]
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) if not name.startswith("head") else tensor.any(), name


def test_a_mask_needs_seeds() -> None:
    task, model = built()
    [batch] = batches(task, [2])
    del batch["seeds"]
    with pytest.raises(UserError, match="Masking needs a seed for each sample"):
        task.loss(model, batch, {"images": 2.0})
