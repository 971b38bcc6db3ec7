"""Calibrate a checkpoint for int8 and compare its metrics on val with those in fp32 (common/nn/quantisation.py)."""

from typing import Any

from common.files import checkpoint
from common.files.table import table
from common.nn import int8, quantisation
from common.train import calibration, imported
from common.train.assembly import Components
from scripts.compressing.measuring import batch_size, evaluate

Ranges = dict[str, tuple[float, float]]


def calibrate(parts: Components) -> Ranges:
    """Measure the ranges of the tensors of a restored model on val."""
    return calibration.calibrate(parts.task, parts.data, parts.model, device=parts.device, batch_size=batch_size(parts))


def content(parts: Components, config: dict[str, Any], ranges: Ranges) -> dict[str, Any]:
    """The content of the checkpoint that `parts` was restored from, with `ranges` and without the optimizer's state.

    A file of another program becomes one of ours, with the sections of `config`.
    """
    assert parts.file is not None
    stored = checkpoint.load(parts.file)
    if not checkpoint.is_ours(stored):
        stored = imported.content(parts, config)
    return {**{name: value for name, value in stored.items() if name != "optimizer"}, "int8": ranges}


def report(parts: Components, ranges: Ranges) -> str:
    """Quantise the model in place; returns a table of the metrics on val in fp32 and in int8.

    On a machine that cannot compute in int8, the table has fp32 alone, and the text says why.
    """
    columns = {"fp32": evaluate(parts, "val", "fp32")}
    if reason := int8.unsupported():
        title = f"val, without int8: {reason}"
    else:
        title = f"val, {quantisation.quantise(parts.model, ranges)} linear maps and convolutions in int8"
        columns["int8"] = evaluate(parts, "val", "int8")
    rows = [(name, *(numbers[name] for numbers in columns.values())) for name in columns["fp32"]]
    return table(title, [("number", *columns), *rows])
