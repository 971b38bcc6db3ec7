"""Random weights for comparisons with a peer."""

import torch
from torch import nn

from common.machine.seeds import generator


@torch.no_grad()
def randomise_parameters(model: nn.Module) -> None:
    """Set every parameter of `model` to random values, since initial zeros and ones would hide swapped tensors.

    The projections to queries and keys are large enough for non-uniform attention. Class token and position embeddings
    are large enough to change the outputs.
    """
    rng = generator("benchmark")
    for name, tensor in model.named_parameters():
        if name == "class_token" or name.startswith("positions."):
            tensor.normal_(std=0.5, generator=rng)
        elif tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=rng)
        elif name.endswith("norm.weight"):
            tensor.uniform_(0.7, 1.3, generator=rng)
        else:
            tensor.normal_(std=0.1, generator=rng)
        if name.endswith("in_proj.weight"):
            tensor[: 2 * len(tensor) // 3] *= 2
