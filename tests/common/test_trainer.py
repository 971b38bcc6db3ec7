"""The training loop on a toy task: logs, checkpoints, the best weights, going on, and the numbers at the end."""

import json

import pytest
import torch
from torch import nn

from common import checkpoint
from common.errors import UserError
from common.log import Log
from common.optim import OptimizerOptions, ScheduleOptions
from common.run import Run, weights
from common.task import Goal
from common.trainer import Trainer

CPU = torch.device("cpu")


class Line:
    """Points of y = 3 x - 1 with noise; the noise of training points is drawn anew each time."""

    batch_size = 4

    def __init__(self, val: int = 6, test: int = 5):
        self.counts = {"train": 22, "val": val, "test": test}

    def count(self, split):
        return self.counts[split]

    def cost(self, split):
        return [1] * self.counts[split]

    def sample(self, split, index, generator):
        noise = 0.0 if generator is None else float(torch.randn((), generator=generator)) * 0.1
        x = index / self.counts[split]
        return {"id": index, "x": x, "y": 3 * x - 1 + noise}

    def collate(self, samples):
        columns = {name: torch.tensor([s[name] for s in samples]) for name in ("x", "y")}
        return {"ids": [s["id"] for s in samples], **columns}

    def summary(self):
        return ["a line"]


class Fit:
    """Least squares; dropout in the model makes its randomness visible."""

    goal = Goal("error", higher_is_better=False)

    def __init__(self, data):
        self.data, self.metrics = data, 0

    def state(self):
        return {"slope": 3}

    def sizes(self, batch):
        return {"points": float(len(batch["ids"]))}

    def loss(self, model, batch, sizes):
        error = (model(batch["x"][:, None])[:, 0] - batch["y"]).pow(2).sum() / sizes["points"]
        return error, {"square": error.detach()}

    def predict(self, model, batch):
        return [{"y": float(y)} for y in model(batch["x"][:, None])[:, 0]]

    def pictures(self, batch, answers, count):
        return None

    def metric(self, split):
        return Error(self.data.count(split))

    def advice(self, pretrained):
        return ["this is a toy."]

    def alarms(self, answers):
        return []


class Error:
    def __init__(self, count):
        self.count, self.errors = count, {}

    def update(self, batch, answers):
        for i, y, answer in zip(batch["ids"], batch["y"], answers, strict=True):
            assert i not in self.errors
            self.errors[i] = abs(float(y) - answer["y"])

    def gather(self):
        assert len(self.errors) == self.count

    def compute(self):
        return {"error": sum(self.errors.values()) / self.count}

    def write(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "errors.json").write_text(json.dumps(self.errors))


def trainer(**keys) -> Trainer:
    defaults = {
        "steps": 20,
        "epochs": None,
        "micro_batch": None,
        "precision": "fp32",
        "clip_norm": 1.0,
        "ema_decay": 0.0,
        "compile": False,
        "workers": 0,
        "device": "cpu",
        "log_every": 4,
        "eval_every": 5,
        "save_every": None,
    }
    return Trainer(**{**defaults, **keys})


def run(folder, *, data=None, seed=0, lr=0.1, reference_batch=None) -> Run:
    torch.manual_seed(seed)
    data = data or Line()
    return Run(
        task=Fit(data),
        data=data,
        model=nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1)),
        optimizer=OptimizerOptions(
            name="adamw",
            lr=lr,
            weight_decay=0.0,
            decay_norms=False,
            betas=(0.9, 0.999),
            eps=1e-8,
            momentum=0.0,
            rates={},
            layer_decay=1.0,
            reference_batch=reference_batch,
            scaling="linear",
        ),
        schedule=ScheduleOptions(name="cosine", warmup=2, start=0.0, drops=[], factor=1.0, final=0.0),
        config={"seed": seed},
        seed=seed,
        folder=folder,
    )


def fit(folder, *, resume=False, keys=None, **options):
    with Log(folder, main=True) as log:
        return trainer(**keys or {}).fit(run(folder, **options), log, on=CPU, resume=resume)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_its_files(tmp_path):
    numbers = fit(tmp_path, keys={"steps": 200, "eval_every": 50})
    assert numbers["test/error"] < 0.3
    names = {name for line in lines(tmp_path) for name in line}
    assert {"train/loss", "train/square", "train/lr", "train/gradient_norm", "val/error", "test/error"} <= names
    assert [line["step"] for line in lines(tmp_path) if "val/error" in line] == [50, 100, 150, 200]
    assert "time" not in names and (tmp_path / "timing.jsonl").exists()
    assert json.loads((tmp_path / "predictions/errors.json").read_text())
    assert "this is a toy." in (tmp_path / "train.log").read_text()


def test_the_best_checkpoint_is_the_one_that_is_tested(tmp_path):
    numbers = fit(tmp_path, keys={"steps": 60, "eval_every": 3}, lr=0.5)
    scores = {line["step"]: line["val/error"] for line in lines(tmp_path) if "val/error" in line}
    best = checkpoint.load(tmp_path / "checkpoints/best.pt")
    assert best["step"] == min(scores, key=scores.get) != 60, "the seed should make an earlier step the best"
    one = run(tmp_path)
    one.model.load_state_dict(best["model"])
    metric = one.task.metric("test")
    batch = one.data.collate([one.data.sample("test", i, None) for i in range(5)])
    metric.update(batch, one.task.predict(one.model.eval(), batch))
    assert metric.compute()["error"] == pytest.approx(numbers["test/error"], abs=1e-7)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("keys", [{}, {"ema_decay": 0.9, "micro_batch": 3}, {"precision": "bf16"}])
@pytest.mark.parametrize("stop", [6, 10, 13])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(tmp_path, keys, stop, monkeypatch):
    """Bit for bit, dropout and log included, from the last checkpoint before the stop."""
    keys = {**keys, "save_every": 3}
    fit(tmp_path / "whole", keys=keys)

    real = Fit.loss
    calls = {"left": stop * (2 if "micro_batch" in keys else 1)}

    def die(self, *arguments):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Fit, "loss", die)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "stopped", keys=keys)
    monkeypatch.setattr(Fit, "loss", real)
    fit(tmp_path / "stopped", keys=keys, resume=True)

    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()
    whole, stopped = (
        checkpoint.load(tmp_path / name / "checkpoints/step_00000020.pt") for name in ("whole", "stopped")
    )
    for name, value in whole["model"].items():
        assert torch.equal(value, stopped["model"][name])
    assert whole["best"] == stopped["best"]


def test_going_on_as_another_run_is_refused_with_the_differences(tmp_path):
    fit(tmp_path, keys={"steps": 5})
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        fit(tmp_path, seed=1, resume=True)


def test_going_on_before_the_first_checkpoint_starts_the_log_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "train/loss": 9.0}\n')
    fit(tmp_path, resume=True)
    assert [line["step"] for line in lines(tmp_path) if "train/loss" in line] == [4, 8, 12, 16, 20]


def test_averaged_weights_are_evaluated_and_kept(tmp_path):
    fit(tmp_path, keys={"ema_decay": 0.99})
    content = checkpoint.load(tmp_path / "checkpoints/step_00000020.pt")
    averaged, raw = weights(content), weights(content, "raw")
    assert not torch.equal(averaged["0.weight"], raw["0.weight"])
    fit(tmp_path / "plain")
    with pytest.raises(UserError, match="kept no average"):
        weights(checkpoint.load(tmp_path / "plain/checkpoints/step_00000020.pt"), "ema")


def test_the_rate_in_effect_is_said_and_logged_and_trained_with(tmp_path):
    """0.1 for batches of 16 is 0.025 for ours of 4."""
    fit(tmp_path / "scaled", reference_batch=16)
    fit(tmp_path / "plain", lr=0.025)
    assert (tmp_path / "scaled/metrics.jsonl").read_text() == (tmp_path / "plain/metrics.jsonl").read_text()
    highest = max(line["train/lr"] for line in lines(tmp_path / "scaled") if "train/lr" in line)
    assert 0.02 < highest <= 0.025
    said = "0.025 at its highest, from 0.1 for 16 by linear scaling"
    assert said in (tmp_path / "scaled/train.log").read_text()
    assert "0.025 at its highest\n" in (tmp_path / "plain/train.log").read_text()


def test_without_val_the_last_weights_count_and_without_test_there_are_no_numbers(tmp_path):
    assert "test/error" in fit(tmp_path / "a", data=Line(val=0))
    assert not (tmp_path / "a/checkpoints/best.pt").exists()
    assert set(fit(tmp_path / "b", data=Line(test=0))) == {"val/error"}


def test_epochs_are_counted_in_whole_batches(tmp_path):
    fit(tmp_path, keys={"steps": None, "epochs": 2, "eval_every": None})
    assert [line["step"] for line in lines(tmp_path) if "val/error" in line] == [5, 10]


def test_a_mistake_in_evaluation_shows_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Fit, "predict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_compiled_model_keeps_the_names_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)  # no compiler here is no reason to fail
    fit(tmp_path, keys={"compile": True, "steps": 2, "eval_every": 2})
    assert set(checkpoint.load(tmp_path / "checkpoints/step_00000002.pt")["model"]) == set(
        run(tmp_path).model.state_dict()
    )
