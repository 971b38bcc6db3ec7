"""The maxout output layer of Cho et al. 2014 (arXiv 1406.1078) and Bahdanau et al. 2015 (arXiv 1409.0473)."""

import torch
from torch import Tensor, nn

from common.nn.linear import Linear


class DeepOutput(nn.Module):
    """t = max over pairs of (U s + V y + C c), from the decoder's state, the previous word and the context.

    Each of the `width` units is the maximum of two adjacent sums (Goodfellow et al. 2013, arXiv 1302.4389). U, V and C
    are the columns of one matrix, in this order. The logits are a linear map of t.

    Differs: the sums have biases.
    """

    def __init__(self, state: int, word: int, context: int, width: int):
        super().__init__()
        self.sums = Linear(state + word + context, 2 * width)

    def forward(self, state: Tensor, word: Tensor, context: Tensor) -> Tensor:
        """(..., H), (..., E), (..., C) -> (..., width)."""
        sums: Tensor = self.sums(torch.cat([state, word, context.to(state.dtype)], -1))
        units: Tensor = sums.unflatten(-1, (-1, 2)).amax(-1)
        return units
