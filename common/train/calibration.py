"""Calibrate a model for int8: measure the ranges of its tensors on val (common/nn/observing.py)."""

import math

import torch
from torch import nn

from common.data import batching
from common.errors import UserError
from common.machine import device as devices
from common.nn.observing import observing
from common.task import Data, Task, answers_of

SAMPLES = 256  # of val


@torch.no_grad()
def calibrate(
    task: Task, data: Data, model: nn.Module, *, device: torch.device, batch_size: int, samples: int = SAMPLES
) -> dict[str, tuple[float, float]]:
    """Answer `samples` samples of val, the same in each call, in fp32; returns the range of each tensor by name.

    `batch_size` is in the unit of `data.batch_size`. Raises UserError if there is no val, for a model without
    attentions, feed-forwards and ResNet backbones, and for one whose tensors are not finite.
    """
    count = data.count("val")
    if not count:
        raise UserError("the data have no val, on which ranges are measured; give data with val (data=, data.root=).")
    batches = batching.evaluation(
        data, "val", batch_size=batch_size, rank=0, world=1, workers=0, samples=min(samples, count)
    )
    with observing(model) as ranges:
        for batch in batches:
            answers_of(task, model, devices.to_device(batch, device))
    if not ranges:
        raise UserError(
            f"{type(model).__name__} has nothing to compute in int8: no ResNet backbone, and no linear map in "
            "attentions and feed-forwards that is not a product of two."
        )
    if broken := [name for name, limits in ranges.items() if not all(map(math.isfinite, limits))]:
        raise UserError(f"{broken[0]} gets values that are not finite, so they have no range; the weights are broken.")
    return ranges
