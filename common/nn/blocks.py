"""Transformer blocks and stacks (Vaswani et al. 2017, arXiv 1706.03762, section 3.1), pre-norm or post-norm."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from common.nn.attention import Attention, Cache
from common.nn.dropout import Dropout
from common.nn.linear import Linear
from common.nn.norms import Norm, norm


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """The options that all blocks of a stack share."""

    width: int  # C
    heads: int
    feedforward: int  # hidden width of the feed-forward
    pre_norm: bool  # True: a norm before each sub-layer; False: after each residual addition
    dropout: float = 0.0  # on the output of each sub-layer, before the residual addition
    attention_dropout: float = 0.0  # on the attention probabilities
    hidden_dropout: float = 0.0  # inside the feed-forward, after the activation
    feedforward_bias: bool = True  # whether the feed-forward's two maps have a bias
    activation: Callable[[], nn.Module] = nn.ReLU
    norm: Norm = "layer"
    norm_eps: float = 1e-5
    attention_width: int | None = None  # total width of the heads; None means `width`
    attention_bias: bool = True  # whether the attention's projections have a bias
    qkv_bias: bool | None = None  # whether those of queries, keys and values have one; None means `attention_bias`
    qk_norm: bool = False  # whether to normalise queries and keys; see `Attention`
    layer_scale: float | None = None  # initial value of the learned factor of each output channel; None: no factors
    drop_path: float = 0.0  # probability that a sample skips a sub-layer in training; `Stack` scales it per block


class Residual(nn.Module):
    """A sub-layer with its residual connection, norm, dropout, layer scale and stochastic depth.

    Post-norm is norm(x + drop(f(x))) (Vaswani et al., section 3.1), and pre-norm is x + drop(f(norm(x))) (Xiong et al.
    2020, arXiv 2002.04745). f is the sub-layer, and drop applies dropout, layer scale and stochastic depth. Layer scale
    is from Touvron et al. 2021 (arXiv 2103.17239, section 2.1), stochastic depth from Huang et al. 2016 (arXiv
    1603.09382).
    """

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.pre_norm = options.pre_norm
        self.norm = norm(options.norm, options.width, options.norm_eps)
        self.dropout = Dropout(options.dropout)
        scale = options.layer_scale
        self.scale = None if scale is None else nn.Parameter(torch.full((options.width,), scale))
        self.drop_path = options.drop_path

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x (B, N, C) -> (B, N, C); `sublayer` maps (B, N, C) to (B, N, C)."""
        if self.pre_norm:
            return x + self._branch(sublayer(self.norm(x)))
        y: Tensor = self.norm(x + self._branch(sublayer(x)))
        return y

    def _branch(self, x: Tensor) -> Tensor:
        """Apply dropout, layer scale and stochastic depth to a sub-layer's output, before the addition."""
        x = self.dropout(x)
        if self.scale is not None:
            x = x * self.scale
        if self.drop_path and self.training:
            probability = 1 - self.drop_path
            keep = x.new_empty(len(x), 1, 1).bernoulli_(probability)  # (B, 1, 1), independent for each sample
            x = x * keep / (probability or 1.0)  # at probability 0, divide by 1 and not by 0
        return x


class FeedForward(nn.Sequential):
    """Two linear maps with activation and dropout between them, applied at every position (Vaswani et al., 3.3)."""

    def __init__(self, options: BlockOptions):
        super().__init__()
        self.expand = Linear(options.width, options.feedforward, options.feedforward_bias)
        self.activation = options.activation()
        self.dropout = Dropout(options.hidden_dropout)
        self.contract = Linear(options.feedforward, options.width, options.feedforward_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        expand, activation = self.expand, self.activation
        # With gradients, one pass saves nothing. Hooks receive the output without activation.
        if type(expand) is Linear and not torch.is_grad_enabled() and not expand._forward_hooks:
            x = expand(x, activation=activation)
        else:
            x = activation(expand(x))
        x = self.contract(self.dropout(x))
        return x


class Memory(NamedTuple):
    """Another sequence that queries attend to, such as an encoder's output.

    `keys` may differ from `values` by added positions. Both are None if a `BlockCache` holds their projections.
    """

    keys: Tensor | None  # (B, M, C)
    values: Tensor | None  # (B, M, C)
    may_look: Tensor | None = None  # boolean, broadcastable to (B, heads, N, M); see `Attention.forward`
    bias: Tensor | None = None  # float, broadcastable likewise


class BlockCache(NamedTuple):
    """The cached keys and values of one block in decoding."""

    own: Cache  # keys and values of the preceding tokens, for self-attention; grows in each call
    memory: Cache | None = None  # keys and values of the memory, for cross-attention; None without a memory


class Context(TypedDict, total=False):
    """The keyword arguments that a stack passes to each of its blocks; see `Block.forward`."""

    positions: Tensor | None
    may_look: Tensor | None
    bias: Tensor | None
    causal: bool
    memory: Memory | None
    guide: Any


class Block(nn.Module):
    """Self-attention, cross-attention to a memory if `cross` is True, and a feed-forward, each in a `Residual`.

    A module given as `attention` or `cross_attention` replaces the default `Attention`. It is called with keyword
    arguments of `Attention.forward` and with `guide`, an object of any type that the block receives and passes on.
    """

    def __init__(
        self,
        options: BlockOptions,
        *,
        cross: bool = False,
        attention: nn.Module | None = None,
        cross_attention: nn.Module | None = None,
    ):
        super().__init__()
        self.takes_guide = attention is not None, cross_attention is not None
        self.attention = attention or _attention(options)
        self.cross_attention = (cross_attention or _attention(options)) if cross else None
        self.feed_forward = FeedForward(options)
        self.residuals = nn.ModuleList(Residual(options) for _ in range(3 if cross else 2))

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        may_look: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        memory: Memory | None = None,
        cache: BlockCache | None = None,
        guide: Any = None,
    ) -> Tensor:
        """x (B, N, C), memory (B, M, C) -> (B, N, C).

        As in DETR, `positions` (broadcastable to x) are added to the queries of self- and cross-attention and to the
        keys of self-attention, but not to values. They are None in models that add positions at the input. `may_look`,
        `bias` and `causal` apply to self-attention; those of cross-attention are in `memory`. With a `cache` of
        this block, x holds only the tokens that follow those in the cache.
        """

        def attend(x: Tensor) -> Tensor:
            qk = _add(x, positions)
            own = cache.own if cache else None
            extra = {"guide": guide} if self.takes_guide[0] else {}
            y: Tensor = self.attention(q=qk, k=qk, v=x, may_look=may_look, bias=bias, causal=causal, cache=own, **extra)
            return y

        def attend_to_memory(x: Tensor) -> Tensor:
            assert self.cross_attention is not None and memory is not None
            source = {"cache": cache.memory} if cache and cache.memory else {"k": memory.keys, "v": memory.values}
            extra = {"guide": guide} if self.takes_guide[1] else {}
            if memory.bias is not None:
                extra["bias"] = memory.bias
            y: Tensor = self.cross_attention(q=_add(x, positions), may_look=memory.may_look, **source, **extra)
            return y

        x = self.residuals[0](x, attend)
        if self.cross_attention is not None:
            x = self.residuals[1](x, attend_to_memory)
        x = self.residuals[-1](x, self.feed_forward)
        return x


class Stack(nn.Module):
    """A sequence of blocks with an optional final norm; pre-norm stacks need it to normalise the last block's output.

    The functions `attention` and `cross_attention` are called with a block's index (from 0) and return the attention
    module of this block. `drop_path` grows linearly from 0 in the first block to `options.drop_path` in the last; a
    single block has 0.

    Differs: in Huang et al. 2016 (section 3), `drop_path` grows from `options.drop_path` / `layers` in the first block.
    """

    def __init__(
        self,
        options: BlockOptions,
        *,
        layers: int,
        final_norm: bool,
        cross: bool = False,
        attention: Callable[[int], nn.Module] | None = None,
        cross_attention: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                replace(options, drop_path=options.drop_path * i / max(1, layers - 1)),
                cross=cross,
                attention=attention(i) if attention else None,
                cross_attention=cross_attention(i) if cross_attention else None,
            )
            for i in range(layers)
        )
        self.norm = norm(options.norm, options.width, options.norm_eps) if final_norm else nn.Identity()

    def forward(self, x: Tensor, *, caches: list[BlockCache] | None = None, **context: Unpack[Context]) -> Tensor:
        """x (B, N, C) -> (B, N, C). With `caches`, x holds only the tokens that follow those in the caches."""
        for i, block in enumerate(self.blocks):
            x = block(x, cache=caches[i] if caches else None, **context)
        x = self.norm(x)
        return x

    def block_outputs(self, x: Tensor, **context: Unpack[Context]) -> list[Tensor]:
        """The outputs (B, N, C) of all blocks, in order, with the final norm applied to each."""
        outputs = []
        for block in self.blocks:
            x = block(x, **context)
            outputs.append(self.norm(x))
        return outputs

    def caches(self, memory: Memory | None = None) -> list[BlockCache]:
        """Make a cache for each block. The cache holds no keys and values of self-attention yet.

        With a `memory`, each block's cache holds the memory's keys and values, projected for cross-attention.
        """
        if memory is None:
            return [BlockCache(Cache()) for _ in self.blocks]
        attentions: list[Any] = [block.cross_attention for block in self.blocks]
        return [BlockCache(Cache(), attention.cache_memory(memory.keys, memory.values)) for attention in attentions]


def _attention(options: BlockOptions) -> Attention:
    return Attention(
        width=options.width,
        heads=options.heads,
        inner_width=options.attention_width,
        projection_bias=options.attention_bias,
        qkv_bias=options.qkv_bias,
        dropout=options.attention_dropout,
        qk_norm=options.qk_norm,
        norm=options.norm,
        norm_eps=options.norm_eps,
    )


def _add(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions
