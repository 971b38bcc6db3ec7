"""Multi-head self- and cross-attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.machine import processor
from common.nn.dropout import dropout as drop
from common.nn.linear import Linear, Projections
from common.nn.norms import Norm
from common.nn.norms import norm as normalisation

# In bf16, `_masked_softmax` subtracts the mean key from all keys, but only if there are more queries than this. With
# fewer queries, the subtraction takes longer than the product of queries and keys.
MAX_UNCENTRED_QUERIES = 8
# In fp32 inference on the CPU, `_fused_attention` is faster than `materialised_attention` for more attention
# probabilities (B h N M) than this, which take 8 MiB.
MAX_FP32_INFERENCE_WEIGHTS = 2**21
# In inference on Intel's processors with AMX, `_fused_attention` is faster for at least MIN_FUSED_QUERIES queries, and
# for at most MAX_FUSED_QUERIES, as in decoding. On Zen 4, it takes up to four times as long for few queries.
MIN_FUSED_QUERIES, MAX_FUSED_QUERIES = 64, 8
_HAS_INTEL_AMX = processor.is_intel() and bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
# The types for which this holds: its products are computed by MKL in fp32, and by AMX in bf16.
_FUSED_INFERENCE_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16) if _HAS_INTEL_AMX else ()
# The type in which a cache on the CPU keeps keys and values in bf16. Without AMX, the products of a decoding step, of
# few queries each, take a third to a half of the time in fp32, for twice the memory (Zen 4). The attention of a prompt,
# of many queries, is then computed in fp32, too.
_CACHE_DTYPE = torch.bfloat16 if _HAS_INTEL_AMX else torch.float32
# `materialised_attention` is used for at most this many attention probabilities (B h N M) per call. In fp32 they take
# 64 MiB; with gradients, a call takes three times as much memory.
MAX_MATERIALISED_WEIGHTS = 2**24


class Attention(nn.Module):
    """Scaled dot-product attention in `heads` subspaces.

    `width` is the number of channels C of inputs and outputs. `inner_width` is the total width of the heads, and None
    means `width`; each head has the width D = `inner_width` / `heads`. The query, key and value projections are stacked
    in this order as the rows of one matrix, so that a tensor that serves as query, key and value is projected by one
    multiplication. `projection_bias` adds a bias to the query, key, value and output projections; `qkv_bias` overrides
    it for the query, key and value projections unless it is None. `dropout` is the rate of dropout on the attention
    probabilities. `qk_norm` normalises the queries and keys of each head by `norm` with `norm_eps`, which keeps the
    scores from growing (Dehghani et al. 2023, arXiv 2302.05442, section 2). Raises ValueError if `heads` does not
    divide `inner_width`.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inner_width: int | None = None,
        projection_bias: bool = True,
        qkv_bias: bool | None = None,
        dropout: float = 0.0,
        qk_norm: bool = False,
        norm: Norm = "layer",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        inner = inner_width or width
        if inner % heads:
            raise ValueError(f"width {inner} is not divisible by heads {heads}")
        self.heads, self.inner_width = heads, inner
        self.dropout = dropout  # on the attention probabilities
        self.in_proj = Projections(width, 3 * inner, projection_bias if qkv_bias is None else qkv_bias)
        self.out_proj = Linear(inner, width, projection_bias)
        self.q_norm = normalisation(norm, inner // heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = normalisation(norm, inner // heads, norm_eps) if qk_norm else nn.Identity()
        self.recorded_attention: list[Tensor] | None = None  # see `record_attention`

    def forward(
        self,
        *,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        may_look: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        cache: "Cache | None" = None,
    ) -> Tensor:
        """q (B, N, C), k and v (B, M, C) -> (B, N, C).

        `may_look` is boolean, True where a query may attend to a key. `bias` is a float tensor that is added to the
        scores. `may_look` and `bias` have at least two dimensions and are broadcastable to (B, heads, N, M). With
        `causal`, the last query attends to all M keys, the query before it to all but the last key, and so on. `bias`,
        `may_look` and `causal` can be combined. For a query whose keys are all masked, the input of the output
        projection is zero (not NaN). With a `cache`, the new keys and values are appended to it, and M counts all keys
        in the cache. If k or v is None, nothing is appended, and the queries attend to the keys that the cache already
        holds (see `cache_memory`).
        """
        if k is None or v is None:
            assert cache is not None, "attention needs keys and values, or a cache"
            k, v = cache.content()
            q = self.q_norm(self._split_heads(self._project_part(q, 0, 1))).to(v.dtype)
        else:
            q, k, v = (self._split_heads(x) for x in self._project(q, k, v))  # (B, h, N or M, D)
            q, k = self.q_norm(q), self.k_norm(k).to(v.dtype)  # under autocast, norms return fp32
            if cache is not None:
                k, v = cache.extend(k, v)
            q = q.to(v.dtype)
        x = self.attend(q, k, v, may_look=may_look, bias=bias, causal=causal)
        out: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))  # (B, h, N, D) -> (B, N, C)
        return out

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, may_look: Tensor | None, bias: Tensor | None, causal: bool
    ) -> Tensor:
        """Attention of projected queries, keys and values: (B, h, N, D), (B, h, M, D), (B, h, M, D) -> (B, h, N, D).

        A subclass may override this method to add a bias that depends on the projected queries.
        """
        dropout = self.dropout if self.training else 0.0
        compute = materialised_attention if self.is_materialised(q, k) else _fused_attention
        with _without_autocast(q):
            if self.recorded_attention is not None:
                mask = _combined_mask(q, k, may_look, causal)
                self.recorded_attention.append(attention_probabilities(q, k, mask, bias).detach())
            return compute(q, k, v, may_look=may_look, bias=bias, causal=causal, dropout=dropout)

    def is_materialised(self, q: Tensor, k: Tensor) -> bool:
        """Whether `attend` uses `materialised_attention` for these projections. A subclass may choose otherwise."""
        return _is_materialised(q, k)

    def cache_memory(self, k: Tensor, v: Tensor) -> "Cache":
        """Project k and v (B, M, C), such as an encoder's output, and return a cache that holds the projections.

        `forward` is then called with this cache and without k and v, so that k and v are projected only once.
        """
        k, v = (
            self._project_part(k, 1, 3).chunk(2, dim=-1)
            if k is v
            else (self._project_part(k, 1, 2), self._project_part(v, 2, 3))
        )
        cache = Cache()
        cache.extend(self.k_norm(self._split_heads(k)).to(v.dtype), self._split_heads(v))
        return cache

    def _project(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project q, k and v. If q is k, or q, k and v are one tensor, their projections share one multiplication."""
        if q is k and k is v:
            q, k, v = self.in_proj(q).chunk(3, dim=-1)
            return q, k, v
        if q is k:
            q, k = self._project_part(q, 0, 2).chunk(2, dim=-1)
            return q, k, self._project_part(v, 2, 3)
        return self._project_part(q, 0, 1), self._project_part(k, 1, 2), self._project_part(v, 2, 3)

    def _project_part(self, x: Tensor, first: int, end: int) -> Tensor:
        """Apply the projections `first` to `end` (exclusive) to x; query is 0, key is 1, value is 2."""
        part: Tensor = self.in_proj(x, rows=slice(first * self.inner_width, end * self.inner_width))
        return part

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)  # (B, N, h D) -> (B, h, N, D)


class Cache:
    """The keys and values (B, h, M, D) that `extend` has appended so far.

    A buffer that is full is replaced by a longer one. On some processors, keys and values in bf16 are kept and returned
    in fp32 (`_CACHE_DTYPE`).
    """

    def __init__(self) -> None:
        self.length = 0  # M
        self.buffers: tuple[Tensor, Tensor] | None = None  # (B, h, at least M, D) each

    def content(self) -> tuple[Tensor, Tensor]:
        """All keys and values, (B, h, M, D) each."""
        assert self.buffers is not None, "the cache is empty"
        keys, values = self.buffers
        return keys.narrow(2, 0, self.length), values.narrow(2, 0, self.length)

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, h, N, D); returns all keys and values in the cache, (B, h, M, D) each."""
        if self.buffers is None:
            # k and v can be strided views of a projection's output. Without `contiguous`, each later product would copy
            # them.
            self.length, self.buffers = k.shape[2], (_as_cached(k), _as_cached(v))
            return self.buffers
        start, self.length = self.length, self.length + k.shape[2]
        keys, values = self.buffers
        if self.length > keys.shape[2]:
            keys, values = (F.pad(x[:, :, :start], (0, 0, 0, 2 * self.length - start)) for x in (keys, values))
            self.buffers = keys, values
        # `narrow` is one operation, where an index of three slices is three.
        keys.narrow(2, start, k.shape[2]).copy_(k)
        values.narrow(2, start, v.shape[2]).copy_(v)
        return self.content()

    def select(self, rows: Tensor) -> None:
        """Keep the batch entries with the indices `rows` (B',) int64, in this order; an index may repeat."""
        if self.buffers is not None:
            keys, values = self.content()
            self.buffers = keys[rows], values[rows]


def _without_autocast(q: Tensor) -> AbstractContextManager[object]:
    """A context in which the products of fp32 queries, which those of a cache can be, stay in fp32 on the CPU."""
    if q.is_cpu and q.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return nullcontext()


def _as_cached(x: Tensor) -> Tensor:
    """Keys or values as a cache keeps them."""
    dtype = _CACHE_DTYPE if x.is_cpu and x.dtype == torch.bfloat16 else x.dtype
    # A conversion makes a contiguous copy; without one, `to` would return a strided view as it is.
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def attention_probabilities(q: Tensor, k: Tensor, may_look: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Softmax(q k^T / sqrt(D) + bias) over unmasked keys: (B, h, N, D), (B, h, M, D) -> (B, h, N, M).

    A row sums to one; it is all zeros if all keys of its query are masked. Fused kernels never store this matrix.
    Inside `record_attention`, this function therefore computes it separately, whichever kernel computes the output.
    """
    attention = _masked_softmax(q, k, may_look, bias)
    return attention if may_look is None else attention.masked_fill(_is_fully_masked(may_look), 0)


def materialised_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    may_look: Tensor | None,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout: float,
) -> Tensor:
    """Attention as two matrix products, with all probabilities in memory.

    (B, h, N, D), (B, h, M, D), (B, h, M, D) -> (B, h, N, D). On the CPU, this function is faster than
    `_fused_attention`: in bf16, by a factor of two to three without gradients and of four to seven with gradients; in
    fp32, by up to a third (Zen 5, torch 2.15). Exceptions are inference on Intel's processors with AMX with at most
    `MAX_FUSED_QUERIES` queries, or `MIN_FUSED_QUERIES` or more, where `_fused_attention` takes 0.25 to 0.8 of the time,
    and fp32 inference with more than `MAX_FP32_INFERENCE_WEIGHTS` probabilities. For bf16 inputs, this function
    computes scores in bf16, while `_fused_attention` computes them in fp32. The error of the output is then 0.4 % (1 to
    2 % for scores above 50), against 0.2 % for `_fused_attention`.
    """
    may_look = _combined_mask(q, k, may_look, causal)
    attention = _masked_softmax(q, k, may_look, bias)
    x = (drop(attention, dropout) if dropout else attention) @ v
    return x if may_look is None else x.masked_fill(_is_fully_masked(may_look), 0)


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *, may_look: Tensor | None, bias: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """The output of `materialised_attention`, computed by `F.scaled_dot_product_attention`.

    PyTorch's option `is_causal` lets the first query attend to the first key only. With `causal`, this module lets the
    last query attend to all keys. The two masks are equal only if N equals M; otherwise an explicit mask is passed.
    """
    # In an export, lengths are symbolic and `==` gives a SymBool, but PyTorch's option must be a bool.
    is_causal = causal and may_look is None and bias is None and bool(q.shape[2] == k.shape[2])
    if not is_causal:
        may_look = _combined_mask(q, k, may_look, causal)
    mask = may_look if bias is None else _masked_bias(bias.to(q.dtype), may_look)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    # For a query whose keys are all masked, PyTorch returns zeros with a boolean mask, but the mean of v with a float
    # mask.
    return x if bias is None or may_look is None else x.masked_fill(_is_fully_masked(may_look), 0)


def _is_materialised(q: Tensor, k: Tensor) -> bool:
    """Whether to use `materialised_attention` instead of `_fused_attention`.

    `materialised_attention` is used on the CPU for at most `MAX_MATERIALISED_WEIGHTS` probabilities, with four
    exceptions: exported graphs, fp16, inference on Intel's processors with AMX with at most `MAX_FUSED_QUERIES` queries
    or `MIN_FUSED_QUERIES` or more, and fp32 inference with more than `MAX_FP32_INFERENCE_WEIGHTS` probabilities.
    """
    if q.device.type != "cpu" or torch.compiler.is_exporting():  # an exported graph must fit all shapes
        return False
    if q.dtype == torch.float16:  # scores may overflow in fp16; `_fused_attention` computes them in fp32
        return False
    if _is_fused_in_inference(q.dtype, q.shape[2]) and not q.requires_grad:
        return False
    weights = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.dtype == torch.float32 and not q.requires_grad and weights > MAX_FP32_INFERENCE_WEIGHTS:
        return False
    return weights <= MAX_MATERIALISED_WEIGHTS


def _is_fused_in_inference(dtype: torch.dtype, queries: int) -> bool:
    return dtype in _FUSED_INFERENCE_DTYPES and not MAX_FUSED_QUERIES < queries < MIN_FUSED_QUERIES


def _masked_softmax(q: Tensor, k: Tensor, may_look: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """Attention probabilities (B, h, N, M). The row of a query whose keys are all masked has no meaning.

    Callers set their results for such a query to zero. To mask a score, the lowest finite number is added to it, in the
    operation that multiplies queries and keys. With minus infinity instead, the row and the gradient of a query whose
    keys are all masked would be NaN.
    """
    batch, heads = q.shape[:2]
    if q.dtype == torch.bfloat16 and q.shape[2] > MAX_UNCENTRED_QUERIES:
        # Subtracting the mean key shifts all scores of a query by the same amount, which does not change the softmax.
        # The scores become smaller, and so do their rounding errors in bf16.
        k = k - k.mean(2, keepdim=True)
    if bias is None and may_look is not None:
        bias = q.new_zeros(may_look.shape)
    if bias is None:
        offsets, beta = q.new_zeros(1, 1, 1), 0
    else:
        offsets, beta = _masked_bias(bias.to(q.dtype), may_look), 1
        # (1 or B h, 1 or N, 1 or M)
        offsets = offsets[None] if offsets.ndim == 2 else offsets.expand(batch, heads, -1, -1).flatten(0, 1)
    factors, scale = (q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)), q.shape[-1] ** -0.5
    scores = torch.baddbmm(offsets, *factors, beta=beta, alpha=scale)  # (B h, N, M)
    return scores.softmax(dim=-1).view(batch, heads, *scores.shape[1:])


def _masked_bias(bias: Tensor, may_look: Tensor | None) -> Tensor:
    """`bias` with the lowest finite number in the places where `may_look` is False."""
    return bias if may_look is None else bias.masked_fill(~may_look, torch.finfo(bias.dtype).min)


def _is_fully_masked(may_look: Tensor) -> Tensor:
    """Whether all keys of a query are masked: (..., 1 or N, 1 or M) -> (..., 1 or N, 1) boolean."""
    return ~may_look.any(-1, keepdim=True)


def _combined_mask(q: Tensor, k: Tensor, may_look: Tensor | None, causal: bool) -> Tensor | None:
    """Combine `may_look` with the mask of `causal`, a lower triangle (N, M) whose last row is all True.

    Returns None if `may_look` is None and `causal` masks no key.
    """
    queries, keys = q.shape[2], k.shape[2]
    if not causal or queries == 1:  # a single query is the last query, which attends to all keys
        return may_look
    triangle = q.new_ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    return triangle if may_look is None else triangle & may_look


def additive_mask(may_look: Tensor, dtype: torch.dtype) -> Tensor:
    """`may_look` as a bias of `dtype`, 0 or the lowest finite number, for several attentions with the same mask.

    Every query must be permitted to look at a key. `Attention` would make the bias from `may_look` in each call, and
    check for queries without keys.
    """
    return _masked_bias(torch.zeros(may_look.shape, dtype=dtype, device=may_look.device), may_look)


@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record attention probabilities in a dict: name of an attention module -> one (B, h, N, M) tensor per call.

        with record_attention(model) as maps:
            model(images)
        maps["decoder.blocks.5.cross_attention"][0]

    Calls inside the context are recorded. The dict may also be read after the context has ended. Attention modules are
    those with the attribute `recorded_attention`: None outside this context and a list inside it, to which the module
    appends.
    """
    modules: dict[str, Any] = {
        name: module for name, module in model.named_modules() if hasattr(module, "recorded_attention")
    }
    maps: dict[str, list[Tensor]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.recorded_attention = maps[name]
    try:
        yield maps
    finally:
        for module in modules.values():
            module.recorded_attention = None
