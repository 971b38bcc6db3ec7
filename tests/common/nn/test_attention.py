"""Attention against nn.MultiheadAttention, in float64, so that a difference is a mistake and not rounding."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.machine.seeds import generator
from common.nn import attention
from common.nn.attention import Attention, Cache, additive_mask, attention_probabilities, record_attention

BATCH, QUERIES, KEYS, WIDTH, HEADS = 2, 3, 5, 12, 4
EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of a dozen terms of size one
KERNELS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]


@pytest.fixture(autouse=True, params=["materialised", "fused"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations on the CPU, which are chosen by size."""
    if request.param == "fused":
        monkeypatch.setattr(attention, "MAX_MATERIALISED_WEIGHTS", 0)
    else:
        monkeypatch.setattr(attention, "_FUSED_INFERENCE_DTYPES", ())


def ours_and_pytorchs(seed: int = 0, dropout: float = 0.0) -> tuple[Attention, nn.MultiheadAttention]:
    """Both with the same random weights and biases (both initialise biases with zero)."""
    ours = Attention(width=WIDTH, heads=HEADS, dropout=dropout).double()
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True).double()
    rng = generator("attention", seed)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5, generator=rng)
    names = {"in_proj_weight": "in_proj.weight", "in_proj_bias": "in_proj.bias"}
    theirs.load_state_dict({name: ours.state_dict()[names.get(name, name)] for name in theirs.state_dict()})
    return ours, theirs


def inputs(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(kind)
    q, k, v = (
        torch.randn(BATCH, count, WIDTH, dtype=torch.float64, generator=rng, requires_grad=True)
        for count in (QUERIES, KEYS, KEYS)
    )
    if kind == "self":
        return q, q, q
    if kind == "self with positions":  # DETR: queries and keys coincide, values do not
        return k, k, v
    if kind == "cross":
        return q, k, k
    return q, k, v


def masks(name: str, queries: int, keys: int) -> Tensor | None:
    """True = may look; each query may look at one key or more."""
    rng = generator(name)
    if name == "none":
        return None
    if name == "padding":
        return (torch.arange(keys) < torch.tensor([[keys - 1], [1]]))[:, None, None]  # (B, 1, 1, M)
    if name == "causal":
        return torch.ones(queries, keys, dtype=torch.bool).tril()
    one_key_each = torch.rand(BATCH, HEADS, queries, keys, generator=rng).argsort(-1) == 0
    return one_key_each | (torch.rand(BATCH, HEADS, queries, keys, generator=rng) < 0.5)


def pytorchs_mask(may_look: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """nn.MultiheadAttention's: True = may not look, one (N, M) matrix for each image and head."""
    if may_look is None:
        return None
    return ~may_look.expand(BATCH, HEADS, queries, keys).flatten(0, 1)


@pytest.mark.parametrize("mask", ["none", "padding", "causal", "each head"])
@pytest.mark.parametrize("kind", ["self", "self with positions", "cross", "three different"])
def test_outputs_and_gradients_are_those_of_multihead_attention(kind: str, mask: str) -> None:
    ours, theirs = ours_and_pytorchs()
    q, k, v = inputs(kind)
    may_look = masks(mask, q.shape[1], k.shape[1])

    y = ours(q=q, k=k, v=v, may_look=may_look)
    expected, _ = theirs(q, k, v, attn_mask=pytorchs_mask(may_look, q.shape[1], k.shape[1]), need_weights=False)
    torch.testing.assert_close(y, expected, **EXACT)

    leaves = list({id(x): x for x in (q, k, v)}.values())
    direction = torch.randn(y.shape, dtype=y.dtype, generator=generator("direction"))
    our_gradients = torch.autograd.grad(y, [*leaves, *ours.parameters()], direction)
    their_gradients = torch.autograd.grad(expected, [*leaves, *theirs.parameters()], direction)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, **EXACT)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name.lower())
def test_a_query_that_may_look_nowhere_gives_finite_values_and_gradients(kernel: SDPBackend) -> None:
    ours, _ = ours_and_pytorchs()
    q, k, v = inputs("three different")
    may_look = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    may_look[0] = False  # a whole image
    may_look[1, :, 2] = False  # one query of the second image
    with sdpa_kernel(kernel):
        y = ours(q=q, k=k, v=v, may_look=may_look)
        gradients = torch.autograd.grad(y.square().sum(), [q, k, v, *ours.parameters()])
        unmasked = ours(q=q[1:, :2], k=k[1:], v=v[1:])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][0].any() and not gradients[2][0].any(), "nobody looked at the keys of the first image"
    for masked in (y[0], y[1, 2:]):
        torch.testing.assert_close(masked, ours.out_proj.bias.expand_as(masked), **EXACT)
    torch.testing.assert_close(y[1:, :2], unmasked, **EXACT)


@pytest.mark.parametrize("mask", ["none", "padding", "each head"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name.lower())
def test_recorded_attention_is_multihead_attentions_with_every_kernel(kernel: SDPBackend, mask: str) -> None:
    ours, theirs = ours_and_pytorchs()
    q, k, v = inputs("three different")
    may_look = masks(mask, QUERIES, KEYS)
    theirs_mask = pytorchs_mask(may_look, QUERIES, KEYS)
    _, expected = theirs(q, k, v, attn_mask=theirs_mask, need_weights=True, average_attn_weights=False)
    with sdpa_kernel(kernel), record_attention(ours) as maps:
        y = ours(q=q, k=k, v=v, may_look=may_look)
    assert list(maps) == [""] and len(maps[""]) == 1
    torch.testing.assert_close(maps[""][0], expected, **EXACT)
    assert not maps[""][0].requires_grad
    torch.testing.assert_close(y, ours(q=q, k=k, v=v, may_look=may_look), **EXACT)


class TwoAttentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, _ = ours_and_pytorchs(1)
        self.second, _ = ours_and_pytorchs(2)

    def forward(self, x: Tensor) -> Tensor:
        for attention_module in (self.first, self.second, self.first):
            x = attention_module(q=x, k=x, v=x)
        return x


def test_recording_names_each_module_counts_each_call_and_leaves_no_trace() -> None:
    model, (x, _, _) = TwoAttentions(), inputs("self")
    with record_attention(model) as first_maps:
        model(x)
    with record_attention(model) as second_maps:
        model(x)
    model(x)
    assert {name: len(maps) for name, maps in first_maps.items()} == {"first": 2, "second": 1}
    assert all(
        torch.equal(a, b) for name in first_maps for a, b in zip(first_maps[name], second_maps[name], strict=True)
    )
    with pytest.raises(KeyError), record_attention(model) as interrupted_maps:
        model(x)
        raise KeyError
    model(x)
    assert len(interrupted_maps["second"]) == 1
    assert model.first.recorded_attention is None and model.second.recorded_attention is None


def test_probabilities_of_a_query_sum_to_one_or_are_zero_where_it_may_look_nowhere() -> None:
    q, k = (torch.randn(1, 2, count, 3, generator=generator(count)) for count in (2, 4))
    may_look = torch.tensor([[True, False, True, True], [False] * 4])
    probabilities = attention_probabilities(q, k, may_look)
    torch.testing.assert_close(probabilities.sum(-1), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    assert not probabilities[..., 0, 1].any()


def test_dropout_acts_in_training_only() -> None:
    ours, _ = ours_and_pytorchs(dropout=0.5)
    without_dropout, _ = ours_and_pytorchs()
    x, _, _ = inputs("self")
    expected = without_dropout(q=x, k=x, v=x)
    assert torch.equal(ours.eval()(q=x, k=x, v=x), expected)
    torch.manual_seed(0)
    assert not torch.allclose(ours.train()(q=x, k=x, v=x), expected)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["padding", "each head"])
def test_a_mask_as_a_bias_for_several_attentions_is_the_mask(mask: str) -> None:
    """Each query may look at a key."""
    ours, _ = ours_and_pytorchs()
    q, k, v = inputs("three different")
    may_look = masks(mask, QUERIES, KEYS)
    assert may_look is not None
    bias = additive_mask(may_look, torch.float64)
    torch.testing.assert_close(ours(q=q, k=k, v=v, bias=bias), ours(q=q, k=k, v=v, may_look=may_look), **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_inference_too_a_query_that_may_look_nowhere_gives_zeros(dtype: torch.dtype) -> None:
    ours, _ = ours_and_pytorchs()
    ours.to(dtype)
    q, k, v = (x.detach().to(dtype) for x in inputs("three different"))
    may_look = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    may_look[0], may_look[1, :, 2] = False, False
    y = ours(q=q, k=k, v=v, may_look=may_look)
    for masked in (y[0], y[1, 2:]):
        assert torch.equal(masked, ours.out_proj.bias.expand_as(masked))
    assert not torch.allclose(y[1, 0], ours.out_proj.bias)


def test_few_queries_are_fused_in_inference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_MATERIALISED_WEIGHTS", 2**24)
    monkeypatch.setattr(attention, "MAX_FUSED_QUERIES", 4)
    monkeypatch.setattr(attention, "_FUSED_INFERENCE_DTYPES", (torch.float32,))
    ours, _ = ours_and_pytorchs()
    few, many = (torch.zeros(2, HEADS, count, 3) for count in (4, 5))
    assert not ours.is_materialised(few, many) and ours.is_materialised(many, few)
    assert ours.is_materialised(few.requires_grad_(), many)


def test_the_order_of_keys_changes_nothing() -> None:
    ours, _ = ours_and_pytorchs()
    q, k, v = inputs("three different")
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = ours(q=q, k=k[:, order], v=v[:, order])
    torch.testing.assert_close(shuffled, ours(q=q, k=k, v=v), **EXACT)


def plain_attention_with_qk_norm(module: Attention, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Dehghani et al. 2023, section 2, one image, head and query at a time: outputs, and attention (B, h, N, N)."""

    def normalise(vector: Tensor, norm: nn.Module) -> Tensor:
        deviation = (vector.var(unbiased=False) + eps).sqrt()
        return (vector - vector.mean()) / deviation * norm.weight + norm.bias

    width = WIDTH // HEADS
    outputs, maps = torch.zeros_like(x), x.new_zeros(len(x), HEADS, x.shape[1], x.shape[1])
    for image, tokens in enumerate(x):
        q, k, v = (tokens @ module.in_proj.weight.T + module.in_proj.bias).split(WIDTH, dim=-1)
        head_outputs = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            keys = [normalise(row[part], module.k_norm) for row in k]
            rows = []
            for i, row in enumerate(q):
                query = normalise(row[part], module.q_norm)
                scores = torch.stack([query @ key / width**0.5 for key in keys])
                maps[image, head, i] = scores.softmax(dim=0)
                rows.append(maps[image, head, i] @ v[:, part])
            head_outputs.append(torch.stack(rows))
        outputs[image] = torch.cat(head_outputs, dim=-1) @ module.out_proj.weight.T + module.out_proj.bias
    return outputs, maps


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_qk_norm_is_a_layer_norm_of_each_heads_queries_and_keys(eps: float) -> None:
    module = Attention(width=WIDTH, heads=HEADS, qk_norm=True, norm_eps=eps).double()
    rng = generator("qk-norm")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=rng)
    x, _, _ = inputs("self")
    expected, maps = plain_attention_with_qk_norm(module, x, eps)
    with record_attention(module) as recorded:
        y = module(q=x, k=x, v=x)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(recorded[""][0], maps, **EXACT)


def test_qk_norm_keeps_scores_the_same_when_queries_and_keys_grow() -> None:
    """The purpose of qk_norm; without it the same growth moves the attention towards one key."""
    x, _, _ = inputs("self")
    for qk_norm in (True, False):
        module = Attention(width=WIDTH, heads=HEADS, qk_norm=qk_norm, norm_eps=1e-12).double()
        nn.init.zeros_(module.in_proj.bias)
        with record_attention(module) as maps:
            module(q=x, k=x, v=x)
            module.in_proj.weight.data[: 2 * WIDTH] *= 100
            module(q=x, k=x, v=x)
        before, after = maps[""]
        assert torch.allclose(before, after, rtol=0, atol=1e-9) is qk_norm


def test_without_qk_norm_a_checkpoint_has_no_keys_of_it() -> None:
    names = {"in_proj.weight", "in_proj.bias", "out_proj.weight", "out_proj.bias"}
    assert {*Attention(width=WIDTH, heads=HEADS).state_dict()} == names
    tensors = Attention(width=WIDTH, heads=HEADS, qk_norm=True).state_dict()
    assert {name: tuple(tensors[name].shape) for name in tensors.keys() - names} == {
        f"{which}_norm.{part}": (WIDTH // HEADS,) for which in "qk" for part in ("weight", "bias")
    }


def test_qk_norm_runs_in_bf16() -> None:
    """Under autocast, norms return fp32, but the attention kernels need all three inputs in one type."""
    module = Attention(width=WIDTH, heads=HEADS, qk_norm=True)
    x = inputs("self")[0].detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(q=x, k=x, v=x)
    # bf16 has 8 bits, and there are three products in sequence.
    torch.testing.assert_close(y.float(), module(q=x, k=x, v=x), rtol=0, atol=0.05)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="10 is not divisible by heads 4"):
        Attention(width=10, heads=4)


# A bias, a width of its own, and no biases on the projections.


def biases(kind: str, queries: int, keys: int) -> Tensor:
    """A bias of the scores: one for all images, or one for each."""
    batch = 1 if kind == "shared" else BATCH
    rng = generator("bias", kind)
    return torch.randn(batch, HEADS, queries, keys, dtype=torch.float64, generator=rng, requires_grad=True)


@pytest.mark.parametrize("mask", ["none", "padding", "each head"])
@pytest.mark.parametrize("kind", ["shared", "each image"])
def test_a_bias_is_multihead_attentions_float_mask_with_its_gradients(kind: str, mask: str) -> None:
    ours, theirs = ours_and_pytorchs()
    q, k, v = inputs("three different")
    bias, may_look = biases(kind, QUERIES, KEYS), masks(mask, QUERIES, KEYS)
    float_mask = bias.expand(BATCH, -1, -1, -1).flatten(0, 1)
    forbidden = pytorchs_mask(may_look, QUERIES, KEYS)
    float_mask = float_mask if forbidden is None else float_mask.masked_fill(forbidden, -torch.inf)

    y = ours(q=q, k=k, v=v, may_look=may_look, bias=bias)
    expected, expected_map = theirs(q, k, v, attn_mask=float_mask, average_attn_weights=False)
    torch.testing.assert_close(y, expected, **EXACT)
    with record_attention(ours) as maps:
        ours(q=q, k=k, v=v, may_look=may_look, bias=bias)
    torch.testing.assert_close(maps[""][0], expected_map, **EXACT)

    direction = torch.randn(y.shape, dtype=y.dtype, generator=generator("direction"))
    our_gradients = torch.autograd.grad(y, [q, k, v, bias, *ours.parameters()], direction)
    their_gradients = torch.autograd.grad(expected, [q, k, v, bias, *theirs.parameters()], direction)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_may_look_nowhere_gives_zeros_with_a_bias_too(dtype: torch.dtype) -> None:
    ours, _ = ours_and_pytorchs()
    ours.to(dtype)
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs("three different"))
    bias = biases("shared", QUERIES, KEYS).detach().to(dtype).requires_grad_()
    may_look = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    may_look[0], may_look[1, :, 2] = False, False
    y = ours(q=q, k=k, v=v, may_look=may_look, bias=bias)
    for masked in (y[0], y[1, 2:]):
        assert torch.equal(masked, ours.out_proj.bias.expand_as(masked))
    assert not torch.allclose(y[1, 0], ours.out_proj.bias)
    gradients = torch.autograd.grad(y.square().sum(), [q, k, v, bias, *ours.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[1][0].any() and not gradients[2][0].any() and not gradients[3][:, :, 2].any()


@pytest.mark.parametrize("queries", [1, 3, 5, 7])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_causal_may_look_and_bias_combine_and_the_last_query_sees_every_key(
    queries: int, padded: bool, biased: bool
) -> None:
    """With more queries than keys, the first queries see no key."""
    ours, _ = ours_and_pytorchs()
    rng = generator("combined", queries)
    q, k = (torch.randn(BATCH, n, WIDTH, dtype=torch.float64, generator=rng) for n in (queries, KEYS))
    real = (torch.arange(KEYS) >= torch.tensor([[0], [2]]))[:, None, None]  # padded on the left
    triangle = torch.tensor([[key <= query + KEYS - queries for key in range(KEYS)] for query in range(queries)])
    assert triangle[-1].all()
    may_look = triangle & real if padded else triangle
    bias = biases("each image", queries, KEYS) if biased else None
    expected = ours(q=q, k=k, v=k, may_look=may_look, bias=bias)
    y = ours(q=q, k=k, v=k, may_look=real if padded else None, bias=bias, causal=True)
    torch.testing.assert_close(y, expected, **EXACT)
    assert y.isfinite().all()


@pytest.mark.parametrize(("projection_bias", "qkv_bias"), [(True, None), (False, None), (True, False), (False, True)])
@pytest.mark.parametrize("inner_width", [8, 20])
@pytest.mark.parametrize("kind", ["self", "self with positions", "cross", "three different"])
def test_a_width_of_its_own_and_projections_without_bias(
    kind: str, inner_width: int, projection_bias: bool, qkv_bias: bool | None
) -> None:
    biases_given = {"projection_bias": projection_bias, "qkv_bias": qkv_bias}
    module = Attention(width=WIDTH, heads=HEADS, inner_width=inner_width, **biases_given).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator("inner", *parameter.shape))
    assert (module.out_proj.bias is not None) == projection_bias
    assert (module.in_proj.bias is not None) == (projection_bias if qkv_bias is None else qkv_bias)
    q, k, v = inputs(kind)
    biases = (0.0, 0.0, 0.0) if module.in_proj.bias is None else module.in_proj.bias.chunk(3)
    matrices = module.in_proj.weight.chunk(3)
    heads = [
        (x @ matrix.T + bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for x, matrix, bias in zip((q, k, v), matrices, biases, strict=True)
    ]
    probabilities = (heads[0] @ heads[1].transpose(2, 3) / (inner_width / HEADS) ** 0.5).softmax(-1)
    expected = (probabilities @ heads[2]).transpose(1, 2).flatten(2) @ module.out_proj.weight.T
    expected = expected + (module.out_proj.bias if projection_bias else 0.0)

    y = module(q=q, k=k, v=v)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(module(q=q, cache=module.cache_memory(k, v)), expected, **EXACT)
    leaves = list({id(x): x for x in (q, k, v)}.values())
    direction = torch.randn(y.shape, dtype=y.dtype, generator=generator("direction"))
    gradients = torch.autograd.grad(y, [*leaves, *module.parameters()], direction)
    expected_gradients = torch.autograd.grad(expected, [*leaves, *module.parameters()], direction)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, **EXACT)


def test_a_norm_of_queries_and_keys_can_be_an_rms_norm() -> None:
    module = Attention(width=WIDTH, heads=HEADS, qk_norm=True, norm="rms")
    assert isinstance(module.q_norm, nn.RMSNorm) and isinstance(module.k_norm, nn.RMSNorm)


# With a cache.


def test_causal_is_the_lower_triangle_with_its_gradients() -> None:
    module, _ = ours_and_pytorchs()
    x = inputs("self")[0]
    direction = torch.randn(x.shape, dtype=x.dtype, generator=generator("direction"))
    expected = module(q=x, k=x, v=x, may_look=masks("causal", QUERIES, QUERIES))
    y = module(q=x, k=x, v=x, causal=True)
    torch.testing.assert_close(y, expected, **EXACT)
    expected_gradients = torch.autograd.grad(expected, [x, *module.parameters()], direction)
    gradients = torch.autograd.grad(y, [x, *module.parameters()], direction)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, **EXACT)
    with record_attention(module) as maps:
        module(q=x, k=x, v=x, causal=True)
    assert (maps[""][0].triu(1) == 0).all()
    torch.testing.assert_close(maps[""][0].sum(-1), torch.ones(BATCH, HEADS, QUERIES, dtype=x.dtype), **EXACT)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 6], [12]])
@pytest.mark.parametrize("causal", [False, True], ids=["by mask", "causal"])
def test_tokens_in_pieces_through_a_cache_see_what_all_of_them_see_at_once(
    pieces: list[int], qk_norm: bool, causal: bool
) -> None:
    module = Attention(width=WIDTH, heads=HEADS, qk_norm=qk_norm).double()
    x = torch.randn(BATCH, 12, WIDTH, dtype=torch.float64, generator=generator("pieces"))
    expected = module(q=x, k=x, v=x, causal=True)
    cache, outputs, end = Cache(), [], 0
    for piece in x.split(pieces, dim=1):
        end += piece.shape[1]
        may_look = torch.ones(12, 12, dtype=torch.bool).tril()[end - piece.shape[1] : end, :end]
        mask = {"causal": True} if causal else {"may_look": may_look}
        outputs.append(module(q=piece, k=piece, v=piece, cache=cache, **mask))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, **EXACT)
    assert cache.length == 12


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "each head"])
@pytest.mark.parametrize("kind", ["cross", "three different"])
def test_a_cached_memory_gives_what_keys_and_values_give(kind: str, mask: str, qk_norm: bool) -> None:
    module = Attention(width=WIDTH, heads=HEADS, qk_norm=qk_norm).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator("memory", *parameter.shape))
    q, k, v = inputs(kind)
    may_look = masks(mask, QUERIES, KEYS)
    cache = module.cache_memory(k, v)
    for queries in (q, q.flip(1)):  # looking at a cache does not change it
        expected = module(q=queries, k=k, v=v, may_look=may_look if queries is q else None)
        y = module(q=queries, cache=cache, may_look=may_look if queries is q else None)
        torch.testing.assert_close(y, expected, **EXACT)
    with record_attention(module) as maps:
        module(q=q, k=k, v=v, may_look=may_look)
        module(q=q, cache=cache, may_look=may_look)
    torch.testing.assert_close(*maps[""], **EXACT)


def test_a_cache_holds_all_that_was_appended_and_rarely_reallocates() -> None:
    rng = generator("cache")
    parts = [torch.randn(2, 3, 1 + n % 3, 4, generator=rng) for n in range(60)]
    first = parts[0].clone()
    cache, addresses = Cache(), set()
    for n, part in enumerate(parts):
        keys, values = cache.extend(part, -part)
        expected = torch.cat(parts[: n + 1], dim=2)
        assert torch.equal(keys, expected) and torch.equal(values, -expected)
        assert torch.equal(cache.content()[0], expected) and cache.length == expected.shape[2]
        addresses.add(keys.data_ptr())
    assert len(addresses) < 10, "its buffers double"
    assert torch.equal(parts[0], first), "appended tensors are not written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_on_the_cpu_keeps_bf16_in_the_type_of_the_faster_products(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_CACHE_DTYPE", dtype)
    module = Attention(width=WIDTH, heads=HEADS).eval()
    x = torch.randn(2, 7, WIDTH, generator=generator("types"))
    exact = module(q=x, k=x, v=x, causal=True).detach()
    cache, steps = Cache(), []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), record_attention(module) as maps:
        for token in x.split(1, dim=1):
            steps.append(module(q=token, k=token, v=token, cache=cache, causal=True))
    assert {step.dtype for step in steps} == {torch.bfloat16}
    assert {tensor.dtype for tensor in (*cache.content(), *maps[""])} == {dtype}
    torch.testing.assert_close(torch.cat(steps, dim=1).float(), exact, rtol=0, atol=0.01 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_copies_views_so_that_products_need_not(dtype: torch.dtype) -> None:
    module = Attention(width=WIDTH, heads=HEADS).to(dtype)
    memory = torch.randn(2, 7, WIDTH, generator=generator("views")).to(dtype)
    assert all(tensor.is_contiguous() for tensor in module.cache_memory(memory, memory).content())


def test_a_cache_of_selected_rows_can_be_extended() -> None:
    rng = generator("rows")
    first, second = (torch.randn(4, 3, n, 4, generator=rng) for n in (5, 2))
    cache, rows = Cache(), torch.tensor([1, 3])
    cache.select(rows)  # of an empty cache
    for part in first.split(1, dim=2):
        cache.extend(part, -part)
    cache.select(rows)
    assert torch.equal(cache.content()[0], first[rows])
    keys, values = cache.extend(second[rows], -second[rows])
    expected = torch.cat([first, second], dim=2)[rows]
    assert torch.equal(keys, expected) and torch.equal(values, -expected)


def test_an_exported_graph_is_for_any_number_of_queries(implementation: None) -> None:
    """The choice of the implementation depends on their number, but the graph must not."""
    module, _ = ours_and_pytorchs()
    rng = generator("export")
    traced, *different_lengths = (torch.randn(2, n, WIDTH, dtype=torch.float64, generator=rng) for n in (4, 1, 2, 30))
    dynamic = {1: torch.export.Dim("queries", min=1)}
    arguments = {name: traced for name in "qkv"}
    program = torch.export.export(module, (), arguments, dynamic_shapes={name: dynamic for name in "qkv"})
    for x in (traced, *different_lengths):
        torch.testing.assert_close(program.module()(q=x, k=x, v=x), module(q=x, k=x, v=x), **EXACT)


@pytest.mark.parametrize("queries", [63, 64])
def test_inference_with_many_queries_is_fused_where_the_processor_is_faster_so(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MAX_MATERIALISED_WEIGHTS", 2**24)
    monkeypatch.setattr(attention, "_FUSED_INFERENCE_DTYPES", (torch.float32, torch.bfloat16))
    layer = Attention(width=WIDTH, heads=HEADS)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = (torch.randn(2, HEADS, count, WIDTH // HEADS, dtype=dtype) for count in (queries, 70))
        assert layer.is_materialised(q, k) == (queries < attention.MIN_FUSED_QUERIES)
        assert layer.is_materialised(q.requires_grad_(), k)
    monkeypatch.setattr(attention, "_FUSED_INFERENCE_DTYPES", ())
    assert layer.is_materialised(q.detach(), k)
