"""Compression from the command line: what is removed, the files, fine-tuning, the report, and the refusals."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from common.config.check import build, build_model
from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.nn import compressed
from common.nn import int8 as int8_kernels
from common.train import assembly
from common.train.sparsity import prunable_weights
from scripts import compress, export
from scripts.compressing import finetuning, low_rank, pruning, report
from scripts.compressing.measuring import Measure
from scripts.compressing.options import read_options

Printed = pytest.CaptureFixture[str]
CPU = ["trainer.device=cpu", "trainer.precision=fp32", "trainer.log=[]", "trainer.workers=0"]
SMALL = {
    "vit": ["model.width=16", "model.heads=4", "model.feedforward=24", "model.layers=2", "schedule.warmup=1"],
    "detr": [
        *("model.width=16", "model.heads=4", "model.feedforward=24", "model.queries=5", "model.encoder_layers=1"),
        *("model.decoder_layers=2", "data.train_count=6", "data.val_count=4", "data.test_count=3"),
    ],
    "seq2seq": [
        *("model.width=16", "model.heads=4", "model.feedforward=24", "model.encoder_layers=1"),
        *("model.decoder_layers=2", "data=parallel_text", "data.tokenizer.pieces=bytes"),
        *("data.tokenizer.vocabulary=275", "data.val_count=8", "data.test_count=8", "task.predict.longest_extra=4"),
        *("task.predict.method=greedy", "task.predict.longest_factor=1"),
    ],
}
WINGS = [*SMALL]


def save_checkpoint(file: Path, wing: str, folder: Path, seed: int = 0, train: int = 0) -> Path:
    """Write a checkpoint of a small model with random weights, trained for `train` steps."""
    root = {"detr": [f"data.root={folder}"], "seq2seq": [f"data.train.pairs={folder / 'pairs.tsv'}"]}.get(wing, [])
    if wing == "seq2seq":
        (folder / "pairs.tsv").write_text("".join(f"zero one {i}\tnull eins {i}\n" for i in range(60)))
    config = configure("train", [f"model={wing}", *SMALL[wing], *CPU, *root])
    data = build(config["data"])
    task = build(config["task"], data=data)
    torch.manual_seed(seed)
    model = build_model(config["model"], task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    if train:
        _train(model, task, data, train)
    content = {"step": 3, "model": dict(model.state_dict()), "average": None, "task": task.state(), "config": config}
    checkpoint.save(file, content)
    return file


def _train(model: nn.Module, task: Any, data: Any, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = data.collate([data.sample("train", (step * 64 + i) % data.count("train"), None) for i in range(64)])
        loss, _ = task.loss(model, batch, task.normalisers(batch))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a wing and a seed to its checkpoint, which is written once."""
    files: dict[Any, Path] = {}

    def save(wing: str, seed: int = 0) -> Path:
        if (wing, seed) not in files:
            folder = tmp_path_factory.mktemp(f"{wing}{seed}")
            train = 120 if wing == "vit" else 0
            files[wing, seed] = save_checkpoint(folder / "dense.pt", wing, folder, seed, train)
        return files[wing, seed]

    return save


def load(file: Path) -> assembly.Components:
    return assembly.restore(configure("evaluate", [f"checkpoint={file}"], assembly.stored_config))


def run(*arguments: Any, code: int = 0) -> None:
    assert compress.main([*map(str, arguments)]) == code


# What is removed.


def test_a_harmful_head_is_removed_first_and_the_loss_is_measured_without_it(saved: Callable[..., Path]) -> None:
    parts = load(saved("vit"))
    measure = Measure(parts, 100)
    attention = compressed.attentions(parts.model)["encoder.blocks.1.attention"]
    with torch.no_grad():
        attention.out_proj.weight[:, 8:12].normal_(std=3, generator=generator("harmful"))  # head 2
    scores = pruning.head_losses(parts.model, measure)
    with_it, rows = measure(parts.model), attention.in_proj.weight.detach().clone()
    assert len(scores) == 8 and min(scores, key=lambda part: scores[part]) == ("encoder.blocks.1.attention", 2)
    assert scores["encoder.blocks.1.attention", 2] < with_it - 0.1
    assert pruning.remove_heads(parts.model, measure, 1 / 8) == {"encoder.blocks.1.attention": 3}
    assert torch.equal(attention.in_proj.weight, torch.cat([torch.cat([r[:8], r[12:]]) for r in rows.chunk(3)]))
    assert measure(parts.model) == pytest.approx(scores["encoder.blocks.1.attention", 2], abs=1e-5)


def test_the_score_of_a_neuron_is_half_the_sum_of_its_squared_gradients(saved: Callable[..., Path]) -> None:
    """Against one backward pass for each sample, with a gate that multiplies the rows of the first map's output."""
    parts = load(saved("vit"))
    measure = Measure(parts, 5)
    scores = pruning.neuron_scores(parts.model, measure)
    assert all(parameter.requires_grad for parameter in parts.model.parameters())
    (batch,) = measure.batches
    feed_forward: Any = compressed.feed_forwards(parts.model)["encoder.blocks.0.feed_forward"]
    expected = torch.zeros(24)
    for i in range(5):
        sample = {key: value[i : i + 1] if len(value) == 5 else value for key, value in batch.items()}
        gate = torch.ones(24, requires_grad=True)
        handle = feed_forward.activation.register_forward_hook(lambda module, inputs, output, gate=gate: output * gate)
        loss, _ = parts.task.loss(parts.model, sample, measure.normalisers)
        (gradient,) = torch.autograd.grad(loss, gate)
        expected += gradient.square() / 2
        handle.remove()
    computed = torch.tensor([scores["encoder.blocks.0.feed_forward", i] for i in range(24)])
    torch.testing.assert_close(computed, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("measured", [False, True], ids=["estimate", "loss"])
def test_neurons_without_effect_are_removed_first(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    monkeypatch.setattr(pruning, "GROUP", 3)
    parts = load(saved("vit"))
    measure = Measure(parts, 60)
    feed_forward: Any = compressed.feed_forwards(parts.model)["encoder.blocks.1.feed_forward"]
    with torch.no_grad():
        feed_forward.contract.weight[:, [3, 5, 20]] = 0
    before = measure(parts.model)
    if measured:
        scores = pruning.group_losses(parts.model, measure, pruning.neuron_scores(parts.model, measure))
        without = {index for (name, index), score in scores.items() if score == 0}
        assert without == {3, 5, 20}, "a group without effect has exactly the loss of the dense model"
        return
    assert pruning.remove_neurons(parts.model, measure, 3 / 48) == {"encoder.blocks.1.feed_forward": 21}
    assert measure(parts.model) == pytest.approx(before, abs=1e-5)


def test_the_measured_score_of_a_group_is_the_loss_without_its_columns(saved: Callable[..., Path]) -> None:
    """Neurons that do harm have a negative score and are removed first, which the estimate does not see."""
    parts = load(saved("vit"))
    measure = Measure(parts, 60)
    feed_forward: Any = compressed.feed_forwards(parts.model)["encoder.blocks.1.feed_forward"]
    with torch.no_grad():
        feed_forward.contract.weight[:, :8].normal_(std=3, generator=generator("harmful neurons"))
    order = {("encoder.blocks.1.feed_forward", i): float(i) for i in range(24)}
    estimates = order | {("encoder.blocks.0.feed_forward", i): float(i) for i in range(24)}
    scores = pruning.group_losses(parts.model, measure, estimates)
    whole = measure(parts.model)
    with torch.no_grad():
        feed_forward.contract.weight[:, :8] = 0
    expected = (measure(parts.model) - whole) / 8
    assert expected < -0.01
    assert [scores["encoder.blocks.1.feed_forward", i] for i in range(8)] == pytest.approx([expected] * 8, abs=1e-6)
    assert len(scores) == 48 and min(scores.values()) == pytest.approx(expected, abs=1e-6)


def test_low_rank_is_exact_for_inputs_of_that_rank_and_else_as_far_as_the_singular_values_say() -> None:
    """With 3 independent inputs, rank 3 is exact, while the plain SVD of the weight is not."""
    rng = generator("low rank")
    weight = torch.randn(6, 8, generator=rng, dtype=torch.float64)
    x = torch.randn(50, 3, generator=rng, dtype=torch.float64) @ torch.randn(3, 8, generator=rng, dtype=torch.float64)
    down, up, _ = low_rank.factors(weight, x.T @ x / 50)
    torch.testing.assert_close(x @ (up[:, :3] @ down[:3]).T, x @ weight.T, rtol=0, atol=1e-3)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    assert (x @ ((u * s)[:, :3] @ vh[:3] - weight).T).abs().max() > 0.1
    x = torch.randn(50, 8, generator=rng, dtype=torch.float64)
    down, up, energies = low_rank.factors(weight, x.T @ x / 50)
    error = (x @ (up[:, :2] @ down[:2] - weight).T).square().sum() / 50
    torch.testing.assert_close(error, energies[2:].sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [4, 0.9])
def test_maps_that_a_rank_does_not_make_smaller_stay_whole(saved: Callable[..., Path], rank: float) -> None:
    parts = load(saved("vit"))
    count = sum(p.numel() for p in parts.model.parameters())
    ranks = low_rank.reduce_rank(parts.model, Measure(parts, 60), rank)
    assert ranks and sum(p.numel() for p in parts.model.parameters()) < count
    assert set(ranks.values()) == {4} if rank == 4 else len(set(ranks.values())) > 1
    whole = compressed.linear_maps(parts.model)
    assert len(whole) + len(ranks) == 8 and not set(whole) & set(ranks)


def test_every_head_neuron_and_linear_map_of_a_wing_is_measured(
    saved: Callable[..., Path],
) -> None:
    for wing, heads, neurons in (("detr", 20, 72), ("seq2seq", 20, 72)):
        parts = load(saved(wing))
        measure = Measure(parts, 8)
        assert len(pruning.head_losses(parts.model, measure)) == heads
        scores = pruning.neuron_scores(parts.model, measure)
        assert len(scores) == neurons and min(scores.values()) >= 0 < max(scores.values())
        assert low_rank.input_moments(parts.model, measure).keys() == compressed.linear_maps(parts.model).keys()


# Files.


def use(inside: Callable[..., str], wing: str, file: Path, folder: Path) -> None:
    """Evaluate, predict and export with a compressed checkpoint, without further options."""
    assert '{"test/' in inside("evaluate", f"checkpoint={file}")
    source = folder / ("text.txt" if wing == "seq2seq" else "picture.png")
    if wing == "seq2seq":
        source.write_text("zero one\n")
    else:
        Image.new("L" if wing == "vit" else "RGB", (8, 8) if wing == "vit" else (64, 64), 90).save(source)
    inside("predict", f"checkpoint={file}", f"input={source}", f"output={folder / 'predictions'}")
    assert export.main([f"checkpoint={file}", "--format", "torch", "--output", str(folder / "export")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("wing", WINGS)
def test_a_compressed_checkpoint_goes_through_evaluate_predict_and_export(
    saved: Callable[..., Path], inside: Callable[..., str], tmp_path: Path, capsys: Printed, wing: str
) -> None:
    """Compressed twice, in both orders, to different numbers of heads in each layer."""
    run(f"checkpoint={saved(wing)}", "prune.heads=0.3", "prune.neurons=0.5", f"output={tmp_path / 'one'}")
    run(f"checkpoint={tmp_path / 'one/compressed.pt'}", "rank=3", f"output={tmp_path / 'two'}")
    run(f"checkpoint={tmp_path / 'two/compressed.pt'}", "prune.heads=0.2", f"output={tmp_path / 'three'}")
    assert f"evaluate  python evaluate.py checkpoint={tmp_path / 'three/compressed.pt'}" in capsys.readouterr().out
    sizes = checkpoint.load(tmp_path / "three/compressed.pt")["config"]["model"]["compressed"]
    assert len(set(sizes["heads"].values())) > 1 and sizes["neurons"] and set(sizes["ranks"].values()) == {3}
    dense, small = (load(file).model for file in (saved(wing), tmp_path / "three/compressed.pt"))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    use(inside, wing, tmp_path / "three/compressed.pt", tmp_path)


def test_fine_tuning_reaches_the_zeros_gradually_and_is_an_ordinary_run(
    saved: Callable[..., Path], inside: Callable[..., str], tmp_path: Path
) -> None:
    keys = ["prune.magnitude=0.5", "prune.heads=0.25", "finetune=8", "distil=soft", "trainer.eval_every=4"]
    run(f"checkpoint={saved('vit')}", *keys, f"output={tmp_path / 'out'}", "trainer.log_every=1", "seed=5")
    parts = load(tmp_path / "out/compressed.pt")
    zeros = [int((weight == 0).sum()) for weight in prunable_weights(parts.model).values()]
    total = sum(weight.numel() for weight in prunable_weights(parts.model).values())
    assert sum(zeros) == pytest.approx(total / 2, abs=total / 100)
    config = checkpoint.load(tmp_path / "out/compressed.pt")["config"]
    assert config["trainer"]["sparsity"] is None and config["model"]["compressed"]["heads"], "the dense model's trainer"
    stored = ["--config-dir", f"{tmp_path / 'out/finetune'}", "--config-name", "config"]
    for name in ("results.json", "checkpoints/step_00000008.pt", "checkpoints/best.pt"):
        (tmp_path / "out/finetune" / name).unlink()
    inside("train", *stored, f"run_dir={tmp_path / 'out/finetune'}", "resume=auto")
    again = checkpoint.load(tmp_path / "out/finetune/checkpoints/best.pt")["config"]
    assert again["trainer"]["sparsity"]["fraction"] == 0.5 and again["seed"] == 5
    assert again["task"]["distillation"] == {
        **{"teacher": str(saved("vit")), "kind": "soft"},
        **{key: config["task"]["distillation"][key] for key in ("weight", "temperature")},
    }


def test_stopped_fine_tuning_is_continued_by_the_hint_of_its_run(
    saved: Callable[..., Path], tmp_path: Path, capsys: Printed
) -> None:
    keys = [f"checkpoint={saved('vit')}", "rank=3", "finetune=8", "distil=soft", f"output={tmp_path / 'out'}"]
    keys += ["trainer.eval_every=4", "trainer.save_every=4"]
    run(*keys)
    file, folder = tmp_path / "out/compressed.pt", tmp_path / "out/finetune"
    assert f"run_dir={folder} resume=auto" in capsys.readouterr().out
    whole = checkpoint.load(file)
    for name in ("results.json", "checkpoints/step_00000008.pt", "checkpoints/best.pt"):  # as if stopped after step 4
        (folder / name).unlink()
    wrong = {name: torch.zeros_like(tensor) for name, tensor in whole["model"].items()}
    checkpoint.save(file, {**whole, "model": wrong})
    assert compress.main(keys) == 2 and "or add resume=auto to continue its fine-tuning" in capsys.readouterr().err
    for other, advice in (("rank=2", "give rank=3"), ("prune.heads=0.5", "leave prune.heads= out")):
        words = [*keys, other] if other.startswith("prune") else [*keys[:1], other, *keys[2:]]
        assert compress.main([*words, "resume=auto"]) == 2 and advice in capsys.readouterr().err
    run(*keys, f"run_dir={folder}", "resume=auto")
    assert "resuming at 4" in capsys.readouterr().out
    torch.testing.assert_close(checkpoint.load(file)["model"], whole["model"], rtol=0, atol=0)


def test_without_fine_tuning_the_smallest_weights_are_zero_at_once(saved: Callable[..., Path], tmp_path: Path) -> None:
    run(f"checkpoint={saved('vit')}", "prune.magnitude=0.5", f"output={tmp_path / 'out'}")
    dense, sparse = (prunable_weights(load(file).model) for file in (saved("vit"), tmp_path / "out/compressed.pt"))
    kept = torch.cat([dense[name][sparse[name] != 0].abs() for name in dense])
    removed = torch.cat([dense[name][sparse[name] == 0].abs() for name in dense])
    assert len(removed) == pytest.approx(len(kept), abs=2) and removed.quantile(0.99) <= kept.quantile(0.01)
    assert "compressed" not in checkpoint.load(tmp_path / "out/compressed.pt")["config"]["model"]


# The report.


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROUNDS", 2)


@pytest.mark.usefixtures("few_rounds")
@pytest.mark.parametrize("wing", ["vit", *(pytest.param(wing, marks=pytest.mark.slow) for wing in ("detr", "seq2seq"))])
def test_the_report_has_a_row_for_each_model_and_precision(
    saved: Callable[..., Path], tmp_path: Path, capsys: Printed, wing: str
) -> None:
    dense = f"checkpoint={saved(wing)}" + (f",{saved(wing, 1)}" if wing == "vit" else "")
    keys = [dense, "prune.neurons=0.5", f"output={tmp_path / 'half'}", f"variants={saved(wing)}"]
    run(*keys, "precisions=fp32,bf16", "--report")
    rows = json.loads((tmp_path / "half/report.json").read_text())
    assert [(row["name"], row["precision"]) for row in rows] == [
        (name, precision)
        for name in ("dense", f"{saved(wing).parent.name}/dense.pt", "half")
        for precision in ("fp32", "bf16")
    ]
    first, rounded, same, _, half, _ = rows
    assert all(row["metric"] == {"vit": "top1", "detr": "AP", "seq2seq": "bleu"}[wing] for row in rows)
    assert first["difference"] == same["difference"] == 0 < min(rounded["difference"], half["difference"])
    assert half["parameters"] < same["parameters"] == first["parameters"] and half["bytes"] < same["bytes"]
    assert half["milliseconds"].keys() == {"1", "32"} and min(half["milliseconds"].values()) > 0
    assert (first["spread"] is None) == (wing != "vit") and first["runs"] == 1 + (wing == "vit")
    lines = (tmp_path / "half/report.md").read_text().splitlines()
    assert len(lines) == 8 and all(line.count("|") == 11 for line in lines)
    assert "report on test" in capsys.readouterr().out


@pytest.mark.usefixtures("few_rounds")
def test_the_quality_of_the_dense_model_is_the_mean_over_its_seeds(saved: Callable[..., Path], tmp_path: Path) -> None:
    run(f"checkpoint={saved('vit')},{saved('vit', 1)}", "--report", f"output={tmp_path / 'both'}")
    values = []
    for seed in (0, 1):
        run(f"checkpoint={saved('vit', seed)}", "--report", f"output={tmp_path / str(seed)}")
        values.append(json.loads((tmp_path / f"{seed}/report.json").read_text())[0]["quality"])
    (row,) = json.loads((tmp_path / "both/report.json").read_text())
    assert row["quality"] == pytest.approx(sum(values) / 2) and values[0] > 0.3
    assert row["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


# Mistakes.


REFUSED = [
    (["prune.heads=0.9"], "prune.heads=0.9 leaves 1 of 8 heads, but each of the 2 modules .* give at most 0.75"),
    (["prune.heads=1.5"], "prune.heads=1.5: expected a fraction above 0 and below 1"),
    (["prune.heads=0.01"], "prune.heads=0.01 removes none of 8 heads; give at least 0.1"),
    (["prune.neurons=0.99"], "prune.neurons=0.99 leaves 0 of 48 neurons"),
    (["prune.head=0.5"], "prune.head is not a key of compress.py; did you mean prune.heads"),
    (["prune.magnitude=0.97"], "each matrix has at most 0.95 zeros"),
    (["rank=16"], "rank=16 saves nothing: for all 8 linear maps in blocks of Classifier"),
    (["rank=0"], "rank=0: expected a whole number from 1, or a fraction"),
    (["rank=4", "samples=0"], "samples=0: expected a whole number from 1"),
    (["rank=4", "distil=soft"], "distil=soft is for fine-tuning; give finetune=STEPS"),
    (["rank=4", "finetune=2", "distil=all"], "distil=all: expected soft, hard or sequence"),
    (["distil=sequence"], "distil=sequence: Digits has no key data.distilled"),
    (["quantize=int8", "distil=sequence"], "distil= needs a key that makes the model smaller"),
    (["rank=4", "distil=sequence"], "distil=sequence is for fine-tuning; give finetune=STEPS"),
    (["prune.neurons=0.5", "prune.ranking=gradient"], "prune.ranking=gradient: expected estimate or loss"),
    (["rank=4", "prune.ranking=loss"], "prune.ranking=loss ranks neurons; give prune.neurons="),
    (["rank=4", "resume=auto"], "resume=auto continues fine-tuning; give finetune="),
    (["rank=4", "resume=always"], "resume=always: expected resume=auto"),
    (["rank=4", "finetune=2", "run_dir=elsewhere"], "run_dir=elsewhere: fine-tuning runs in .*; choose it by output="),
    (["finetune=2"], "finetune= needs a key that makes the model smaller"),
    (["quantize=int4"], "quantize=int4"),
    ([], "needs a key that makes the model smaller .*quantize=int8, or --report"),
    (["rank=4", "variants=x.pt"], "are for the report; add --report"),
    (["rank=4", "optimizer.lrr=3"], "optimizer.lrr is not a key"),
    (["prune.heads=0.25", "trainer.precision=int8"], "models are compressed in fp32; add quantize=int8"),
    (["quantize=int8", "--report"], "output= is the calibrated file, so there is no folder for --report"),
    (["rank=2", "quantize=int8"], "has nothing to compute in int8: .* product of two"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED)
def test_mistakes_end_in_one_sentence(
    saved: Callable[..., Path], tmp_path: Path, capsys: Printed, keys: list[str], message: str
) -> None:
    output = [] if any(key.startswith("variants") for key in keys) else [f"output={tmp_path / 'out'}"]
    run(f"checkpoint={saved('vit')}", *keys, *output, code=2)
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and error.endswith((".\n", "?\n"))
    assert not (tmp_path / "out/compressed.pt").exists()


def test_a_model_without_attention_has_no_heads_to_remove(tmp_path: Path, capsys: Printed) -> None:
    config = configure("train", ["model=cnn", "model.widths=[8,16,24]", *CPU])
    task = build(config["task"], data=build(config["data"]))
    model = build_model(config["model"], task)
    content = {"step": 3, "model": dict(model.state_dict()), "average": None, "task": task.state(), "config": config}
    checkpoint.save(tmp_path / "cnn.pt", content)
    for key, parts in (("prune.heads", "heads"), ("prune.neurons", "neurons")):
        run(f"checkpoint={tmp_path / 'cnn.pt'}", f"{key}=0.5", f"output={tmp_path / key}", code=2)
        assert f"{key}=0.5: ResNet has no {parts} that can be removed; leave it out." in capsys.readouterr().err


@pytest.mark.slow
def test_a_compressed_detector_learns_from_the_dense_one(saved: Callable[..., Path], tmp_path: Path) -> None:
    keys = ["rank=3", "finetune=2", "distil=soft", "task.distillation.min_score=0.1", "trainer.log_every=1"]
    run(f"checkpoint={saved('detr')}", *keys, f"output={tmp_path / 'out'}", "data.batch_size=4")
    lines = (tmp_path / "out/finetune/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["train/teacher"] > 0
    distillation = checkpoint.load(tmp_path / "out/finetune/checkpoints/best.pt")["config"]["task"]["distillation"]
    assert distillation["teacher"] == str(saved("detr")) and distillation["kind"] == "soft"


def test_a_lane_detector_does_not_learn_from_a_teacher(tmp_path: Path) -> None:
    config = configure("train", ["model=lanes", *CPU])
    options = read_options([f"checkpoint={tmp_path}", "rank=3", "finetune=2", "distil=soft"], False)
    with pytest.raises(UserError, match=r"LaneShapes does not learn from a teacher's outputs; leave it out\.$"):
        finetuning.refuse_mistakes(options, config)


# Sequence-level distillation.


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A translator that is trained until its translations end."""
    folder = tmp_path_factory.mktemp("translator")
    return save_checkpoint(folder / "dense.pt", "seq2seq", folder, train=80)


def test_translations_of_train_are_written_with_their_origin_and_reused(
    translator: Path, tmp_path: Path, capsys: Printed
) -> None:
    """Each line is a source of train and the text that the task answers; answers at the limit are left out."""
    keys = [f"checkpoint={translator}", "distil=sequence", f"output={tmp_path / 'out'}", "task.predict.beam=2"]
    keys += ["task.predict.method=beam", "task.predict.longest_factor=0.5", "task.predict.longest_extra=12"]
    run(*keys)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "out/distilled.json").read_text())
    lines = (tmp_path / "out/distilled.tsv").read_text().splitlines()
    parts = load(translator)
    parts.task.options = dataclasses.replace(
        parts.task.options, method="beam", beam=2, longest_factor=0.5, longest_extra=12
    )
    expected, sources = [], [source for source, _ in parts.data.pairs("train")]
    for source in sources:
        (answer,) = parts.task.answers(parts.model, parts.data.collate([parts.data.view(source)]))
        limit = int(0.5 * len(parts.data.view(source)["source"])) + 12
        if len(answer["tokens"]) + 1 < limit and answer["text"].strip():
            expected.append(f"{source}\t{' '.join(answer['text'].replace(chr(9), ' ').splitlines())}")
    assert lines == expected and 0 < len(lines)
    assert record["pairs"] == len(lines) and record["pairs"] + record["left_out"] == len(sources) == 44
    assert record["origin"]["decoding"]["beam"] == 2 and len(record["origin"]["teacher"]) == 32
    assert record["against_train"].keys() >= {"bleu", "chrf"} and "data.distilled=" in printed

    before = (tmp_path / "out/distilled.tsv").stat().st_mtime_ns
    run(*keys)
    assert "reused" in capsys.readouterr().out and (tmp_path / "out/distilled.tsv").stat().st_mtime_ns == before
    run(*keys, "task.predict.beam=3", code=2)
    assert "other decoding options or of other sources; name another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compressed_translator_trains_on_the_translations_of_the_dense_one_and_resumes(
    translator: Path, inside: Callable[..., str], tmp_path: Path
) -> None:
    keys = ["rank=3", "finetune=4", "distil=sequence", "task.predict.longest_factor=2", "task.predict.longest_extra=30"]
    run(f"checkpoint={translator}", *keys, f"output={tmp_path / 'out'}", "trainer.eval_every=2")
    folder, file = tmp_path / "out/finetune", tmp_path / "out/distilled.tsv"
    best = checkpoint.load(folder / "checkpoints/best.pt")
    assert best["config"]["data"]["distilled"] == str(file) and best["task"] == checkpoint.load(translator)["task"]
    assert checkpoint.load(tmp_path / "out/compressed.pt")["config"]["data"]["distilled"] is None
    for name in ("results.json", "checkpoints/step_00000004.pt", "checkpoints/best.pt"):
        (folder / name).unlink()
    moved = file.rename(tmp_path / "moved.tsv")
    stored = ["--config-dir", f"{folder}", "--config-name", "config", f"data.distilled={moved}"]
    inside("train", *stored, f"run_dir={folder}", "resume=auto")
    moved.unlink()
    assert '{"test/' in inside("evaluate", f"checkpoint={folder / 'checkpoints/best.pt'}"), "needs no file of train"


def test_an_earlier_result_is_not_overwritten(saved: Callable[..., Path], tmp_path: Path, capsys: Printed) -> None:
    keys = [f"checkpoint={saved('vit')}", "rank=4", f"output={tmp_path / 'out'}"]
    run(*keys)
    before = (tmp_path / "out/compressed.pt").read_bytes()
    capsys.readouterr()
    run(*keys, code=2)
    assert "already holds compressed.pt; name another folder." in capsys.readouterr().err
    assert (tmp_path / "out/compressed.pt").read_bytes() == before


def test_a_calibrated_file_replaces_no_other(saved: Callable[..., Path], capsys: Printed) -> None:
    file = saved("vit")
    before = file.read_bytes()
    run(f"checkpoint={file}", "quantize=int8", f"output={file}", code=2)
    assert "exists already; name another file." in capsys.readouterr().err and file.read_bytes() == before


def test_a_factored_model_is_not_factored_again(saved: Callable[..., Path], tmp_path: Path, capsys: Printed) -> None:
    run(f"checkpoint={saved('vit')}", "rank=2", f"output={tmp_path / 'out'}")
    run(f"checkpoint={tmp_path / 'out/compressed.pt'}", "rank=1", f"output={tmp_path / 'again'}", code=2)
    assert "that are not factored already" in capsys.readouterr().err


def test_fine_tuning_that_fills_zeros_is_announced(saved: Callable[..., Path], tmp_path: Path, capsys: Printed) -> None:
    run(f"checkpoint={saved('vit')}", "prune.magnitude=0.5", f"output={tmp_path / 'sparse'}")
    sparse = f"checkpoint={tmp_path / 'sparse/compressed.pt'}"
    assert "fills them" not in capsys.readouterr().out
    run(sparse, "prune.heads=0.25", "finetune=1", f"output={tmp_path / 'filled'}")
    assert "50% of the blocks' weights are zero, and fine-tuning fills them; add prune.magnitude=0.5" in (
        capsys.readouterr().out
    )


def test_a_path_with_a_comma_is_one_file(tmp_path: Path) -> None:
    file = tmp_path / "a,b.pt"
    file.touch()
    assert read_options([f"checkpoint={file}", "rank=3"], False).checkpoints == [file]
    with pytest.raises(UserError, match="several checkpoints"):
        read_options(["checkpoint=a.pt,b.pt", "rank=3"], False)


@pytest.mark.skipif(int8_kernels.unsupported() is not None, reason="this machine cannot compute in int8")
@pytest.mark.usefixtures("few_rounds")
def test_a_compressed_model_is_calibrated_and_compared_in_int8(
    saved: Callable[..., Path], inside: Callable[..., str], tmp_path: Path
) -> None:
    """The maps that stay whole are in int8, and factors are not: with rank=8, two maps of 8 stay whole."""
    dense = tmp_path / "dense.int8.pt"
    run(f"checkpoint={saved('vit')}", "quantize=int8", f"output={dense}")
    keys = ["prune.neurons=0.25", "rank=8", "quantize=int8", f"output={tmp_path / 'small'}"]
    run(f"checkpoint={dense}", *keys, "precisions=fp32,int8", "--report")
    content = checkpoint.load(tmp_path / "small/compressed.pt")
    ranks = content["config"]["model"]["compressed"]["ranks"]
    assert 0 < len(ranks) < 8 and not {name for name in content["int8"] if name in ranks}
    assert len(content["int8"]) == 8 - len(ranks), "in_proj, which has three inputs, is factored"
    assert "are in int8" in inside(
        "evaluate", f"checkpoint={tmp_path / 'small/compressed.pt'}", "trainer.precision=int8"
    )
    rows = json.loads((tmp_path / "small/report.json").read_text())
    assert [row["precision"] for row in rows] == ["fp32", "int8"] * 2
    assert rows[0]["parameters"] == rows[1]["parameters"] and 0 < rows[1]["difference"] < 0.2
