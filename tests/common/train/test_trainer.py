"""The training loop on a toy task: logs, checkpoints, the best weights, resuming, and the final numbers."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from common.config.check import build
from common.config.compose import configure
from common.errors import Stopped, UserError
from common.files import checkpoint
from common.files.log import Log
from common.machine import distributed
from common.task import Goal
from common.train import evaluator, final
from common.train.optim import OptimizerOptions, ScheduleOptions
from common.train.state import Run, batch_unit, select_weights
from common.train.trainer import Trainer

CPU = torch.device("cpu")


class Line:
    """Points of y = 3 x - 1; training points have noise, sampled at each visit."""

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
    """Least squares."""

    goal = Goal("error", higher_is_better=False)

    def __init__(self, data):
        self.data, self.metrics = data, 0

    def state(self):
        return {"slope": 3}

    def normalisers(self, batch):
        return {"points": float(len(batch["ids"]))}

    def loss(self, model, batch, normalisers):
        error = (model(batch["x"][:, None])[:, 0] - batch["y"]).pow(2).sum() / normalisers["points"]
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
        self.errors = dict(distributed.gather_samples(list(self.errors.items()), self.count))

    def compute(self):
        return {"error": sum(self.errors.values()) / self.count}

    def restrict(self, count):
        self.count = count

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
        "deterministic": False,
        "strategy": "ddp",
        "timeout": 60,
        "grace": None,
        "eval_samples": None,
        "workers": 0,
        "device": "cpu",
        "log": [],
        "log_every": 4,
        "eval_every": 5,
        "save_every": None,
        "keep_best": 1,
        "patience": None,
        "average_last": 0,
        "sparsity": None,
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
        schedule=ScheduleOptions(name="cosine", warmup=2, start=0.0, drops=[], factor=1.0, final=0.0, width=None),
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


def test_lines_about_training_show_the_best_goal_so_far_also_after_resuming(tmp_path, monkeypatch):
    values, real = iter([0.5, 0.6, 0.4321, 0.7]), Error.compute
    monkeypatch.setattr(Error, "compute", lambda self: {"error": next(values)} if self.count == 6 else real(self))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(final, "final_numbers", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        fit(tmp_path, keys={"steps": 16, "log_every": 1, "eval_every": 4})
    texts = [line[21:] for line in (tmp_path / "train.log").read_text().splitlines() if " of 16" in line]
    shown = {int(text.split()[1]): text.partition(": ")[0].partition(", best ")[2] for text in texts if "loss" in text}
    first, second = "val/error 0.5 at step 4", "val/error 0.4321 at step 12"
    assert [shown[step] for step in (1, 4, 5, 8, 9, 12, 13, 16)] == ["", "", *[first] * 4, *[second] * 2]
    (tmp_path / "checkpoints/step_00000016.pt").unlink()
    monkeypatch.setattr(Error, "compute", real)
    fit(tmp_path, keys={"steps": 16, "log_every": 1, "eval_every": 4}, resume=True)
    lines_of_13 = [line for line in (tmp_path / "train.log").read_text().splitlines() if "step 13 of 16" in line]
    assert len(lines_of_13) == 2 and "best val/error" in lines_of_13[1]


def test_the_best_checkpoint_is_the_one_that_is_tested(tmp_path):
    numbers = fit(tmp_path, keys={"steps": 60, "eval_every": 3}, lr=0.5)
    scores = {line["step"]: line["val/error"] for line in lines(tmp_path) if "val/error" in line}
    best = checkpoint.load(tmp_path / "checkpoints/best.pt")
    assert best["step"] == min(scores, key=scores.get) != 60, "the seed should make an earlier step the best"
    fresh = run(tmp_path)
    fresh.model.load_state_dict(best["model"])
    metric = fresh.task.metric("test")
    batch = fresh.data.collate([fresh.data.sample("test", i, None) for i in range(5)])
    metric.update(batch, fresh.task.predict(fresh.model.eval(), batch))
    assert metric.compute()["error"] == pytest.approx(numbers["test/error"], abs=1e-7)


def test_equal_seeds_give_equal_numbers_and_different_seeds_different_ones(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize("keys", [{}, {"ema_decay": 0.9, "micro_batch": 3}, {"precision": "bf16"}])
@pytest.mark.parametrize("stop", [6, 10, 13])
def test_a_stopped_run_resumes_to_the_same_end(tmp_path, keys, stop, monkeypatch):
    """Weights and log are equal bit for bit; the model has dropout."""
    keys = {**keys, "save_every": 3}
    fit(tmp_path / "whole", keys=keys)

    real = Fit.loss
    remaining = [None] * stop * (2 if "micro_batch" in keys else 1)

    def die(self, *arguments):
        if not remaining:
            raise KeyboardInterrupt
        remaining.pop()
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


def test_resuming_as_another_run_is_refused_with_the_differences(tmp_path):
    fit(tmp_path, keys={"steps": 5})
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        fit(tmp_path, seed=1, resume=True)


def test_resuming_before_the_first_checkpoint_restarts_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "train/loss": 9.0}\n')
    fit(tmp_path, resume=True)
    assert [line["step"] for line in lines(tmp_path) if "train/loss" in line] == [4, 8, 12, 16, 20]


def test_averaged_weights_are_evaluated_and_kept(tmp_path):
    fit(tmp_path, keys={"ema_decay": 0.99})
    content = checkpoint.load(tmp_path / "checkpoints/step_00000020.pt")
    averaged, raw = select_weights(content), select_weights(content, "raw")
    assert not torch.equal(averaged["0.weight"], raw["0.weight"])
    fit(tmp_path / "plain")
    with pytest.raises(UserError, match="kept no average"):
        select_weights(checkpoint.load(tmp_path / "plain/checkpoints/step_00000020.pt"), "ema")


def test_the_scaled_rate_is_printed_logged_and_used(tmp_path):
    """0.1 for batches of 16 is 0.025 for ours of 4."""
    fit(tmp_path / "scaled", reference_batch=16)
    fit(tmp_path / "plain", lr=0.025)
    assert (tmp_path / "scaled/metrics.jsonl").read_text() == (tmp_path / "plain/metrics.jsonl").read_text()
    peak = max(line["train/lr"] for line in lines(tmp_path / "scaled") if "train/lr" in line)
    assert 0.02 < peak <= 0.025
    summary = "0.025 at its peak, linear scaling of 0.1 for a batch of 16"
    assert summary in (tmp_path / "scaled/train.log").read_text()
    assert "0.025 at its peak\n" in (tmp_path / "plain/train.log").read_text()


def test_without_val_the_last_weights_are_tested_and_without_test_val_is_reported(tmp_path):
    assert "test/error" in fit(tmp_path / "a", data=Line(val=0))
    assert not (tmp_path / "a/checkpoints/best.pt").exists()
    assert set(fit(tmp_path / "b", data=Line(test=0))) == {"val/error"}


def test_epochs_are_counted_in_whole_batches(tmp_path):
    fit(tmp_path, keys={"steps": None, "epochs": 2, "eval_every": None})
    assert [line["step"] for line in lines(tmp_path) if "val/error" in line] == [5, 10]


def per_micro_batch_lines(folder, model, monkeypatch, names=()):
    """The lines of the start summary that name what depends on the split of a step; `names` are the task's."""
    monkeypatch.setattr(Fit, "per_micro_batch", names, raising=False)
    short = run(folder)
    short.model = model
    with Log(folder, main=True) as log:
        trainer(steps=2, eval_every=2).fit(short, log, on=CPU, resume=False)
    return [line for line in (folder / "train.log").read_text().splitlines() if "micro-batch" in line]


class Frozen(nn.Sequential):
    """Keeps its norms in evaluation mode, as is common in fine-tuning."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self


def test_the_start_summary_names_what_depends_on_the_split_of_a_step(tmp_path, monkeypatch):
    layers = [nn.Linear(1, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 1)]
    assert per_micro_batch_lines(tmp_path / "none", nn.Sequential(nn.Linear(1, 1)), monkeypatch) == []
    assert per_micro_batch_lines(tmp_path / "frozen", Frozen(*layers), monkeypatch) == []
    live = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4).eval(), *layers[2:])  # train() makes its norm live
    live.per_micro_batch = ("the noise", "the queue")
    [line] = per_micro_batch_lines(tmp_path / "both", live, monkeypatch, ("focal loss",))
    assert line.endswith(
        "per micro-batch: BatchNorm (1 layer), the noise, the queue, focal loss: a step depends on "
        "trainer.micro_batch and on the number of processes"
    )
    [line] = per_micro_batch_lines(tmp_path / "task", nn.Sequential(nn.Linear(1, 1)), monkeypatch, ("focal loss",))
    assert "per micro-batch: focal loss: " in line


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_the_log_names_the_unit_of_a_batch(tmp_path, monkeypatch, unit):
    short = run(tmp_path)
    if unit != "samples":
        monkeypatch.setattr(type(short.data), "batch_unit", unit, raising=False)
    with Log(tmp_path, main=True) as log:
        trainer(steps=2, eval_every=2).fit(short, log, on=CPU, resume=False)
    assert f"steps     2 of {short.data.batch_size} {unit} each, " in (tmp_path / "train.log").read_text()
    assert f'"{unit}_per_s": ' in (tmp_path / "timing.jsonl").read_text()


def test_texts_are_counted_in_tokens_and_images_and_passages_in_samples():
    names = ["seq2seq", "gpt", "bert", "bert_classifier", "vit", "detr", "word2vec"]
    units = [batch_unit(build(configure("train", [f"model={name}"])["data"])) for name in names]
    assert units == ["tokens"] * 4 + ["samples"] * 3


def test_a_mistake_in_evaluation_shows_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Fit, "predict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_compiled_model_keeps_the_names_of_its_weights(tmp_path):
    with torch._dynamo.config.patch(suppress_errors=True):  # passes on machines without a compiler
        fit(tmp_path, keys={"compile": True, "steps": 2, "eval_every": 2})
    assert set(checkpoint.load(tmp_path / "checkpoints/step_00000002.pt")["model"]) == set(
        run(tmp_path).model.state_dict()
    )


def mean_of_files(folder, steps, kind="auto"):
    """The mean of these checkpoints' weights, computed independently."""
    states = [select_weights(checkpoint.load(folder / f"checkpoints/step_{step:08d}.pt"), kind) for step in steps]
    return {name: torch.stack([state[name].double() for state in states]).mean(0).float() for name in states[0]}


def error_of(tensors, folder, split):
    """The error with these weights, computed without the trainer."""
    fresh = run(folder)
    fresh.model.load_state_dict(tensors)
    batch = fresh.data.collate([fresh.data.sample(split, i, None) for i in range(fresh.data.count(split))])
    answers = fresh.task.predict(fresh.model.eval(), batch)
    return sum(abs(float(y) - answer["y"]) for y, answer in zip(batch["y"], answers, strict=True)) / len(answers)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize(("lr", "average_wins"), [(0.5, True), (0.1, False)])
def test_the_average_is_tested_if_it_is_better_on_val_and_otherwise_the_best(tmp_path, lr, average_wins, ema_decay):
    numbers = fit(tmp_path, keys={"average_last": 3, "ema_decay": ema_decay}, lr=lr)
    mean = mean_of_files(tmp_path, (10, 15, 20))
    best = select_weights(checkpoint.load(tmp_path / "checkpoints/best.pt"))
    scores = [line["val/error"] for line in lines(tmp_path) if "val/error" in line]
    [averaged] = [line for line in lines(tmp_path) if "average/error" in line]
    assert averaged == {"step": 20, "average/error": pytest.approx(error_of(mean, tmp_path, "val"), abs=1e-6)}
    assert min(scores) == pytest.approx(error_of(best, tmp_path, "val"), abs=1e-6)
    assert (averaged["average/error"] <= min(scores)) == average_wins, "both should occur here"
    assert numbers["val/error"] == min(averaged["average/error"], *scores)
    assert numbers["test/error"] == pytest.approx(error_of(mean if average_wins else best, tmp_path, "test"), abs=1e-6)
    kind = "averaged (EMA)" if ema_decay else "raw"
    line = f"average.pt: average of steps 10, 15, 20, {kind}" if average_wins else f"best.pt: step 20, {kind}"
    assert numbers["weights"] == f"checkpoints/{line}" and line in (tmp_path / "train.log").read_text()
    for name, value in select_weights(checkpoint.load(tmp_path / "checkpoints/average.pt")).items():
        torch.testing.assert_close(value, mean[name], rtol=0, atol=1e-7)


def test_an_average_that_is_equally_good_is_tested(tmp_path):
    numbers = fit(tmp_path, keys={"average_last": 3}, lr=1e-30)
    assert {line["val/error"] for line in lines(tmp_path) if "val/error" in line} == {numbers["val/error"]}
    assert "average of steps 10, 15, 20" in numbers["weights"]


def test_a_score_of_nan_never_selects_the_average(tmp_path, monkeypatch):
    real = final._average

    def average_with_nan(*arguments):
        monkeypatch.setattr(Error, "compute", lambda _: {"error": float("nan")})
        try:
            return real(*arguments)
        finally:
            monkeypatch.undo()

    monkeypatch.setattr(final, "_average", average_with_nan)
    numbers = fit(tmp_path, keys={"average_last": 3}, lr=0.5)
    assert "best.pt" in numbers["weights"] and numbers["val/error"] > 0


def test_without_val_the_average_is_tested(tmp_path):
    numbers = fit(tmp_path, data=Line(val=0), keys={"average_last": 2})
    assert "average of steps 15, 20" in numbers["weights"] and "val/error" not in numbers
    mean = mean_of_files(tmp_path, (15, 20))
    assert numbers["test/error"] == pytest.approx(error_of(mean, tmp_path, "test"), abs=1e-6)


def test_a_run_keeps_the_checkpoints_that_it_averages_and_by_default_two(tmp_path):
    numbers = fit(tmp_path / "three", keys={"average_last": 3, "save_every": 2})
    plain = fit(tmp_path / "plain", keys={"save_every": 2})
    files = {name: sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) for name in ("three", "plain")}
    last = ["step_00000016.pt", "step_00000018.pt", "step_00000020.pt"]
    assert files == {"three": ["average.pt", "best.pt", *last], "plain": ["best.pt", *last[1:]]}
    assert set(plain) == {"val/error", "test/error"} and set(numbers) == {*plain, "weights"}
    without = [line for line in lines(tmp_path / "three") if not {"average/error", "test/error"} & {*line}]
    assert without == [line for line in lines(tmp_path / "plain") if "test/error" not in line], "training is the same"


def test_fewer_checkpoints_than_requested_are_averaged_and_a_single_one_is_not(tmp_path):
    numbers = fit(tmp_path / "a", data=Line(val=0), keys={"average_last": 9, "eval_every": 15})
    assert "average of steps 15, 20," in numbers["weights"]
    numbers = fit(tmp_path / "b", keys={"average_last": 9, "eval_every": 20})
    assert numbers["weights"] == "checkpoints/best.pt: step 20, raw"
    assert "The last checkpoints were not averaged: an average needs" in (tmp_path / "b/train.log").read_text()
    with pytest.raises(UserError, match=r"trainer\.average_last=1: one checkpoint has no average; give 0"):
        trainer(average_last=1)


def interrupt(*_, **__):
    raise KeyboardInterrupt


KILL_AT = {"val": (Trainer, "_validate"), "average": (final, "_average"), "end": (Error, "write")}


@pytest.mark.parametrize("moment", KILL_AT)
def test_a_run_killed_after_its_last_step_gives_the_same_average(tmp_path, moment, monkeypatch):
    keys = {"average_last": 3, "save_every": 3, "eval_every": 20}
    expected = fit(tmp_path / "whole", keys=keys, lr=0.5)
    monkeypatch.setattr(*KILL_AT[moment], interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", keys=keys, lr=0.5)
    monkeypatch.undo()
    assert fit(tmp_path / "killed", keys=keys, lr=0.5, resume=True) == expected
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()
    whole, killed = (checkpoint.load(tmp_path / name / "checkpoints/average.pt") for name in ("whole", "killed"))
    assert whole["mean"] == killed["mean"] == {"steps": [15, 18, 20], "ema": False}
    assert all(torch.equal(value, killed["model"][name]) for name, value in whole["model"].items())


def test_with_a_damaged_checkpoint_there_is_no_average_and_the_best_is_tested(tmp_path, monkeypatch):
    keys = {"average_last": 3}
    monkeypatch.setattr(final, "final_numbers", lambda *_, **__: {})
    fit(tmp_path, keys=keys, lr=0.5)
    monkeypatch.undo()
    (tmp_path / "checkpoints/step_00000015.pt").write_bytes(b"")
    assert fit(tmp_path, keys=keys, lr=0.5, resume=True)["weights"] == "checkpoints/best.pt: step 20, raw"
    output = (tmp_path / "train.log").read_text()
    assert "Warning: The last checkpoints were not averaged: " in output and "step_00000015.pt is empty" in output


def test_a_run_may_resume_with_another_number_of_averaged_checkpoints(tmp_path):
    for last in (0, 2):
        toy = run(tmp_path, data=Line(val=0))
        toy.config = {"seed": 0, "trainer": {"average_last": last}}
        with Log(tmp_path, main=True) as log:
            numbers = trainer(average_last=last).fit(toy, log, on=CPU, resume=last > 0)
    assert "average of steps 15, 20" in numbers["weights"]


def average_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    numbers = {}
    for val in (6, 0):
        path = Path(folder, f"val{val}")
        with Log(path, main=rank == 0) as log:
            toy = run(path, data=Line(val=val), lr=0.5)
            numbers[f"val{val}"] = trainer(average_last=3).fit(toy, log, on=CPU, resume=False)
    real = Error.compute
    Error.compute = lambda self: {"error": -1.0} if self.count == 6 else real(self)
    with Log(Path(folder, "undefined"), main=rank == 0) as log:
        toy = run(Path(folder, "undefined"), lr=0.5)
        numbers["undefined"] = trainer(average_last=3).fit(toy, log, on=CPU, resume=False)
    Path(folder, f"{rank}.json").write_text(json.dumps(numbers))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_test_the_same_average_and_rank_0_writes_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    mp.start_processes(average_on_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    numbers, numbers_of_rank_1 = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert numbers == numbers_of_rank_1 and len(numbers["val6"]) == 3
    assert [line["step"] for line in lines(tmp_path / "val6") if "average/error" in line] == [20]
    assert numbers["val0"]["weights"] == "checkpoints/average.pt: average of steps 10, 15, 20, raw"
    assert numbers["undefined"]["weights"] == "checkpoints/step_00000020.pt: step 20, raw"
    mean = mean_of_files(tmp_path / "val0", (10, 15, 20))
    assert numbers["val0"]["test/error"] == pytest.approx(error_of(mean, tmp_path, "test"), abs=1e-6)


def test_the_best_k_are_kept_besides_the_last_two(tmp_path):
    fit(tmp_path, keys={"steps": 60, "eval_every": 3, "keep_best": 3}, lr=0.5)
    scores = {line["step"]: line["val/error"] for line in lines(tmp_path) if "val/error" in line}
    ranked = sorted(scores, key=scores.get)[:3]
    steps = {int(path.stem[5:]) for path in (tmp_path / "checkpoints").glob("step_*.pt")}
    assert steps - {57, 60} == {*ranked} - {57, 60} != set(), "the seed should make earlier steps the best"
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == ranked[0]


def test_any_score_beats_a_first_score_of_nan(tmp_path, monkeypatch):
    real = Error.compute
    calls = []
    monkeypatch.setattr(
        Error, "compute", lambda self: {"error": float("nan")} if not calls and not calls.append(1) else real(self)
    )
    fit(tmp_path)
    scores = {line["step"]: line["val/error"] for line in lines(tmp_path) if "val/error" in line}
    assert scores.pop(5) is None
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == min(scores, key=scores.get)


@pytest.mark.parametrize("value", [-1.0, float("nan"), None])
@pytest.mark.parametrize("keys", [{}, {"keep_best": 3}, {"average_last": 3}, {"ema_decay": 0.9}])
def test_a_goal_without_a_value_ranks_nothing_and_the_last_checkpoint_is_tested(tmp_path, monkeypatch, value, keys):
    """COCO's -1, nan, or no number of that name; -1 would be the best error, nan the first."""
    real = Error.compute
    numbers_of_val = {"other": 1.0} if value is None else {"error": value}
    monkeypatch.setattr(Error, "compute", lambda self: numbers_of_val if self.count == 6 else real(self))
    numbers = fit(tmp_path, keys=keys, lr=0.5)
    last = select_weights(checkpoint.load(tmp_path / "checkpoints/step_00000020.pt"))
    assert "val/error" not in numbers
    assert numbers["test/error"] == pytest.approx(error_of(last, tmp_path, "test"), abs=1e-6)
    assert not (tmp_path / "checkpoints/best.pt").exists()
    output = (tmp_path / "train.log").read_text()
    assert output.count("which is no value; this checkpoint is not ranked.") == 4
    assert "No evaluation gave a value of val/error; the last checkpoint, step_00000020.pt, is tested." in output


def constant_on_val(monkeypatch, value=0.5) -> None:
    real = Error.compute
    monkeypatch.setattr(Error, "compute", lambda self: {"error": value} if self.count == 6 else real(self))


@pytest.mark.parametrize("keys", [{}, {"keep_best": 3}, {"average_last": 3}, {"save_every": 3}])
def test_a_run_out_of_patience_ends_early_and_tests_the_best_checkpoint(tmp_path, monkeypatch, keys):
    constant_on_val(monkeypatch)
    numbers = fit(tmp_path, keys={"steps": 40, "patience": 2, **keys})
    assert max(line["step"] for line in lines(tmp_path)) == 15  # evaluations at 5 (the best), 10 and 15
    assert numbers["val/error"] == 0.5 and "test/error" in numbers
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == 5
    assert "val/error has not been better than 0.5000 for 2 evaluations" in (tmp_path / "train.log").read_text()


def test_patience_ends_a_run_whose_goal_never_has_a_value(tmp_path, monkeypatch):
    constant_on_val(monkeypatch, float("nan"))
    fit(tmp_path, keys={"steps": 40, "patience": 2})
    assert max(line["step"] for line in lines(tmp_path)) == 10


def test_a_better_goal_restores_patience(tmp_path, monkeypatch):
    values, real = iter([0.5, 0.6, 0.4, 0.5, 0.4]), Error.compute
    monkeypatch.setattr(Error, "compute", lambda self: {"error": next(values)} if self.count == 6 else real(self))
    fit(tmp_path, keys={"steps": 40, "patience": 2})
    assert [line["val/error"] for line in lines(tmp_path) if "val/error" in line] == [0.5, 0.6, 0.4, 0.5, 0.4]


@pytest.mark.parametrize("stop", [3, 7, 9, 12, 14])
@pytest.mark.parametrize("moment", ["loss", "evaluation"])
def test_a_killed_run_with_patience_ends_at_the_same_step(tmp_path, monkeypatch, stop, moment):
    keys = {"steps": 40, "patience": 2, "save_every": 3}
    constant_on_val(monkeypatch)
    fit(tmp_path / "whole", keys=keys)
    owner, name = (Fit, "loss") if moment == "loss" else (Error, "compute")
    real, calls = getattr(owner, name), []

    def die(self, *arguments):
        calls.append(1)
        if len(calls) == (stop if moment == "loss" else stop // 5 + 2):  # the first evaluation is a trial
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(owner, name, die)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", keys=keys)
    monkeypatch.setattr(owner, name, real)
    numbers = fit(tmp_path / "killed", keys=keys, resume=True)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "killed/metrics.jsonl").read_text()
    assert max(line["step"] for line in lines(tmp_path / "killed")) == 15
    for name in ("step_00000015.pt", "best.pt"):
        whole, killed = (checkpoint.load(tmp_path / run / "checkpoints" / name) for run in ("whole", "killed"))
        assert whole["step"] == killed["step"] and whole["evaluations_since_best"] == killed["evaluations_since_best"]
        assert all(torch.equal(whole["model"][key], killed["model"][key]) for key in whole["model"])
    assert numbers == fit(tmp_path / "killed", keys=keys, resume=True), "and again, after its end"


def test_patience_without_val_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"^trainer\.patience=2 needs a val split, and the data have none; give null\.$"
    ):
        fit(tmp_path, data=Line(val=0), keys={"patience": 2})


def test_a_part_of_val_is_evaluated_while_training_and_all_of_test(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "REPORT_SECONDS", -1.0)
    counts = []
    real = Error.compute
    monkeypatch.setattr(Error, "compute", lambda self: counts.append(len(self.errors)) or real(self))
    fit(tmp_path, keys={"eval_samples": 4})
    assert counts == [4, 4, 4, 4, 5]
    output = (tmp_path / "train.log").read_text()
    assert "val       4 of 6 samples, always the same ones" in output and "val/error is that of 4 of 6" in output
    assert output.count("evaluating val: about 4 of 4 samples") == 5, "with the trial before the first step"
    fit(tmp_path / "all", keys={"eval_samples": 6})
    assert counts[5:] == [6, 6, 6, 6, 5] and "always the same ones" not in (tmp_path / "all/train.log").read_text()
    monkeypatch.delattr(Error, "restrict")
    with pytest.raises(UserError, match=r"^trainer\.eval_samples=4: Error has no method restrict\(count\)"):
        fit(tmp_path / "another", keys={"eval_samples": 4})
    assert not (tmp_path / "another/checkpoints").exists() or not [*(tmp_path / "another/checkpoints").iterdir()]


def test_a_best_checkpoint_that_an_earlier_version_chose_by_minus_1_is_not_tested(tmp_path, monkeypatch):
    real = Error.compute
    monkeypatch.setattr(Error, "compute", lambda self: {"error": -1.0} if self.count == 6 else real(self))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Goal, "is_defined", lambda *_: True)
        patch.setattr(final, "final_numbers", lambda *_, **__: {})
        fit(tmp_path)
    assert checkpoint.load(tmp_path / "checkpoints/best.pt")["step"] == 5, "ties keep the earlier step"
    numbers = fit(tmp_path, resume=True)
    last = select_weights(checkpoint.load(tmp_path / "checkpoints/step_00000020.pt"))
    assert numbers == {"test/error": pytest.approx(error_of(last, tmp_path, "test"), abs=1e-6)}


def test_a_goal_that_may_be_minus_1_says_so():
    assert not Goal("AP", higher_is_better=True).better(-1.0, None)
    assert Goal("loglik", higher_is_better=True, undefined=None).better(-1.0, -2.0)
    assert Goal("loglik", higher_is_better=True).better(-2.0, -1.0)


def fill_disk(monkeypatch, *steps):
    """Let the disk be full when checkpoints of these steps are written."""
    real = checkpoint.save

    def save(path, content):
        if content["step"] in steps:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr("common.files.retention.save", save)


def test_a_checkpoint_that_cannot_be_written_is_a_warning_and_training_is_the_same(tmp_path, monkeypatch):
    fit(tmp_path / "whole")
    fill_disk(monkeypatch, 5, 10)
    fit(tmp_path / "full")
    output = (tmp_path / "full/train.log").read_text()
    assert output.count("was not written (No space left on device); older ones are kept.") == 2
    whole, full = ([line for line in lines(tmp_path / name) if "test/error" not in line] for name in ("whole", "full"))
    assert whole == full
    assert checkpoint.load(tmp_path / "full/checkpoints/best.pt")["step"] in (15, 20), (
        "the best of those that were written"
    )


def test_a_full_disk_does_not_use_up_patience_while_the_goal_improves(tmp_path, monkeypatch):
    values, real = iter([0.5, 0.4, 0.3, 0.2]), Error.compute
    monkeypatch.setattr(Error, "compute", lambda self: {"error": next(values)} if self.count == 6 else real(self))
    fill_disk(monkeypatch, 10, 15)
    numbers = fit(tmp_path, keys={"patience": 2})
    assert numbers["val/error"] == 0.2


def test_a_run_whose_last_checkpoint_is_missing_gives_no_numbers(tmp_path, monkeypatch):
    fill_disk(monkeypatch, 20)
    with pytest.raises(
        UserError, match=r"the last checkpoint could not be written to .*repeat the command with run_dir=.* resume=auto"
    ):
        fit(tmp_path)
    monkeypatch.undo()
    assert "test/error" in fit(tmp_path, resume=True)


def test_no_checkpoint_is_written_while_the_log_cannot_be(tmp_path, monkeypatch):
    """A checkpoint implies the lines before it: after a kill they could not be recovered."""
    monkeypatch.setattr(
        "common.files.lines.LineFile.flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(UserError, match="the last checkpoint could not be written to"):
        fit(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*.pt"))


def test_a_run_of_which_no_checkpoint_could_be_written_starts_again(tmp_path, monkeypatch):
    """Although evaluations were logged: the disk had room for lines, but not for a checkpoint."""
    with monkeypatch.context() as full:
        full.setattr("common.files.retention.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(UserError, match=r"could not be written to .*checkpoints \(No space left\)"):
            fit(tmp_path, keys={"eval_every": 2})
    assert '"val/' in (tmp_path / "metrics.jsonl").read_text()
    assert "test/error" in fit(tmp_path, resume=True, keys={"eval_every": 2})


def test_a_run_with_missing_checkpoints_does_not_start_again(tmp_path):
    fit(tmp_path)
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"holds no checkpoint, although some were written"):
        fit(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_allowed_changes_are_warned_of(tmp_path):
    fit(tmp_path, keys={"steps": 5})
    changed = run(tmp_path, seed=1)
    changed.config["allow_changes"] = ["seed"]
    with Log(tmp_path, main=True) as log:
        trainer().fit(changed, log, on=CPU, resume=True)
    assert (
        "allowed changes: seed was 0 and is 1; an uninterrupted run would differ"
        in (tmp_path / "train.log").read_text()
    )


@pytest.mark.parametrize("stop", [3, 10, 19])
def test_a_stop_changes_no_kept_averaged_or_best_checkpoint(tmp_path, stop, monkeypatch):
    keys = {"average_last": 3, "keep_best": 2, "save_every": 2, "ema_decay": 0.9}
    fit(tmp_path / "whole", keys=keys)
    real, calls = Fit.loss, []

    def stop_in_step(self, *arguments):
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, *arguments)

    monkeypatch.setattr(Fit, "loss", stop_in_step)
    with pytest.raises(Stopped, match=f"after step {stop} of 20, with a checkpoint"):
        fit(tmp_path / "stopped", keys=keys)
    fit(tmp_path / "stopped", keys=keys, resume=True)
    whole, stopped = (
        {path.name: checkpoint.load(path) for path in (tmp_path / name / "checkpoints").iterdir()}
        for name in ("whole", "stopped")
    )
    assert whole.keys() == stopped.keys() and "average.pt" in whole
    for name, content in whole.items():
        assert content["ranking"] == stopped[name]["ranking"]
        assert all(torch.equal(value, stopped[name]["model"][key]) for key, value in content["model"].items())
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()


def test_an_evaluation_cut_from_the_log_is_repeated_with_any_eval_every(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {"eval_every": 5})  # nothing of this evaluation was logged
    fit(tmp_path, keys={"eval_every": 4}, resume=True)
    assert [line["step"] for line in lines(tmp_path) if "val/error" in line] == [8, 12, 16, 20]
    fit(tmp_path / "longer", keys={"steps": 10, "eval_every": 5})
    longer = run(tmp_path / "longer")
    with Log(tmp_path / "longer", main=True) as log:
        trainer(steps=12, eval_every=4).fit(longer, log, on=CPU, resume=True)
    scores = [line["step"] for line in lines(tmp_path / "longer") if "val/error" in line]
    assert scores == [5, 10, 12], "the evaluation of step 10 is kept or repeated"


def stop_at(folder, step, keys, **options):
    """Fit until a signal during the evaluation of `step`."""
    real = Fit.predict

    def signal_self(self, model, batch):
        if toy.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, model, batch)

    toy = run(folder, **options)
    with pytest.MonkeyPatch.context() as patch, Log(folder, main=True) as log:
        patch.setattr(Fit, "predict", signal_self)
        trainer(**keys).fit(toy, log, on=CPU, resume=False)


def test_a_resumed_run_may_begin_an_average(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    fit(tmp_path, keys={"ema_decay": 0.9}, resume=True)
    content = checkpoint.load(tmp_path / "checkpoints/step_00000020.pt")
    assert content["average"]["updates"] == 15


def test_changed_data_are_refused_and_allowed_by_name(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    before = (tmp_path / "metrics.jsonl").read_text()

    def smaller():
        data = Line()
        data.counts["train"] = 21
        return data

    with pytest.raises(
        UserError, match=r"train has 21 samples and had 22; put them back, or give allow_changes=\[data\]"
    ):
        fit(tmp_path, data=smaller(), resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before, "a refusal changes nothing"
    toy = run(tmp_path, data=smaller())
    toy.config["allow_changes"] = ["data"]
    with Log(tmp_path, main=True) as log:
        trainer().fit(toy, log, on=CPU, resume=True)


class Labelled(Line):
    """The line with a fingerprint that the test decides."""

    def __init__(self, **digests):
        super().__init__()
        self.digests = {"train": "a", "val": "b", "test": "c", **digests}

    def fingerprint(self, split):
        return {"points": self.digests[split]}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_other_contents_of_equal_count_are_refused_by_name_and_allowed_by_name(tmp_path, split):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {}, data=Labelled())
    before = (tmp_path / "metrics.jsonl").read_text()
    refusal = rf"trained on: the points of {split} differ; put them back, or give allow_changes=\[data\]"
    with pytest.raises(UserError, match=refusal):
        fit(tmp_path, data=Labelled(**{split: "z"}), resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before, "a refusal changes nothing"
    toy = run(tmp_path, data=Labelled(**{split: "z"}))
    toy.config["allow_changes"] = ["data"]
    with Log(tmp_path, main=True) as log:
        trainer().fit(toy, log, on=CPU, resume=True)
    warning = f"allowed changes: the points of {split} differ; an uninterrupted run would differ"
    assert warning in (tmp_path / "train.log").read_text()
    last = checkpoint.load(tmp_path / "checkpoints/step_00000020.pt")
    assert last["fingerprints"][split] == {"points": "z"}


def test_a_split_that_came_or_went_is_refused(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    with pytest.raises(UserError, match="test had samples and has none"):
        fit(tmp_path, data=Line(test=0), resume=True)


def test_data_without_a_fingerprint_are_recognised_by_the_costs_of_their_samples(tmp_path, monkeypatch):
    """Other costs are another length of an epoch."""
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    monkeypatch.setattr(Line, "cost", lambda self, split: [1, 2] * (self.counts[split] // 2))
    with pytest.raises(UserError, match="the costs of train differ; the costs of val differ"):
        fit(tmp_path, resume=True)


def test_a_run_without_fingerprints_gets_them(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {}, data=Labelled())
    for path in (tmp_path / "checkpoints").iterdir():
        content = checkpoint.load(path)
        del content["fingerprints"]
        checkpoint.save(path, content)
    fit(tmp_path, data=Labelled(train="z"), resume=True)
    last = checkpoint.load(tmp_path / "checkpoints/step_00000020.pt")
    assert last["fingerprints"]["train"] == {"points": "z"}


@pytest.mark.parametrize(("data", "recognised"), [(Labelled, True), (Line, False)])
def test_a_moved_folder_is_no_change_where_the_contents_can_be_compared(tmp_path, data, recognised):
    def at(root):
        toy = run(tmp_path, data=data())
        toy.config = {"seed": 0, "data": {"root": root, "train_count": 22}}
        return toy

    def fit_at(root, resume):
        with Log(tmp_path, main=True) as log:
            return trainer().fit(at(root), log, on=CPU, resume=resume)

    fit_at("here", resume=False)
    if not recognised:
        with pytest.raises(UserError, match=r"data\.root was here and is there"):
            fit_at("there", resume=True)
        return
    fit_at("there", resume=True)
    output = (tmp_path / "train.log").read_text()
    assert "data      the same as before, elsewhere: data.root was here and is there" in output
    assert "allowed changes" not in output


def test_weights_of_another_shape_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    toy = run(tmp_path)
    toy.model[0] = nn.Linear(1, 8)
    with (
        Log(tmp_path, main=True) as log,
        pytest.raises(UserError, match=r"another model: 0\.weight is \(16, 1\) in the file"),
    ):
        trainer().fit(toy, log, on=CPU, resume=True)


def test_a_missing_best_checkpoint_is_warned_of_and_another_is_tested(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 20, {"eval_every": 2}, lr=0.5)
    best = checkpoint.load(tmp_path / "checkpoints/best.pt")["step"]
    assert best < 18, "the seed should make an early step the best"
    (tmp_path / "checkpoints/best.pt").unlink()
    fit(tmp_path, keys={"eval_every": 20}, lr=0.5, resume=True)
    assert f"The best checkpoint on val, of step {best}, is missing" in (tmp_path / "train.log").read_text()


def test_a_new_start_drops_the_log_of_a_failed_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "train/loss": 9.0}\n')
    fit(tmp_path)
    assert [line["step"] for line in lines(tmp_path) if "train/loss" in line] == [4, 8, 12, 16, 20]


@pytest.mark.parametrize("difference", ["seed", "weights"])
def test_the_checkpoint_of_another_run_is_skipped_and_the_one_before_it_is_used(tmp_path, difference):
    fit(tmp_path / "expected")
    with pytest.raises(Stopped):
        stop_at(tmp_path / "run", 15, {})
    file = tmp_path / "run/checkpoints/step_00000015.pt"
    content = checkpoint.load(file)
    if difference == "seed":
        content["config"] = {"seed": 7}
    else:
        content["model"] = {name: tensor[:1] for name, tensor in content["model"].items()}
    file.unlink()
    checkpoint.save(file, content)
    fit(tmp_path / "run", resume=True)
    log, renamed = (tmp_path / "run/train.log").read_text(), file.with_name("other_run_step_00000015.pt")
    assert f"{file}" in log and "Resuming from step_00000010.pt instead." in log
    assert f"The checkpoint of another run is now {renamed}." in log and renamed.exists()
    assert lines(tmp_path / "run") == lines(tmp_path / "expected")


@pytest.mark.parametrize("difference", ["step", "weights"])
def test_a_best_checkpoint_of_another_run_is_not_tested(tmp_path, difference):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 20, {"eval_every": 2}, lr=0.5)
    best = tmp_path / "checkpoints/best.pt"
    content = checkpoint.load(best)
    best.unlink()
    model = {name: tensor[:1] for name, tensor in content["model"].items()}
    checkpoint.save(best, {**content, **({"step": 77} if difference == "step" else {"model": model})})
    fit(tmp_path, keys={"eval_every": 20}, lr=0.5, resume=True)
    log = (tmp_path / "train.log").read_text()
    assert f"{best} {'is of step 77' if difference == 'step' else 'holds the weights of another model'}" in log
    assert "Using the last checkpoint instead." in log and "step_00000020.pt: step 20, raw" in log


@pytest.mark.parametrize("state", [{}, {"0.weight": {}}])
def test_an_optimizer_state_of_nothing_is_refused(tmp_path, state):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    file = tmp_path / "checkpoints/step_00000005.pt"
    checkpoint.save(file, {**checkpoint.load(file), "optimizer": state})
    with pytest.raises(UserError, match=r"step_00000005.pt holds an optimizer state without .*checkpoint="):
        fit(tmp_path, resume=True)


def test_optimizer_moments_that_are_no_floats_are_refused(tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    file = tmp_path / "checkpoints/step_00000005.pt"
    content = checkpoint.load(file)
    for values in content["optimizer"].values():
        values["exp_avg"] = values["exp_avg"].long()
    checkpoint.save(file, content)
    with pytest.raises(UserError, match=r"step_00000005.pt holds exp_avg of .* as int64, expected floats"):
        fit(tmp_path, resume=True)


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(0), torch.zeros((), dtype=torch.complex64)], ids=str)
def test_sums_of_the_loss_that_are_no_numbers_are_refused(tmp_path, value):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    file = tmp_path / "checkpoints/step_00000005.pt"
    checkpoint.save(file, {**checkpoint.load(file), "windows": [{"loss": value}]})
    with pytest.raises(UserError, match=r"step_00000005.pt cannot be resumed from: windows.loss is a tensor of .*; st"):
        fit(tmp_path, resume=True)


@pytest.mark.parametrize("step", [0, 7, 10**6])
def test_a_checkpoint_whose_step_is_not_that_of_its_name_is_refused(tmp_path, step):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    file = tmp_path / "checkpoints/step_00000005.pt"
    checkpoint.save(file, {**checkpoint.load(file), "step": step})
    with pytest.raises(UserError, match=rf"step_00000005.pt holds step {step}, which its name denies"):
        fit(tmp_path, resume=True)


ALTERED_VALUES = ("deleted", None, 5, "text", [], {}, math.nan)


@pytest.mark.parametrize("value", ALTERED_VALUES)
def test_a_checkpoint_with_any_field_altered_is_resumed_or_skipped_in_one_sentence(value, tmp_path):
    with pytest.raises(Stopped):
        stop_at(tmp_path, 5, {})
    (file,) = (tmp_path / "checkpoints").glob("st*_*.pt")
    content, metrics = checkpoint.load(file), (tmp_path / "metrics.jsonl").read_text()
    places = [(content, name) for name in content if name not in ("format", "config")]
    places += [(content["optimizer"], "0.weight"), (content["optimizer"]["0.weight"], "exp_avg")]
    refused = 0
    for part, name in places:
        before = dict(part)
        part[name] = value
        if value == "deleted":
            del part[name]
        checkpoint.save(file, content)
        part.update(before)
        try:
            fit(tmp_path, resume=True, keys={"steps": 6})
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refused += 1
        (tmp_path / "metrics.jsonl").write_text(metrics)
        for later in (tmp_path / "checkpoints").glob("*.pt"):
            later.unlink()
    assert refused > len(places) / 3
