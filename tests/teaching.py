"""Checkpoints of teachers for tests of distillation."""

from pathlib import Path

import torch
from torch import nn

from common.config.check import build, build_model
from common.config.compose import configure
from common.files import checkpoint

SMALL = ["model=vit", "model.width=16", "model.layers=1", "model.heads=2", "model.feedforward=24", "trainer.device=cpu"]
SMALL += ["trainer.precision=fp32", "data.batch_size=8"]


def write_teacher(file: Path, *keys: str, seed: int = 0) -> Path:
    """Write a checkpoint of a classifier with sampled weights, and a head whose logits differ clearly."""
    config = configure("train", [*SMALL, "model.width=24", *keys])
    task = build(config["task"], data=build(config["data"]))
    torch.manual_seed(seed)
    model = build_model(config["model"], task)
    nn.init.normal_(model.head.weight)
    content = {"step": 3, "model": model.state_dict(), "average": None, "task": task.state(), "config": config}
    checkpoint.save(file, content)
    return file
