"""Cross-entropy of next tokens for large vocabularies, in a few rows at a time.

With V = 50,257 entries, the log probabilities of 2,048 tokens take 412 MB in fp32. PyTorch's cross-entropy writes and
reads several tensors of this size. Here, the probabilities of a few rows are in memory at a time, and they are computed
again in the backward pass. Only the logits and their gradient, which have the logits' dtype, are stored as a whole.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**22  # logits that are computed with at a time; 16 MiB in fp32


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log probability of each target in nats: (..., V), (...) int64 -> (...), at least fp32."""
    rows = logits.flatten(0, -2)
    losses: Tensor = _Losses.apply(rows, targets.reshape(-1))
    return losses.view(targets.shape)


class _Losses(torch.autograd.Function):
    """The cross-entropy of each row, (R, V), (R,) -> (R,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        pairs = zip(*(x.split(_chunk_rows(logits)) for x in (logits, targets)), strict=True)
        return torch.cat([F.cross_entropy(_in_full_precision(x), y, reduction="none") for x, y in pairs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        result = torch.empty_like(logits)
        parts = (x.split(_chunk_rows(logits)) for x in (logits, targets[:, None], gradient[:, None], result))
        for x, target, factor, part in zip(*parts, strict=True):
            # The gradient of a row's loss is its probabilities, minus one at the target.
            row = _in_full_precision(x).softmax(-1).mul_(factor)
            part.copy_(row.scatter_add_(1, target, -factor))
        return result, None


def _chunk_rows(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits.shape[-1])


def _in_full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
