"""Embeddings of tokens, of which single ones can be cut, that is, set to zero (Shen et al. 2020, arXiv 2009.13818)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TokenEmbedding(nn.Embedding):
    """torch.nn.Embedding whose input can say which tokens are cut.

    Inside the context `cutting`, the negative id ~i (which is -1 - i) stands for the token i with an embedding of
    zeros, from which the table gets no gradient. So a model that passes its token ids on to a TokenEmbedding can be
    called with cut tokens, whether it embeds a whole sequence or token by token.
    """

    accepts_cut = False  # an attribute of the module, by which torch.compile recognises the context

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (...) int64 -> embeddings (..., C)."""
        if not self.accepts_cut:
            return super().forward(tokens)
        is_cut = tokens < 0
        return super().forward(torch.where(is_cut, ~tokens, tokens)).masked_fill(is_cut[..., None], 0)


@contextmanager
def cutting(model: nn.Module) -> Iterator[None]:
    """A context in which every TokenEmbedding of `model` accepts the negative ids of cut tokens."""
    embeddings = [module for module in model.modules() if isinstance(module, TokenEmbedding)]
    try:
        for embedding in embeddings:
            embedding.accepts_cut = True
        yield
    finally:
        for embedding in embeddings:
            embedding.accepts_cut = False
