"""Weights for comparisons with a peer."""

import torch
from torch import nn

from common.machine.seeds import generator


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Draw every parameter at random: zeros and ones would hide a swapped name.

    Queries and keys are large enough for attention to choose, and tokens and positions to be seen beside patches.
    """
    draw = generator("benchmark")
    for name, tensor in model.named_parameters():
        if name == "class_token" or name.startswith("positions."):
            tensor.normal_(std=0.5, generator=draw)
        elif tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=draw)
        elif name.endswith("norm.weight"):
            tensor.uniform_(0.7, 1.3, generator=draw)
        else:
            tensor.normal_(std=0.1, generator=draw)
        if name.endswith("in_proj.weight"):
            tensor[: 2 * len(tensor) // 3] *= 2
