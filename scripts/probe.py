"""Probe each layer of an image GPT by logistic regression: `python scripts/probe.py checkpoint=FILE [--per-class 10]`.

The features of a layer are averaged over the positions of an image (Chen et al. 2020, image GPT, section 2.4). On each
layer's features, and on the raw pixels beside them, a logistic regression is fitted by L-BFGS to the training images,
without augmentation. The strength of its L2 penalty is chosen on val, and the table shows the accuracy on test of the
chosen one. FILE is any checkpoint that evaluate.py accepts. Further keys override the checkpoint's config. The exit
code is 0, or 2 if nothing can be probed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.compose import configure
from common.data import batching
from common.errors import UserError
from common.files.table import table
from common.task import Split
from common.train.assembly import Components, restore, stored_config
from common.types import SPLITS
from vit.evaluation.probe import ProbeResult, few_per_class, fit_probe
from vit.tasks.image_modelling import ImageModelling

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SEED = 0  # of the choice of few training images

Features = dict[str, NDArray[np.float64]]  # name of a layer -> features (n, C)


def main(arguments: Sequence[str] | None = None) -> int:
    """Probe all layers and print a table; returns the exit code."""
    console.guard()
    options, overrides = _options(sys.argv[1:] if arguments is None else list(arguments))
    try:
        parts = restore(configure("evaluate", overrides, stored_config))
        print(parts.weights_line)
        results = probe(parts, options.per_class)
    except UserError as error:
        print(str(error).replace("evaluate.py", "probe.py"), file=sys.stderr)
        return 2
    cells = [[name, f"{r.test:.4f}", f"{r.val:.4f}", f"{r.strength:g}"] for name, r in results.items()]
    print(table("accuracy of linear probes", [["features", "test", "val", "C"], *cells]))
    return 0


def probe(parts: Components, per_class: int | None = None) -> dict[str, ProbeResult]:
    """Probe the raw pixels and all layers: name -> result.

    With `per_class`, the regressions are fitted to at most that many training images of each class. Raises UserError
    for a model without `layer_features`, and for data without val or test.
    """
    if not isinstance(parts.task, ImageModelling) or not hasattr(parts.model, "layer_features"):
        raise UserError(
            f"{type(parts.model).__name__} has no layers of pixels to probe; give a checkpoint of image GPT."
        )
    if missing := [split for split in SPLITS if not parts.data.count(split)]:
        raise UserError(f"The data have no {missing[0]}, and the probes need train, val and test; give data with all.")
    features: dict[str, Features] = {}
    labels: dict[str, NDArray[np.int64]] = {}
    for split in SPLITS:
        features[split], labels[split] = compute_features(parts, split)
    if per_class is not None:
        rows = few_per_class(labels["train"], per_class, SEED)
        features["train"] = {name: values[rows] for name, values in features["train"].items()}
        labels["train"] = labels["train"][rows]
    results = {}
    for name in features["train"]:
        train, val, test = ((features[split][name], labels[split]) for split in SPLITS)
        results[name] = fit_probe(train, val, test, STRENGTHS)
    return results


@torch.no_grad()
def compute_features(parts: Components, split: Split) -> tuple[Features, NDArray[np.int64]]:
    """Compute the features of a split's images, without augmentation, and their labels (n,).

    The names are "pixels" for the raw pixels, in the palette's colours, "layer 0", ..., and "output" for the final
    norm. A masked model sees masked images, as in training.
    """
    task: Any = parts.task
    model: Any = parts.model
    batches = batching.evaluation(parts.data, split, batch_size=parts.data.batch_size, rank=0, world=1, workers=0)
    columns: dict[str, list[NDArray[np.float64]]] = {}
    labels = []
    for batch in batches:
        tokens = task.tokens(batch, parts.device)
        masked = task.sample_masks(batch, parts.device) if task.masks else None
        layers = model.layer_features(tokens, masked)
        names = [*(f"layer {i}" for i in range(len(layers) - 1)), "output"]
        colours = task.palette.colours[tokens.cpu()].flatten(1)  # (B, N channels)
        for name, values in {"pixels": colours, **dict(zip(names, layers, strict=True))}.items():
            columns.setdefault(name, []).append(values.double().cpu().numpy())
        labels.append(batch["labels"].numpy())
    return {name: np.concatenate(column) for name, column in columns.items()}, np.concatenate(labels)


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s checkpoint=FILE [key=value ...] [--per-class N]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--per-class", type=int, metavar="N", help="fit to N training images of each class (default: all)"
    )
    options, overrides = parser.parse_known_args(arguments)
    if options.per_class is not None and options.per_class < 1:
        parser.error("--per-class must be at least 1")
    return options, overrides


if __name__ == "__main__":
    start.script(main)
