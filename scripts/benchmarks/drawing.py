"""Random weights for comparing our models with those of other libraries."""

import torch
from torch import nn

from common.machine.seeds import generator


@torch.no_grad()
def randomise_parameters(model: nn.Module) -> None:
    """Set every parameter of `model` to random values.

    Many initial values are zero or one. With these, a comparison of two models would not notice if two tensors of the
    same shape were swapped. The query and key projections are large enough that attention is not uniform. The class
    token and the position embeddings are large enough to change the outputs.
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
