"""A classifier that cannot overfit a few digits has a mistake between pixels and optimizer step."""

import math

import torch

from common.config.check import build, construct
from common.config.compose import configure
from common.machine.device import to_device
from common.train import optim
from common.train.optim import OptimizerOptions
from common.train.step import Stepper

IMAGES = 16
PLAIN = ["data.augmentation.crop=none", "data.augmentation.policy=none"]


def test_a_few_digits_are_overfitted_to_the_entropy_of_smoothed_targets() -> None:
    """Smoothing 0.1 of 10 classes: the least loss is the targets' entropy, 0.91 ln 1/0.91 + 9 x 0.01 ln 1/0.01."""
    floor = -0.91 * math.log(0.91) - 9 * 0.01 * math.log(0.01)
    config = configure("train", ["model=vit", "model.width=32", "model.layers=2", *PLAIN, "optimizer.lr=3e-3"])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(0)
    model = build(config["model"], **task.model_arguments())
    optimizer = optim.build(model, construct(OptimizerOptions, config["optimizer"]))
    stepper = Stepper(task, model, optimizer, torch.device("cpu"), "fp32", clip_norm=1.0)

    batch = task.data.collate([task.data.sample("train", i, torch.Generator().manual_seed(i)) for i in range(IMAGES)])
    losses = [float(stepper([batch], step)["loss"]) for step in range(150)]
    assert losses[0] > 2.2 and min(losses) >= floor - 1e-4
    assert losses[-1] < floor + 0.01, (losses[-1], floor)

    evaluated = task.data.collate([task.data.sample("train", i, None) for i in range(IMAGES)])
    answers = task.predict(model.eval(), to_device(evaluated, torch.device("cpu")))
    assert [answer["label"] for answer in answers] == evaluated["labels"].tolist()
    assert min(answer["probability"] for answer in answers) > 0.85, "0.91 at best"
