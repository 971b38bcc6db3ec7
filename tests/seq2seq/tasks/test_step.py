"""A step of the translator, with batches counted in padded tokens, is the same however it is split."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from common.config.check import build
from common.config.compose import configure
from common.data.batching import Loader, Order, rank_samples, steps
from common.machine.seeds import generator
from common.task import Batch
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper
from seq2seq.tasks.translation import Translation

SEED = 3
PAIRS = [5, 0, 11, 7, 2, 9, 14, 3]  # indices in train, in the order of a step
MICRO_BATCH_COUNTS = {"1x8": [8], "3+1+4": [3, 1, 4], "8x1": [1] * 8}
NUMBERS = (
    "zero one two three four five six seven eight nine".split(),
    "null eins zwei drei vier fünf sechs sieben acht neun".split(),
)
OPTIMIZER = OptimizerOptions(
    name="adamw",
    lr=1e-3,
    weight_decay=1e-2,
    decay_norms=False,
    betas=(0.9, 0.98),
    eps=1e-8,
    momentum=0.0,
    rates={},
    layer_decay=1.0,
    reference_batch=None,
    scaling="linear",
)
TINY = ["model.width=16", "model.heads=2", "model.feedforward=24", "model.encoder_layers=2", "model.decoder_layers=2"]
TINY_DECODER = ["model.width=16", "model.heads=2", "model.feedforward=24", "model.layers=2"]
RECURRENT = {  # translators with recurrent decoders
    "rnn": ["model.width=16", "model.cell=lstm"],
    "rnn_contextual": ["model.width=12", "model.maxout_width=16"],
    "rnn_bahdanau": ["model.width=12", "model.maxout_width=16", "model.attention_width=8"],
    "rnn_luong": ["model.width=16", "model.layers=2"],
}
kinds = pytest.mark.parametrize("kind", ["joint", "separate", "decoder-only", "bert encoder", *RECURRENT])


def write(folder: Path) -> None:
    """Forty numbers of one to nine digits, digit by digit."""
    rng = generator("numbers", 0)
    rows = [torch.randint(10, (1 + i % 9,), generator=rng).tolist() for i in range(40)]
    lines = ["\t".join(" ".join(names[d] for d in row) for names in NUMBERS) for row in rows]
    (folder / "pairs.tsv").write_text("\n".join(lines), encoding="utf-8")


def config(kind: str, folder: Path) -> dict[str, Any]:
    """A Transformer, pre-norm with all matrices tied, or post-norm with separate ones and a bias; or RECURRENT.

    Or a decoder-only translator, which packs source and target, or one whose encoder is BERT's.
    """
    files = [f"data.train.pairs={folder}/pairs.tsv", "data.val_count=0", "data.test_count=0", "data.batch_size=120"]
    limits = ["data.longest=60", "data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=262"]
    chosen = {
        "decoder-only": ["model=gpt_translator", *TINY_DECODER],
        "bert encoder": ["model=bert_translator", *TINY, "model.blocks.dropout=0"],
        **{name: [f"model={name}", "model.embedding_width=16", *keys] for name, keys in RECURRENT.items()},
    }.get(kind, ["model=seq2seq", *TINY])
    keys = [*chosen, "data=parallel_text", *files, *limits]
    if kind == "separate":
        keys += ["data.tokenizer.joint=false", "data.tokenizer.vocabulary=261", "model.tied=none"]
        keys += ["model.output_bias=true", "model.blocks.pre_norm=false"]
    return configure("train", keys)


def make_task(kind: str, folder: Path) -> Translation:
    sections = config(kind, folder)
    task: Translation = build(sections["task"], data=build(sections["data"]))
    return task


def make_stepper(kind: str, task: Translation, folder: Path, dtype: torch.dtype, clip_norm: float | None) -> Stepper:
    torch.manual_seed(0)
    model: nn.Module = build(config(kind, folder)["model"], **task.model_arguments()).to(dtype)
    return Stepper(task, model, optim.build(model, OPTIMIZER), torch.device("cpu"), "fp32", clip_norm)


def batches(task: Translation, counts: list[int], pairs: list[int] | None = None) -> list[Batch]:
    """Micro-batches of these numbers of pairs, made by the trainer's loader."""
    indices = iter(PAIRS if pairs is None else pairs)
    keys = [(0, tuple(next(indices) for _ in range(count))) for count in counts]
    return [*Loader(task.data, "train", seed=SEED, workers=0, pin=False)(keys)]


def gradient(kind: str, task: Translation, folder: Path, micro_batches: list[Batch]) -> torch.Tensor:
    """The fp32 gradient of a step without clipping, all parameters in one vector."""
    stepper = make_stepper(kind, task, folder, torch.float32, None)
    stepper(micro_batches, 0)
    return torch.cat([p.grad.flatten() for p in stepper.parameters])


def flat_parameters(stepper: Stepper) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in stepper.parameters])


def updated_parameters(kind: str, task: Translation, folder: Path, micro_batches: list[Batch]) -> torch.Tensor:
    """All fp64 parameters after one clipped AdamW step."""
    stepper = make_stepper(kind, task, folder, torch.float64, 0.1)
    stepper(micro_batches, 0)
    return flat_parameters(stepper)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


@kinds
def test_the_step_has_many_lengths_and_a_gradient_for_every_parameter(kind: str, folder: Path) -> None:
    """Otherwise the tests below would show less than their names promise."""
    task = make_task(kind, folder)
    (batch,) = batches(task, MICRO_BATCH_COUNTS["1x8"])
    assert len({*batch["source_lengths"].tolist()}) > 4 and len({*batch["target_lengths"].tolist()}) > 3
    assert task.normalisers(batch) == {"tokens": float((batch["target_out"] != 0).sum())}
    stepper = make_stepper(kind, task, folder, torch.float32, None)
    parts = stepper([batch], 0)
    assert {"loss", "nll"} <= parts.keys() and parts["loss"] != parts["nll"]
    assert all(p.grad is not None and p.grad.norm() > 1e-5 for p in stepper.parameters)


@kinds
@pytest.mark.parametrize("counts", ["3+1+4", "8x1"])
def test_gradients_and_logged_parts_do_not_depend_on_the_micro_batches(kind: str, counts: str, folder: Path) -> None:
    task = make_task(kind, folder)
    whole, pieces = (gradient(kind, task, folder, batches(task, MICRO_BATCH_COUNTS[name])) for name in ("1x8", counts))
    assert (whole - pieces).norm() <= 1e-6 * whole.norm()
    parts = [
        make_stepper(kind, task, folder, torch.float64, None)(batches(task, MICRO_BATCH_COUNTS[name]), 0)
        for name in ("1x8", counts)
    ]
    for name in ("loss", "nll", "gradient_norm"):
        assert float(parts[0][name]) == pytest.approx(float(parts[1][name]), rel=1e-6), name  # sums in fp32


@kinds
@pytest.mark.parametrize("counts", ["3+1+4", "8x1"])
def test_parameters_after_a_clipped_step_do_not_depend_on_the_micro_batches(
    kind: str, counts: str, folder: Path
) -> None:
    task = make_task(kind, folder)
    whole = updated_parameters(kind, task, folder, batches(task, MICRO_BATCH_COUNTS["1x8"]))
    assert (
        updated_parameters(kind, task, folder, batches(task, MICRO_BATCH_COUNTS[counts])) - whole
    ).abs().max() <= 1e-10
    assert (whole - flat_parameters(make_stepper(kind, task, folder, torch.float64, 0.1))).abs().max() > 1e-4, (
        "the step changes parameters"
    )


def test_a_mean_of_means_differs_measurably(folder: Path) -> None:
    """The control: averaging the means of micro-batches is another step, because their token counts differ."""
    task = make_task("joint", folder)
    whole = gradient("joint", task, folder, batches(task, MICRO_BATCH_COUNTS["1x8"]))
    loss, normalisers = task.loss, task.normalisers
    task.loss = lambda m, b, s: loss(m, b, {"tokens": 3 * normalisers(b)["tokens"]})  # type: ignore[method-assign]
    mean_of_means = gradient("joint", task, folder, batches(task, MICRO_BATCH_COUNTS["3+1+4"]))
    assert (mean_of_means - whole).norm() > 1e-2 * whole.norm()


def test_a_bucket_split_by_tokens_is_the_step_of_the_whole_bucket(folder: Path) -> None:
    """Steps of at most 120 padded tokens, in micro-batches of at most 120, 70 and 50."""
    task = make_task("joint", folder)
    order = Order(task.data.cost("train"), batch_size=task.data.batch_size, seed=SEED)

    def all_steps(micro_batch: int | None) -> list[list[Batch]]:
        stop = order.steps(1)
        keys: dict[str, Any] = {"rank": 0, "world": 1, "workers": 0, "pin": False}
        numbered = steps(task.data, order, start=0, stop=stop, micro_batch=micro_batch, **keys)
        return [micro_batches for _, micro_batches in numbered]

    whole = all_steps(None)
    assert sorted(i for step in whole for batch in step for i in batch["ids"]) == [*range(40)]
    for micro_batch in (70, 50):
        pieces = all_steps(micro_batch)
        assert sum(len(step) for step in pieces) > len(pieces) == len(whole)
        for step, micro_batches in zip(whole, pieces, strict=True):
            assert [i for batch in micro_batches for i in batch["ids"]] == step[0]["ids"]
            for batch in micro_batches:
                padded = len(batch["ids"]) * max(batch["source"].shape[1], batch["target_out"].shape[1])
                assert padded <= micro_batch or len(batch["ids"]) == 1
        most = max(range(len(whole)), key=lambda n: len(pieces[n]))
        expected, result = (gradient("joint", task, folder, all_batches[most]) for all_batches in (whole, pieces))
        assert len(pieces[most]) > 1 and (expected - result).norm() <= 1e-6 * expected.norm()


def step_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    for kind in ("joint", "separate"):
        task = make_task(kind, Path(folder))
        for name, counts in {"4+4": ([4], [4]), "3+1 and 4": ([3, 1], [4])}.items():
            micro_batches = batches(task, counts[rank], rank_samples(PAIRS, rank, 2))
            torch.save(updated_parameters(kind, task, Path(folder), micro_batches), f"{folder}/{kind} {name} {rank}.pt")
        # A rank without samples must neither hang nor change the step.
        micro_batches = [batches(task, [8]), [{**batches(task, [1])[0], "dummy": True}]][rank]
        torch.save(updated_parameters(kind, task, Path(folder), micro_batches), f"{folder}/{kind} 8+0 {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_take_the_same_step_as_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    multiprocessing.set_forkserver_preload(["torch.distributed", "tokenizers", "sacrebleu"])
    mp.start_processes(step_on_rank, (str(folder),), nprocs=2, start_method="forkserver")
    for kind in ("joint", "separate"):
        task = make_task(kind, folder)
        whole = updated_parameters(kind, task, folder, batches(task, MICRO_BATCH_COUNTS["1x8"]))
        for name in ("4+4", "3+1 and 4", "8+0"):
            for rank in range(2):
                assert (torch.load(folder / f"{kind} {name} {rank}.pt") - whole).abs().max() <= 1e-10, (kind, name)
