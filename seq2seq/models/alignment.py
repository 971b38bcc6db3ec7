"""The attention of recurrent decoders: a query is compared with every position of the encoder's output.

The scores are those of Bahdanau et al. 2015 (arXiv 1409.0473, section 3.1), where the network that computes them is
called the alignment model, and of Luong et al. 2015 (arXiv 1508.04025, section 3.1).
"""

from typing import Literal

import torch
from torch import Tensor, nn

from common.nn.linear import Linear

Score = Literal["dot", "general", "concat"]


class Alignment(nn.Module):
    """Attention with one head; a subclass defines how queries and keys are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded_attention: list[Tensor] | None = None  # see `common.nn.attention.record_attention`

    def project(self, memory: Tensor) -> Tensor:
        """The keys of an encoder's output: (B, S, M) -> (B, S, A). They are computed once for each sentence."""
        return memory

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Compare each query with each key: (B, N, H), (B, S, A) -> (B, N, S)."""
        raise NotImplementedError

    def forward(self, queries: Tensor, keys: Tensor, memory: Tensor, real: Tensor) -> Tensor:
        """The context of each query: (B, N, H), (B, S, A), (B, S, M), (B, S) boolean -> (B, N, M).

        A context is the mean of the positions of `memory`, weighted by the softmax of the query's scores. Only
        positions that are `real` have weight.
        """
        scores = self.scores(queries, keys)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        weights = scores.masked_fill(~real[:, None], torch.finfo(scores.dtype).min).softmax(-1)  # (B, N, S)
        if self.recorded_attention is not None:
            self.recorded_attention.append(weights.detach()[:, None])  # (B, 1, N, S): one head
        return weights.to(memory.dtype) @ memory


class AdditiveAlignment(Alignment):
    """score(q, m) = v^T tanh(W q + U m), where U m is the key.

    This is the alignment model of Bahdanau et al. (appendix A.1.2), and Luong's score "concat", whose W_a applied to
    [q; m] is [W, U]. There are no biases.
    """

    def __init__(self, queries: int, memory: int, width: int):
        super().__init__()
        self.query = Linear(queries, width, bias=False)
        self.key = Linear(memory, width, bias=False)
        self.score = Linear(width, 1, bias=False)

    def project(self, memory: Tensor) -> Tensor:
        """See `Alignment.project`."""
        keys: Tensor = self.key(memory)
        return keys

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """See `Alignment.scores`."""
        sums = self.query(queries)[:, :, None] + keys[:, None]  # (B, N, 1, A) + (B, 1, S, A)
        scores: Tensor = self.score(sums.tanh())[..., 0]  # (B, N, S, 1) -> (B, N, S)
        return scores


class DotAlignment(Alignment):
    """score(q, m) = q^T m, Luong's score "dot". Queries and memory have the same width."""

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """See `Alignment.scores`."""
        return queries.to(keys.dtype) @ keys.transpose(1, 2)


class GeneralAlignment(DotAlignment):
    """score(q, m) = q^T W m, Luong's score "general", where W m is the key."""

    def __init__(self, queries: int, memory: int):
        super().__init__()
        self.key = Linear(memory, queries, bias=False)

    def project(self, memory: Tensor) -> Tensor:
        """See `Alignment.project`."""
        keys: Tensor = self.key(memory)
        return keys


def luong_alignment(score: Score, width: int) -> Alignment:
    """The alignment of a decoder and a memory of the same width, by the name of its score."""
    if score == "concat":
        return AdditiveAlignment(width, width, width)
    return GeneralAlignment(width, width) if score == "general" else DotAlignment()
