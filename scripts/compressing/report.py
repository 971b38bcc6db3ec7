"""Compare dense and compressed models on test: quality, size, time, and distance from the dense model's outputs."""

import io
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files.output import create_output, writing_to
from common.files.table import tables
from common.machine import device as devices
from common.machine.seeds import mix
from common.task import Batch, answers_of
from common.train.assembly import Components, restore
from common.train.step import step_normalisers
from scripts.compressing.finetuning import evaluation_config, without_teacher
from scripts.compressing.measuring import evaluate
from scripts.compressing.options import FILE

BATCHES = (1, 32)  # samples whose answers are timed together
ROUNDS = 12  # in each, every model is timed once
WIDTH = 120
COMPARED = 64  # samples of test whose outputs are compared


class Variant(NamedTuple):
    """A model in one precision."""

    name: str
    parts: Components
    precision: str
    bytes: int
    parameters: int
    nonzero: int


class Row(NamedTuple):
    """What was measured of a variant."""

    name: str
    precision: str
    metric: str  # the name of the goal, such as AP
    quality: float  # its value on test; for the dense model, the mean over its runs
    spread: float | None  # the sample standard deviation over the runs of the dense model; None with fewer than two
    runs: int
    bytes: int  # of a checkpoint that holds the weights alone
    parameters: int
    nonzero: int
    milliseconds: dict[int, float]  # size of the batch -> median CPU time of one batch
    difference: float  # of the outputs from those of the dense model, relative to their spread


def measure(dense: Sequence[Path], files: Sequence[Path], precisions: Sequence[str], overrides: list[str]) -> list[Row]:
    """Measure the first dense model and all other files in each precision.

    `dense` are the checkpoints of the dense model with different seeds, whose qualities give the spread. With an empty
    `precisions`, a model has the precision of its config. Raises UserError if the models are of different tasks, or if
    the data have no test.
    """
    variants = [
        variant
        for name, file in [("dense", dense[0]), *((_name(file), file) for file in files)]
        for variant in _load(name, file, precisions, overrides)
    ]
    _refuse_other_tasks(variants)
    seeds = {
        precision: _qualities(dense[1:], precision, overrides)
        for precision in {variant.precision: None for variant in variants}
    }
    times = _times(variants)
    reference = _outputs(variants[0])
    rows = []
    for number, variant in enumerate(variants):
        qualities = [_quality(variant), *(seeds[variant.precision] if variant.name == "dense" else [])]
        rows.append(
            Row(
                variant.name,
                variant.precision,
                variant.parts.task.goal.name,
                statistics.fmean(qualities),
                statistics.stdev(qualities) if len(qualities) > 1 else None,
                len(qualities),
                variant.bytes,
                variant.parameters,
                variant.nonzero,
                times[number],
                _difference(_outputs(variant), reference),
            )
        )
    return rows


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters, and of those that are not zero; a shared one counts once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(int(p.count_nonzero()) for p in parameters)


def show(rows: list[Row]) -> str:
    """Format the rows as a table for the console."""
    return tables("report on test", _cells(rows), WIDTH)


def write(rows: list[Row], folder: Path) -> None:
    """Write report.md and report.json into `folder`."""
    create_output(folder)
    header, *cells = _cells(rows)
    lines = [header, ["---"] * len(header), *cells]
    with writing_to(folder):
        (folder / "report.md").write_text(
            "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines), encoding="utf-8"
        )
        record = [row._asdict() | {"quality": None if math.isnan(row.quality) else row.quality} for row in rows]
        (folder / "report.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _cells(rows: list[Row]) -> list[list[str]]:
    sizes = [f"ms, batch {size}" for size in rows[0].milliseconds]
    header = [
        "model",
        "precision",
        f"test/{rows[0].metric}",
        "against dense",
        "MB",
        "parameters",
        "not zero",
        *sizes,
        "difference",
    ]
    dense = {row.precision: row for row in rows if row.name == "dense"}
    return [header, *(_line(row, dense[row.precision]) for row in rows)]


def _line(row: Row, dense: Row) -> list[str]:
    spread = "" if row.spread is None else f" ± {row.spread:.4f} ({row.runs} runs)"
    return [
        row.name,
        row.precision,
        f"{row.quality:.4f}{spread}",
        "" if row is dense else f"{row.quality - dense.quality:+.4f}",
        f"{row.bytes / 1e6:.2f}",
        f"{row.parameters:,}",
        f"{row.nonzero:,}",
        *(f"{value:.2f}" for value in row.milliseconds.values()),
        f"{row.difference:.2g}",
    ]


def _load(name: str, file: Path, precisions: Sequence[str], overrides: list[str]) -> Iterator[Variant]:
    """Load a checkpoint in each precision."""
    for precision in precisions or (None,):
        words = [*overrides, *([] if precision is None else [f"trainer.precision={precision}"])]
        config = without_teacher(evaluation_config(file, words))
        stored = restore({**config, "trainer": {**config["trainer"], "precision": "fp32"}}).model
        parts = restore(config)  # in int8, the model has other parameters than the file
        yield Variant(name, parts, parts.trainer.precision, _file_size(stored), *count_parameters(stored))


def _name(file: Path) -> str:
    """A short name: the folder of a FILE, and of other files the name and its folder."""
    return file.parent.name if file.name == FILE else f"{file.parent.name}/{file.name}"


def _refuse_other_tasks(variants: list[Variant]) -> None:
    first = variants[0].parts
    if not first.data.count("test"):
        raise UserError("The data have no test, on which the report compares models; give data with a test split.")
    for variant in variants:
        if variant.parts.task.state() != first.task.state() or type(variant.parts.task) is not type(first.task):
            raise UserError(
                f"{variant.name} is of another task, or has other classes or tokens than the first checkpoint; give "
                "variants of that one."
            )


def _qualities(files: Sequence[Path], precision: str, overrides: list[str]) -> list[float]:
    return [_quality(variant) for file in files for variant in _load("dense", file, [precision], overrides)]


def _quality(variant: Variant) -> float:
    """The goal's value on test."""
    numbers = evaluate(variant.parts, "test", variant.precision)
    return float(numbers.get(variant.parts.task.goal.name, math.nan))


def _file_size(model: nn.Module) -> int:
    """The bytes of a file with the model's weights."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def _batch(parts: Components, count: int) -> Batch:
    """A batch of the first `count` samples of test, on the model's device."""
    count = min(count, parts.data.count("test"))
    batch = parts.data.collate([parts.data.sample("test", index, None) for index in range(count)])
    return devices.to_device(batch | {"seeds": [mix(0, "task", 0, id) for id in batch["ids"]]}, parts.device)


@torch.no_grad()
def _times(variants: list[Variant]) -> list[dict[int, float]]:
    """The median CPU time of the answers to one batch, in milliseconds, for each variant and size of the batch.

    In each round, all variants are timed one after the other, so that a change of the machine's speed affects all.
    """
    batches = [{size: _batch(variant.parts, size) for size in BATCHES} for variant in variants]
    seconds: list[dict[int, list[float]]] = [{size: [] for size in BATCHES} for _ in variants]
    for number in range(ROUNDS + 1):
        for variant, of_variant, measured in zip(variants, batches, seconds, strict=True):
            for size, batch in of_variant.items():
                start = time.process_time()
                with devices.autocast(variant.parts.device, variant.precision):
                    answers_of(variant.parts.task, variant.parts.model, batch)
                if number:  # the first round packs weights and fills caches
                    measured[size].append(time.process_time() - start)
    return [{size: 1000 * statistics.median(values) for size, values in measured.items()} for measured in seconds]


@torch.no_grad()
def _outputs(variant: Variant) -> list[Tensor]:
    """The floating-point outputs of the model on samples of test, in the loss (with the targets of a translator)."""
    parts, tensors = variant.parts, list[Tensor]()
    batch = _batch(parts, COMPARED)
    with _recording(parts.model, tensors), devices.autocast(parts.device, variant.precision):
        parts.task.loss(parts.model, batch, step_normalisers(parts.task, [batch]))
    return tensors


@contextmanager
def _recording(model: nn.Module, tensors: list[Tensor]) -> Iterator[None]:
    handle = model.register_forward_hook(lambda module, inputs, output: tensors.extend(_floats(output)))
    try:
        yield
    finally:
        handle.remove()


def _floats(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested lists, tuples and dicts."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output.detach().double().cpu()
    elif isinstance(output, dict | list | tuple):
        for item in output.values() if isinstance(output, dict) else output:
            yield from _floats(item)


def _difference(outputs: list[Tensor], reference: list[Tensor]) -> float:
    """The largest root-mean-square difference of an output from the reference, divided by the reference's spread.

    The spread is the standard deviation over all elements.
    """
    return max(
        float((x - y).square().mean().sqrt() / y.std().clamp(min=1e-12))
        for x, y in zip(outputs, reference, strict=True)
    )
