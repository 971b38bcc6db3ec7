"""The task of image GPT: a step for any cut, bits, palettes, completions and samples."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.data.batching import Loader, evaluation
from common.errors import UserError
from common.machine.seeds import generator
from common.train import assembly, evaluator, optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from vit.models.image_gpt import Outputs
from vit.tasks.image_modelling import ImageModelling

SMALL = ["model=igpt", "model.width=16", "model.heads=2", "model.layers=2", "model.feedforward=24", "model.dropout=0.0"]
OBJECTIVES = {
    "autoregressive": [],
    "masked": ["task.loss.objective=masked"],
    "joint": ["task.loss.classification=1.0", "task.loss.smoothing=0.1"],
    "masked joint": ["task.loss.objective=masked", "task.loss.classification=0.5"],
}
CPU = torch.device("cpu")
IMAGES = [5, 0, 11, 7, 2, 9, 14, 3]


def build_task(*changes: str) -> tuple[Any, dict[str, Any]]:
    config = configure("train", [*SMALL, *changes])
    return build(config["task"], data=build(config["data"])), config


def redrawn(config: dict[str, Any], task: Any) -> Any:
    """The model with all tensors sampled: at the start of a run, most gradients are zero."""
    model, rng = build_model(config["model"], task), generator("task")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=rng)
    return model.eval()


def load(task: Any, counts: list[int]) -> list[dict[str, Any]]:
    rest = iter(IMAGES)
    keys = [(0, tuple(next(rest) for _ in range(count))) for count in counts]
    return [*Loader(task.data, "train", seed=3, workers=0, pin=False)(keys)]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_does_not_depend_on_its_cut(objective: str, repeats: int) -> None:
    """Parameters in fp64 after one clipped step."""
    task, config = build_task(*OBJECTIVES[objective], f"data.augmentation.repeats={repeats}")

    def after(counts: list[int]) -> Tensor:
        model = redrawn(config, task).double()
        optimizer = optim.build(model, construct(OptimizerOptions, config["optimizer"]))
        stepper = Stepper(task, model, optimizer, CPU, "fp32", 0.1)
        stepper(load(task, counts), 0)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    whole = after([8])
    for counts in ([3, 1, 4], [1] * 8):
        assert (after(counts) - whole).abs().max() <= 1e-10
    start = torch.cat([p.detach().flatten() for p in redrawn(config, task).double().parameters()])
    assert (whole - start).abs().max() > 1e-4, "the step did something"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_that_of_a_plain_computation(objective: str) -> None:
    task, config = build_task(*OBJECTIVES[objective])
    model, (batch,) = redrawn(config, task).double(), load(task, [8])
    total, parts = task.loss(model, batch, task.normalisers(batch))
    tokens = task.tokens(batch, CPU)
    masked = task.sample_masks(batch, CPU) if task.masks else None
    outputs = model(tokens, masked)
    nats = -outputs.colours.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
    if masked is None:
        expected = nats.mean()
    else:
        expected = torch.stack([row[mask].mean() for row, mask in zip(nats, masked, strict=True)]).mean()
    if task.classifies:
        scores = outputs.classes.log_softmax(-1)
        own = -scores[range(8), batch["labels"]]
        smoothing = task.loss_options.smoothing
        classification = ((1 - smoothing) * own - smoothing * scores.mean(1)).mean()
        assert float(parts["generation"]) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert float(parts["classification"]) == pytest.approx(float(classification.detach()), rel=1e-12)
        expected = expected + task.loss_options.classification * classification
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


def test_every_parameter_gets_a_gradient() -> None:
    for objective, changes in OBJECTIVES.items():
        task, config = build_task(*changes)
        model, (batch,) = redrawn(config, task), load(task, [8])
        task.loss(model, batch, task.normalisers(batch))[0].backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()], objective


def test_the_first_loss_of_digits_is_ln_17() -> None:
    task, config = build_task()
    (batch,) = load(task, [8])
    total, _ = task.loss(build_model(config["model"], task), batch, task.normalisers(batch))
    assert float(total.detach()) == pytest.approx(math.log(17), abs=1e-5)


def test_mixed_images_and_wrong_labels_are_refused() -> None:
    task, _ = build_task("data.augmentation.mixup=0.8")
    with pytest.raises(UserError, match="give 0 for both"):
        task.normalisers(load(task, [4])[0])
    task, _ = build_task("task.loss.classification=1")
    with pytest.raises(UserError, match="its label is -1"):
        task.normalisers({"ids": [0], "labels": torch.tensor([-1])})


# Tokens and palettes.


def test_tokens_are_the_pixels_of_the_data_without_loss() -> None:
    task, _ = build_task()
    (batch,) = load(task, [8])
    images, _ = task.data.load()["train"]
    decoded = task.palette.decode(task.tokens(batch, CPU), (8, 8))
    assert torch.equal(decoded, images[IMAGES])
    assert task.palette.lossless and len(task.palette) == 17


def test_the_palette_is_fitted_although_the_model_is_built_on_another_device() -> None:
    task, config = build_task("task.colours=5")
    with torch.device("meta"):
        assert build_model(config["model"], task).output.out_features == 5
    assert task.palette.colours.device == CPU and not task.palette.lossless


def test_a_new_run_takes_the_palette_of_its_checkpoint() -> None:
    former, _ = build_task("task.colours=5")
    task, _ = build_task()
    task.inherit(former.state())
    assert task.state()["palette"] == former.state()["palette"] and len(task.palette) == 5
    assert task.model_arguments() == {"colours": 5, "classes": 0, "image_size": (8, 8)}


def test_a_palette_of_other_channels_and_a_damaged_one_are_refused() -> None:
    task, _ = build_task()
    task.restore({"palette": [[0.0, 0.0, 0.0]], "lossless": False, "classes": []})
    with pytest.raises(UserError, match="have 1 channels, and the palette of the checkpoint has 3"):
        task.tokens(load(task, [1])[0], CPU)
    for palette in ([], [[0.0], [0.0, 1.0]]):
        with pytest.raises(UserError, match="not a list of colours"):
            task.restore({"palette": palette, "lossless": False, "classes": []})


def test_masks_of_training_follow_the_seeds_and_those_of_evaluation_the_ids() -> None:
    task, _ = build_task("task.loss.objective=masked")
    (batch,), pieces = load(task, [8]), load(task, [3, 5])
    together = task.sample_masks(batch, CPU)
    assert torch.equal(together, torch.cat([task.sample_masks(piece, CPU) for piece in pieces]))
    evaluated = {name: value for name, value in batch.items() if name != "seeds"}
    assert torch.equal(task.sample_masks(evaluated, CPU), task.sample_masks(dict(evaluated), CPU))
    assert not torch.equal(task.sample_masks(evaluated, CPU), together)


def test_views_of_an_image_have_masks_of_their_own() -> None:
    task, _ = build_task("task.loss.objective=masked", "data.augmentation.repeats=2")
    masks = task.sample_masks(load(task, [4])[0], CPU)
    assert masks.shape == (8, 64) and not torch.equal(masks[0], masks[1])


# Evaluation.


class Frequencies(nn.Module):
    """A model that predicts the same frequencies of colours for every pixel, or for every position."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: Tensor) -> Outputs:
        return Outputs(self.logits.expand(*tokens.shape, -1), None)


def test_the_bits_of_frequencies_of_train_are_those_of_a_plain_computation() -> None:
    """About 2.98 bits for the same frequencies everywhere, and 2.41 for those of each position."""
    task, _ = build_task()
    train, test = (task.data.load()[split][0].flatten(1).numpy() for split in ("train", "test"))
    levels = np.unique(train)
    counts = np.stack([(train == level).sum(0) for level in levels], axis=1) + 1e-2  # (64, 17)
    plain = {"pooled": counts.sum(0)[None].repeat(64, 0), "per position": counts}
    for table in plain.values():
        shares = table / table.sum(1, keepdims=True)
        indices = np.searchsorted(levels, test)
        expected = -np.log2(shares[np.arange(64)[None], indices]).mean()
        model = Frequencies(torch.from_numpy(shares).float().log())
        options = {"device": CPU, "precision": "fp32", "batch_size": 64, "workers": 0}
        numbers, _ = evaluator.evaluate(task, task.data, model, "test", **options)
        assert numbers == {name: pytest.approx(expected, abs=1e-5) for name in ("bits_per_pixel", "bits_per_dimension")}
    assert task.evaluation_notes()[0].startswith("the 17 colours are all that these images have")


def test_images_with_colours_outside_an_inherited_palette_are_not_called_lossless() -> None:
    former, config = build_task()
    task, _ = build_task()
    state = former.state()
    task.inherit({**state, "palette": state["palette"][:-1]})
    model, batch = redrawn(config, task), next(evaluation(task.data, "val", batch_size=4, rank=0, world=1, workers=0))
    assert task.state()["lossless"]
    task.answers(model, batch)
    assert not task.state()["lossless"] and "nearest to a pixel" in task.evaluation_notes()[0]


def test_answers_hold_the_bits_of_each_pixel_and_pictures_show_them() -> None:
    task, config = build_task("task.loss.objective=masked", "task.loss.classification=1")
    model, batch = redrawn(config, task), next(evaluation(task.data, "val", batch_size=4, rank=0, world=1, workers=0))
    answers = task.answers(model, batch)
    masked = task.sample_masks(batch, CPU)
    for answer, mask in zip(answers, masked, strict=True):
        assert answer["pixels"] == int(mask.sum())
        assert float(answer["bits"].sum()) * math.log(2) == pytest.approx(answer["nats"], rel=1e-5)
        assert torch.equal(answer["bits"] > 0, mask.view(8, 8))
        assert answer["name"] == task.classes[int(answer["log_probabilities"].argmax())]
    assert task.pictures(batch, answers, 2).shape[:2] == (2, 3)
    assert (
        task.goal.name == "top1"
        and "top1"
        in evaluator.evaluate(task, task.data, model, "val", device=CPU, precision="fp32", batch_size=64, workers=0)[0]
    )


def test_more_bits_than_equal_probabilities_need_raise_an_alarm() -> None:
    task, _ = build_task()
    assert task.alarms([{"nats": 64 * math.log(17), "pixels": 64}]) == []
    assert "4.50 bits per pixel are more than the 4.09" in task.alarms([{"nats": 4.5 * math.log(2), "pixels": 1}])[0]


def test_a_classifier_is_not_evaluated_on_other_classes() -> None:
    task, _ = build_task("task.loss.classification=1")
    task.restore({**task.state(), "classes": ["cat", "dog"]})
    with pytest.raises(UserError, match="this model has learnt cat, dog"):
        task.metric("val")


def test_class_names_are_compared_in_unicodes_composed_form() -> None:
    task, _ = build_task("task.loss.classification=1")
    names = ["gr\u00fcn", *task.classes[1:]]  # as one character, and below, as macOS writes it, as two
    task.restore({**task.state(), "classes": names})
    task.data.names = ["gru\u0308n", *names[1:]]
    assert task.metric("val").classes[0] == "gru\u0308n"


# Samples.


class Chain(nn.Module):
    """A decoder whose next colour depends on the last one by a table of probabilities (V + 1, V); its row V starts."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def encode(self, source: Tensor, lengths: Tensor) -> None:
        return None

    def step(self, state: None, tokens: Tensor) -> Tensor:
        return self.table[tokens if tokens.ndim == 1 else tokens[:, -1]].log().detach().clone()

    def reorder(self, state: None, rows: Tensor) -> None:
        return None


def sampling_task(*changes: str) -> ImageModelling:
    """A task of images of 1 x 3 pixels and three grey levels, whose data are never read."""
    config = configure("train", ["model=igpt", *changes])
    data: Any = SimpleNamespace(image_size=(1, 3), channels=1, mean=[0.0], std=[1.0], batch_size=1, classes=list)
    task: ImageModelling = build(config["task"], data=data)
    task.restore({"palette": [[-1.0], [0.0], [1.0]], "lossless": True, "classes": []})
    return task


def test_samples_have_the_models_distribution() -> None:
    """All 27 images, drawn 4,000 times: a chi-square test; a deviation of this size has a probability of 1e-4."""
    table = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2]])
    task = sampling_task("task.predict.candidates=4000")
    (batch,) = task.read("samples")
    answers = task.answers(Chain(table), batch)
    assert len(answers) == len(batch["ids"]) == 4000
    images = torch.stack([answer["image"] for answer in answers]).flatten(1)  # values 0, 128, 255
    counts = np.bincount(((images.long() + 1) // 128) @ torch.tensor([9, 3, 1]), minlength=27)
    rows = table.double().numpy()
    rows /= rows.sum(1, keepdims=True)  # they are rounded to fp32
    expected = np.einsum("a,ab,bc->abc", rows[3], rows[:3], rows[:3]).flatten() * 4000
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    first = images[0].long().add(1) // 128
    steps = zip([3, *first[:-1].tolist()], first.tolist(), strict=True)
    bits = -math.log2(math.prod(float(table[a, b]) for a, b in steps)) / 3
    assert answers[0]["bits_per_pixel"] == pytest.approx(bits, rel=1e-5)


def test_top_k_and_temperature_narrow_the_distribution() -> None:
    table = torch.tensor([[0.2, 0.5, 0.3]] * 4)
    for change in ("task.predict.top_k=1", "task.predict.top_p=0.4", "task.predict.temperature=0.01"):
        answers = sampling_task(change).answers(Chain(table), {"ids": [0], "samples": True})
        assert all(answer["image"].flatten().tolist() == [128] * 3 for answer in answers), change


def test_a_masked_model_samples_nothing() -> None:
    task, config = build_task("task.loss.objective=masked")
    with pytest.raises(UserError, match="objective=masked cannot sample images"):
        task.answers(redrawn(config, task), {"ids": [0], "samples": True})
    batch = {**next(evaluation(task.data, "val", batch_size=2, rank=0, world=1, workers=0)), "complete": True}
    assert "completions" not in task.answers(redrawn(config, task), batch)[0]


def digit_files(task: Any, folder: Path) -> list[Tensor]:
    images = list(task.data.load()["test"][0][:2])
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{number}.png")
    return images


@pytest.mark.parametrize(("given", "rows"), [(0.5, 4), (0.0, 0), (1.0, 8)])
def test_completions_keep_the_given_rows_and_do_not_depend_on_other_images(
    given: float, rows: int, tmp_path: Path
) -> None:
    task, config = build_task(f"task.predict.given={given}", "task.predict.candidates=3")
    model, images = redrawn(config, task), digit_files(task, tmp_path / "digits")
    batches = [*task.read(str(tmp_path / "digits"))]
    answers = [task.answers(model, batch)[0] for batch in batches]
    for answer, image in zip(answers, images, strict=True):
        assert answer["given"] == rows and torch.equal(answer["image"], image)
        assert torch.equal(
            answer["completions"][:, :, :rows], image[:, :rows].expand(len(answer["completions"]), -1, -1, -1)
        )
    assert len(answers[0]["completions"]) == (1 if given == 1 else 3)
    if given < 1:
        assert not torch.equal(answers[0]["completions"][0], answers[0]["completions"][1])
    joined = task.data.collate([{"file": str(b["files"][0]), "image": b["images"][0]} for b in batches])
    together = task.answers(model, {**joined, "complete": True})
    assert all(torch.equal(a["completions"], b["completions"]) for a, b in zip(answers, together, strict=True))


def test_a_notebook_gets_a_record_and_a_picture(tmp_path: Path) -> None:
    task, config = build_task("task.loss.classification=1")
    model = redrawn(config, task)
    digit_files(task, tmp_path / "digits")
    records = task.predict(model, str(tmp_path / "digits" / "0.png"))
    assert records[0].keys() == {"bits_per_pixel", "name", "share"} and records._repr_png_()
    assert len(task.predict(model, str(tmp_path / "digits"))) == 2


def test_a_few_digits_are_learnt_by_heart() -> None:
    """Eight images: their code is at least log2(8) / 64 = 0.05 bits per pixel, and a model of them comes close."""
    task, config = build_task("model.width=32", "model.feedforward=64", "optimizer.lr=5e-3")
    torch.manual_seed(0)
    model = build_model(config["model"], task)
    stepper = Stepper(
        task, model, optim.build(model, construct(OptimizerOptions, config["optimizer"])), CPU, "fp32", clip_norm=1.0
    )
    (batch,) = load(task, [8])
    losses = [float(stepper([batch], step)["loss"]) / math.log(2) for step in range(250)]
    assert losses[0] == pytest.approx(math.log2(17), abs=1e-4)
    assert 3 / 64 - 1e-3 <= losses[-1] < 0.15


def test_a_trained_checkpoint_is_evaluated_sampled_and_fine_tuned(inside: Any, tmp_path: Path) -> None:
    short = [*SMALL, "trainer.steps=4", "trainer.eval_every=2", "trainer.log=[]", "trainer.precision=fp32"]
    inside("train", *short, f"run_dir={tmp_path / 'run'}")
    best = tmp_path / "run/checkpoints/best.pt"
    printed = inside("evaluate", f"checkpoint={best}", "output=evaluated")
    assert "test/bits_per_pixel" in printed and "17 colours are all" in printed
    assert (tmp_path / "evaluated/bits.csv").is_file()
    task, _ = build_task()
    digit_files(task, tmp_path / "digits")
    lines = inside("predict", f"checkpoint={best}", "input=digits", "given=0.25", "candidates=2").splitlines()
    assert len(lines) == 2 and lines[0].startswith("0.png: ") and lines[0].endswith(" bits per pixel")
    assert (tmp_path / "predictions/0.png.completions.png").is_file()
    assert (tmp_path / "predictions/0.png.pixels.json").is_file()
    assert len(inside("predict", f"checkpoint={best}", "input=samples", "candidates=3").splitlines()) == 3
    assert (tmp_path / "predictions/samples.png").is_file()
    inside("train", *short, "task.loss.classification=1", f"checkpoint={best}", f"run_dir={tmp_path / 'tuned'}")
    tuned, tuned_task = assembly.load(tmp_path / "tuned/checkpoints/best.pt", "trainer.device=cpu")
    log = (tmp_path / "tuned/train.log").read_text()
    assert "re-initialised: head.weight" in log and tuned.head is not None
    assert tuned_task.state() == task.state()
