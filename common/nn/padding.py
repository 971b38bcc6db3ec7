"""Which positions of right-padded rows hold tokens."""

import torch
from torch import Tensor


def is_real(lengths: Tensor, count: int) -> Tensor:
    """Which of `count` positions are not padding: lengths (B,) -> (B, count) boolean."""
    return torch.arange(count, device=lengths.device) < lengths[:, None]
