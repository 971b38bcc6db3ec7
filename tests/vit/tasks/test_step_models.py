"""A step of TNT and of the CNN does not depend on how its batch is split, and batch norms are named as exceptions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.config.check import build, construct
from common.config.compose import configure
from common.data.batching import Loader
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.state import _per_micro_batch
from common.train.step import Stepper

SEED = 3
IMAGES = [5, 0, 11, 7, 2, 9, 14, 3]  # of train, in a step's order
SPLITS = {"1x8": [8], "3+1+4": [3, 1, 4], "8x1": [1] * 8}
MIXED = ["data.augmentation.mixup=0.8", "data.augmentation.cutmix=1", "data.augmentation.erase=0.5"]
MODELS = {
    "tnt": ["model=tnt", "model.layers=2", "optimizer.layer_decay=0.7"],
    "tnt without a class token": ["model=tnt", "model.layers=2", "model.pooling=mean"],
    "cnn": ["model=cnn", "optimizer.layer_decay=0.7"],
    "cnn with bottlenecks": ["model=cnn", "model.block=bottleneck", "model.widths=[8,16,32]"],
}


def stepper(keys: list[str], dtype: torch.dtype, clip_norm: float | None = 0.1) -> Stepper:
    config = configure("train", [*keys, *MIXED])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model = build(config["model"], **task.model_arguments())
    # Inputs are fp32, bit for bit the same in any batch; a model of fp64 gets them in its own type.
    model.register_forward_pre_hook(lambda _, images: (images[0].to(dtype),))
    model = model.to(dtype)
    optimizer = optim.build(model, construct(OptimizerOptions, config["optimizer"]))
    return Stepper(task, model, optimizer, torch.device("cpu"), "fp32", clip_norm)


def after_step(keys: list[str], lengths: list[int]) -> torch.Tensor:
    """All fp64 parameters after one clipped AdamW step."""
    one = stepper(keys, torch.float64)
    rest = iter(IMAGES)
    batches = [(0, tuple(next(rest) for _ in range(count))) for count in lengths]
    data: Any = one.task.data  # type: ignore[attr-defined]
    one([*Loader(data, "train", seed=SEED, workers=0, pin=False)(batches)], 0)
    return torch.cat([p.detach().flatten() for p in one.parameters])


@pytest.mark.parametrize("model", MODELS)
def test_parameters_after_a_clipped_step_do_not_depend_on_the_split(model: str) -> None:
    whole = after_step(MODELS[model], SPLITS["1x8"])
    for split in ("3+1+4", "8x1"):
        assert (after_step(MODELS[model], SPLITS[split]) - whole).abs().max() <= 1e-10
    start = torch.cat([p.detach().flatten() for p in stepper(MODELS[model], torch.float64).parameters])
    assert (whole - start).abs().max() > 1e-4, "the step did something"


def test_with_batch_norms_the_split_matters_and_the_summary_names_them() -> None:
    keys = ["model=cnn", "model.norm=batch"]
    whole, split = (after_step(keys, SPLITS[name]) for name in ("1x8", "3+1+4"))
    assert (whole - split).abs().max() > 1e-4
    for changes, expected in (([], []), (["model.norm=batch"], ["per micro-batch: BatchNorm (9 layers)"])):
        one = stepper(["model=cnn", *changes], torch.float32)
        lines = _per_micro_batch(SimpleNamespace(model=one.model, task=one.task))  # type: ignore[arg-type]
        assert [line.rpartition(":")[0] for line in lines] == expected
