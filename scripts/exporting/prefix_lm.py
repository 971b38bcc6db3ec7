"""The two graphs of a decoder-only translator, with the inputs and outputs of those in translation.py."""

import torch
from torch import Tensor, nn

from common.nn.blocks import BlockCache
from common.nn.padding import is_real
from scripts.exporting.caches import ConcatenatedCache, stack
from seq2seq.models.prefix_lm import PrefixLm, State


class Encoder(nn.Module):
    """The keys and values of the source in all layers."""

    def __init__(self, model: PrefixLm):
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """Source ids (B, S) int64, right-padded, and lengths of sources (B,) -> memory (L, 2, B, h, S, C/h).

        C is the model's width, h is the number of heads, and L the number of layers.
        """
        return (stack([cache.own for cache in self.model.encode(source, lengths).caches]),)


class DecoderStep(nn.Module):
    """One step, from the last token of each sentence to the logits of the next token."""

    def __init__(self, model: PrefixLm):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, past: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) at position T -> logits of the next token (B, V) and the new past (L, 2, B, h, T + 1, C/h).

        V is the size of the vocabulary. `past` (L, 2, B, h, T, C/h) holds the keys and values of the T previous target
        tokens, and `memory` (L, 2, B, h, S, C/h), the output of `Encoder`, those of the source. `lengths` (B,) are the
        lengths of the sources.
        """
        batch, before, length = tokens.shape[0], past.shape[4], memory.shape[4]
        real = is_real(lengths, length)
        earlier = torch.ones(batch, before, dtype=torch.bool, device=tokens.device)
        ancestors = torch.cat([real, earlier], 1)[:, None]  # (B, 1, S + T)
        layers = zip(memory, past, self.model.decoder.blocks, strict=True)
        caches = [
            BlockCache(ConcatenatedCache(torch.cat((source, own), 3), block.attention)) for source, own, block in layers
        ]
        logits = self.model.step(State(caches, ancestors, before, sees_all=False, lengths=lengths), tokens)
        return logits, stack([cache.own for cache in caches])[..., length:, :]
