"""Transformer blocks and stacks (Vaswani et al. 2017, arXiv 1706.03762, section 3.1) in both norm orders."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.nn.attention import Attention, Cache
from common.nn.dropout import Dropout
from common.nn.linear import Linear


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """The sizes and places that the blocks of one stack share."""

    width: int
    heads: int
    feedforward: int
    pre_norm: bool
    dropout: float = 0.0  # on the output of each sub-layer, before it is added
    attention_dropout: float = 0.0  # on the attention weights
    hidden_dropout: float = 0.0  # inside the feed-forward, after the activation
    activation: Callable[[], nn.Module] = nn.ReLU
    norm_eps: float = 1e-5
    qk_norm: bool = False  # see Attention
    layer_scale: float | None = None  # first value of a learned factor for each channel of a sub-layer's output
    drop_path: float = 0.0  # probability that a sample skips a sub-layer; in a stack, of the last block


class Residual(nn.Module):
    """The one place where a sub-layer meets residual, norm, dropout, layer scale and stochastic depth.

    post-norm: norm(x + drop(f(x))), section 3.1; pre-norm: x + drop(f(norm(x))), Xiong et al. 2020, arXiv 2002.04745.
    Layer scale is Touvron et al. 2021, arXiv 2103.17239, section 2.1; stochastic depth Huang et al. 2016, arXiv
    1603.09382.
    """

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.pre_norm = options.pre_norm
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.dropout = Dropout(options.dropout)
        scale = options.layer_scale
        self.scale = None if scale is None else nn.Parameter(torch.full((options.width,), scale))
        self.drop_path = options.drop_path

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        if self.pre_norm:
            return x + self._added(sublayer(self.norm(x)))
        normed: Tensor = self.norm(x + self._added(sublayer(x)))
        return normed

    def _added(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        if self.scale is not None:
            x = x * self.scale
        if self.drop_path and self.training:
            keep = 1 - self.drop_path
            kept = x.new_empty(len(x), 1, 1).bernoulli_(keep)  # (B, 1, 1), each sample for itself
            x = x * kept / (keep or 1.0)  # at 0 nothing is kept that could be made up for
        return x


class FeedForward(nn.Sequential):
    """Two linear maps with an activation between them, at each position alike (section 3.3)."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.expand = Linear(options.width, options.feedforward)
        self.activation = options.activation()
        self.dropout = Dropout(options.hidden_dropout)
        self.contract = Linear(options.feedforward, options.width)


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.attention = _attention(options)
        self.feed_forward = FeedForward(options)
        self.residuals = nn.ModuleList(Residual(options) for _ in range(2))

    def forward(self, x: Tensor, *, positions: Tensor | None = None, may_look: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C).

        `positions` (broadcastable to x) are added to queries and keys, never to values, as DETR does; None for
        models that add them once at the input. `may_look`: see Attention.
        """

        def attend(x: Tensor) -> Tensor:
            qk = _add(x, positions)
            attended: Tensor = self.attention(q=qk, k=qk, v=x, may_look=may_look)
            return attended

        x = self.residuals[0](x, attend)
        x = self.residuals[1](x, self.feed_forward)
        return x


class BlockCache(NamedTuple):
    """What a decoder block keeps from token to token."""

    own: Cache  # of the tokens before, growing
    memory: Cache  # of the memory, as it is


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention to a memory, then feed-forward."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.attention = _attention(options)
        self.cross_attention = _attention(options)
        self.feed_forward = FeedForward(options)
        self.residuals = nn.ModuleList(Residual(options) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None,
        memory_keys: Tensor | None,
        positions: Tensor | None = None,
        may_look: Tensor | None = None,
        may_look_at_memory: Tensor | None = None,
        causal: bool = False,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """x (B, N, C), memory (B, M, C) -> (B, N, C).

        `memory_keys` is the memory with its positions added (or the memory itself): the same for every block of a
        stack, so it comes in ready. `positions` are added to the queries of both attentions and to the keys of x.
        With a `cache` of this block, x follows the tokens in it, and the memory is not needed again.
        """

        def attend(x: Tensor) -> Tensor:
            qk = _add(x, positions)
            own = cache.own if cache else None
            attended: Tensor = self.attention(q=qk, k=qk, v=x, may_look=may_look, causal=causal, cache=own)
            return attended

        def attend_to_memory(x: Tensor) -> Tensor:
            q = _add(x, positions)
            where: dict[str, Any] = {"k": memory_keys, "v": memory} if cache is None else {"cache": cache.memory}
            attended: Tensor = self.cross_attention(q=q, may_look=may_look_at_memory, **where)
            return attended

        x = self.residuals[0](x, attend)
        x = self.residuals[1](x, attend_to_memory)
        x = self.residuals[2](x, self.feed_forward)
        return x


class Encoder(nn.Module):
    """A stack of encoder blocks. With pre-norm it ends in a norm, since its blocks leave their sums unnormalised.

    Without `final_norm` that is left to the caller. `drop_path` grows linearly from 0 in the first block to its full
    value in the last (Huang et al. 2016, section 3).
    """

    def __init__(self, options: BlockOptions, *, layers: int, final_norm: bool = True):
        super().__init__()
        rates = [options.drop_path * i / max(1, layers - 1) for i in range(layers)]
        self.blocks = nn.ModuleList(EncoderBlock(replace(options, drop_path=rate)) for rate in rates)
        ends_in_norm = options.pre_norm and final_norm
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps) if ends_in_norm else nn.Identity()

    def forward(self, x: Tensor, *, positions: Tensor | None = None, may_look: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        for block in self.blocks:
            x = block(x, positions=positions, may_look=may_look)
        x = self.norm(x)
        return x


class Decoder(nn.Module):
    """A stack of decoder blocks that hands out every block's output, or only the last, each through one final norm."""

    def __init__(self, options: BlockOptions, *, layers: int, final_norm: bool, every: bool = True):
        super().__init__()
        self.every = every
        self.blocks = nn.ModuleList(DecoderBlock(options) for _ in range(layers))
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps) if final_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        may_look: Tensor | None = None,
        may_look_at_memory: Tensor | None = None,
        causal: bool = False,
        caches: list[BlockCache] | None = None,
    ) -> list[Tensor]:
        """x (B, N, C), memory (B, M, C) -> one (B, N, C) per block, first to last; or only the last.

        With `caches`, from `remember`, x follows the tokens in them, and the memory is in there, too.
        """
        memory_keys = None if memory is None else _add(memory, memory_positions)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(
                x,
                memory=memory,
                memory_keys=memory_keys,
                positions=positions,
                may_look=may_look,
                may_look_at_memory=may_look_at_memory,
                causal=causal,
                cache=None if caches is None else caches[i],
            )
            if self.every or i == len(self.blocks) - 1:
                outputs.append(self.norm(x))
        return outputs

    def remember(self, memory: Tensor, memory_positions: Tensor | None = None) -> list[BlockCache]:
        """A cache for each block with memory (B, M, C) in it, and no token yet."""
        keys = _add(memory, memory_positions)
        attentions: list[Attention] = [block.cross_attention for block in self.blocks]  # type: ignore[misc]
        return [BlockCache(Cache(), attention.remember(keys, memory)) for attention in attentions]


def _attention(options: BlockOptions) -> Attention:
    return Attention(
        width=options.width,
        heads=options.heads,
        dropout=options.attention_dropout,
        qk_norm=options.qk_norm,
        norm_eps=options.norm_eps,
    )


def _add(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions
