"""Blocks and stacks against PyTorch's own layers in both norm orders, in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.machine.seeds import generator
from common.nn.attention import Attention
from common.nn.blocks import (
    Block,
    BlockCache,
    BlockOptions,
    FeedForward,
    Memory,
    Residual,
    Stack,
)

BATCH, TOKENS, MEMORY = 2, 4, 5
OPTIONS = BlockOptions(width=12, heads=3, feedforward=20, pre_norm=False)
EXACT = {"rtol": 0, "atol": 1e-11}  # float64, a handful of layers with values of size ten
both_orders = pytest.mark.parametrize("pre_norm", [False, True], ids=["post-norm", "pre-norm"])

ENCODER_NAMES = {
    "attention.in_proj.": "self_attn.in_proj_",
    "attention.out_proj.": "self_attn.out_proj.",
    "feed_forward.expand.": "linear1.",
    "feed_forward.contract.": "linear2.",
    "residuals.0.norm.": "norm1.",
    "residuals.1.norm.": "norm2.",
}
DECODER_NAMES = {
    "cross_attention.in_proj.": "multihead_attn.in_proj_",
    "cross_attention.out_proj.": "multihead_attn.out_proj.",
    "residuals.2.norm.": "norm3.",
    **ENCODER_NAMES,
}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 with random parameters: norms and biases of ones and zeros would hide a swapped pair."""
    rng = generator("blocks", seed)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5, generator=rng)
    return module


def pytorchs_name(name: str) -> str:
    """`blocks.0.attention.in_proj.weight` and the like in PyTorch's words."""
    name = name.replace("blocks.", "layers.")
    for ours, theirs in DECODER_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    theirs.double().load_state_dict({pytorchs_name(name): value for name, value in ours.state_dict().items()})


def encoder_pair(pre_norm: bool) -> tuple[Block, nn.TransformerEncoderLayer]:
    options = replace(OPTIONS, pre_norm=pre_norm)
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, batch_first=True, norm_first=pre_norm)
    return Block(options), theirs


def decoder_pair(pre_norm: bool) -> tuple[Block, nn.TransformerDecoderLayer]:
    options = replace(OPTIONS, pre_norm=pre_norm)
    theirs = nn.TransformerDecoderLayer(12, 3, 20, 0.0, batch_first=True, norm_first=pre_norm)
    return Block(options, cross=True), theirs


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(*shape), requires_grad=True)


X, Y = (BATCH, TOKENS, 12), (BATCH, MEMORY, 12)
REAL_TOKENS = torch.tensor([[True] * TOKENS, [True, False, True, False]])
REAL_MEMORY = torch.tensor([[True, True, True, False, False], [True] * MEMORY])
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def assert_same_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor], a: nn.Module, b: nn.Module) -> None:
    """Gradients of outputs in one direction with respect to inputs and all parameters, paired by name."""
    direction = torch.randn(ours.shape, dtype=ours.dtype, generator=generator("direction"))
    our_parameters, their_parameters = dict(a.named_parameters()), dict(b.named_parameters())
    assert len(our_parameters) == len(their_parameters)
    our_gradients = torch.autograd.grad(ours, [*inputs, *our_parameters.values()], direction)
    paired = [their_parameters[pytorchs_name(name)] for name in our_parameters]
    their_gradients = torch.autograd.grad(theirs, [*inputs, *paired], direction)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, **EXACT)


@both_orders
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_block_is_pytorchs_encoder_layer(pre_norm: bool, masked: bool) -> None:
    ours, theirs = encoder_pair(pre_norm)
    copy_weights(randomised(ours), theirs)
    x = random_tensor(*X)
    y = ours(x, may_look=REAL_TOKENS[:, None, None] if masked else None)
    expected = theirs(x, src_key_padding_mask=~REAL_TOKENS if masked else None)
    torch.testing.assert_close(y, expected, **EXACT)
    assert_same_gradients(y, expected, [x], ours, theirs)


@both_orders
@pytest.mark.parametrize("masked", [False, True])
def test_decoder_block_is_pytorchs_decoder_layer(pre_norm: bool, masked: bool) -> None:
    ours, theirs = decoder_pair(pre_norm)
    copy_weights(randomised(ours), theirs)
    x, memory = random_tensor(*X), random_tensor(*Y)
    source = Memory(memory, memory, REAL_MEMORY[:, None, None] if masked else None)
    their_masks = {"tgt_mask": ~CAUSAL, "memory_key_padding_mask": ~REAL_MEMORY}
    y = ours(x, memory=source, may_look=CAUSAL if masked else None)
    expected = theirs(x, memory, **(their_masks if masked else {}))
    torch.testing.assert_close(y, expected, **EXACT)
    assert_same_gradients(y, expected, [x, memory], ours, theirs)


@both_orders
def test_a_stack_is_pytorchs_encoder_with_a_last_norm_in_pre_norm_only(pre_norm: bool) -> None:
    ours = randomised(Stack(replace(OPTIONS, pre_norm=pre_norm), layers=3, final_norm=pre_norm))
    _, layer = encoder_pair(pre_norm)
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(12) if pre_norm else None, enable_nested_tensor=False)
    copy_weights(ours, theirs)
    x = random_tensor(*X)
    y = ours(x, may_look=REAL_TOKENS[:, None, None])
    expected = theirs(x, src_key_padding_mask=~REAL_TOKENS)
    torch.testing.assert_close(y, expected, **EXACT)
    assert_same_gradients(y, expected, [x], ours, theirs)


@both_orders
@pytest.mark.parametrize("final_norm", [False, True])
def test_block_outputs_are_those_of_pytorchs_stacks_of_one_to_three_layers(pre_norm: bool, final_norm: bool) -> None:
    ours = randomised(Stack(replace(OPTIONS, pre_norm=pre_norm), layers=3, final_norm=final_norm, cross=True))
    _, layer = decoder_pair(pre_norm)
    theirs = nn.TransformerDecoder(layer, 3, nn.LayerNorm(12) if final_norm else None)
    copy_weights(ours, theirs)
    x, memory = random_tensor(*X), random_tensor(*Y)
    masks = {"tgt_mask": ~CAUSAL, "memory_key_padding_mask": ~REAL_MEMORY}
    outputs = ours.block_outputs(x, memory=Memory(memory, memory, REAL_MEMORY[:, None, None]), may_look=CAUSAL)

    all_layers, expected = theirs.layers, []
    for count in (1, 2, 3):
        theirs.layers, theirs.num_layers = all_layers[:count], count
        expected.append(theirs(x, memory, **masks))
    torch.testing.assert_close(torch.stack(outputs), torch.stack(expected), **EXACT)
    assert_same_gradients(torch.stack(outputs), torch.stack(expected), [x, memory], ours, theirs)


def test_positions_go_to_queries_and_keys_and_never_to_values() -> None:
    """Against nn.MultiheadAttention called as in DETR's figure 10, with norms and feed-forward as formulas."""
    block, layer = decoder_pair(False)
    copy_weights(randomised(block), layer)
    x, memory = random_tensor(*X), random_tensor(*Y)
    positions, memory_positions = random_tensor(1, TOKENS, 12), random_tensor(1, MEMORY, 12)

    y = layer.norm1(x + layer.self_attn(x + positions, x + positions, x)[0])
    y = layer.norm2(y + layer.multihead_attn(y + positions, memory + memory_positions, memory)[0])
    y = layer.norm3(y + layer.linear2(layer.linear1(y).relu()))
    source = Memory(memory + memory_positions, memory)
    torch.testing.assert_close(block(x, memory=source, positions=positions), y, **EXACT)

    stack = Stack(OPTIONS, layers=1, final_norm=False, cross=True).double()
    stack.blocks[0].load_state_dict(block.state_dict())
    torch.testing.assert_close(stack(x, memory=source, positions=positions), y, **EXACT)


@both_orders
def test_positions_of_an_encoder_go_to_every_block(pre_norm: bool) -> None:
    stack = randomised(Stack(replace(OPTIONS, pre_norm=pre_norm), layers=2, final_norm=pre_norm))
    _, layer = encoder_pair(pre_norm)
    x, positions = random_tensor(*X), random_tensor(1, TOKENS, 12)
    y = x
    for block in stack.blocks:
        copy_weights(block, layer)
        z = layer.norm1(y) if pre_norm else y
        y = y + layer.self_attn(z + positions, z + positions, z)[0]
        y = y if pre_norm else layer.norm1(y)
        z = layer.norm2(y) if pre_norm else y
        y = y + layer.linear2(layer.linear1(z).relu())
        y = y if pre_norm else layer.norm2(y)
    torch.testing.assert_close(stack(x, positions=positions), stack.norm(y), **EXACT)


@pytest.mark.parametrize("masked_out", ["one image", "everything"])
def test_tokens_that_may_look_nowhere_stay_finite_through_a_stack(masked_out: str) -> None:
    encoder = randomised(Stack(OPTIONS, layers=2, final_norm=False))
    decoder = randomised(Stack(OPTIONS, layers=2, final_norm=True, cross=True), 1)
    real = torch.ones(BATCH, 1, 1, MEMORY, dtype=torch.bool)
    real[0] = False
    if masked_out == "everything":
        real[:] = False
    x, memory = random_tensor(*X), random_tensor(*Y)
    encoded = encoder(memory, may_look=real)
    y = torch.stack(decoder.block_outputs(x, memory=Memory(encoded, encoded, real)))
    gradients = torch.autograd.grad(y.square().sum(), [x, memory, *decoder.parameters(), *encoder.parameters()])
    assert y.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    if masked_out == "one image":
        encoded = encoder(memory[1:])
        alone = torch.stack(decoder.block_outputs(x[1:], memory=Memory(encoded, encoded)))
        torch.testing.assert_close(y[:, 1:], alone, **EXACT)


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "hidden_dropout"])
def test_each_dropout_acts_in_training_and_not_in_evaluation(option: str) -> None:
    without_dropout = randomised(Block(OPTIONS))
    block = Block(replace(OPTIONS, **{option: 0.5})).double()
    block.load_state_dict(without_dropout.state_dict())
    x = random_tensor(*X)
    torch.manual_seed(0)
    assert torch.equal(block.eval()(x), without_dropout(x))
    assert not torch.allclose(block.train()(x), without_dropout(x))


def test_dropout_stands_between_a_sublayer_and_the_sum() -> None:
    """With everything dropped, the output is the residual: x in pre-norm, norm(x) in post-norm."""
    x = random_tensor(*X)
    for pre_norm in (True, False):
        residual = randomised(Residual(replace(OPTIONS, pre_norm=pre_norm, dropout=1.0)))
        assert torch.equal(residual(x, torch.sin), x if pre_norm else residual.norm(x))


def test_hidden_dropout_stands_behind_the_activation() -> None:
    """With everything dropped there, the second linear map sees zeros."""
    feed_forward = randomised(FeedForward(replace(OPTIONS, hidden_dropout=1.0, activation=nn.Sigmoid)))
    y = feed_forward(random_tensor(*X))
    assert torch.equal(y, feed_forward.contract.bias.expand_as(y))


def test_another_activation_is_used() -> None:
    ours = randomised(Block(replace(OPTIONS, activation=nn.GELU)))
    theirs = nn.TransformerEncoderLayer(12, 3, 20, 0.0, "gelu", batch_first=True)
    copy_weights(ours, theirs)
    torch.testing.assert_close(ours(random_tensor(*X)), theirs(random_tensor(*X)), **EXACT)


# Layer scale, stochastic depth and the rest of what published classifiers add.


@both_orders
def test_layer_scale_multiplies_each_channel_of_a_sublayers_output(pre_norm: bool) -> None:
    residual = randomised(Residual(replace(OPTIONS, pre_norm=pre_norm, layer_scale=0.1)))
    x = random_tensor(*X)
    sines = torch.sin(residual.norm(x) if pre_norm else x)
    branch = torch.stack([sines[..., c] * residual.scale[c] for c in range(12)])
    expected = x + branch.permute(1, 2, 0)
    torch.testing.assert_close(residual(x, torch.sin), expected if pre_norm else residual.norm(expected), **EXACT)


def test_layer_scale_starts_at_its_initial_value_in_both_residuals_of_all_blocks() -> None:
    scaled = Stack(replace(OPTIONS, layer_scale=1e-5), layers=2, final_norm=False)
    scales = {name: value for name, value in scaled.named_parameters() if name.endswith("scale")}
    assert {*scales} == {f"blocks.{i}.residuals.{j}.scale" for i in range(2) for j in range(2)}
    assert all(torch.equal(value, torch.full((12,), 1e-5)) for value in scales.values())
    assert not any("scale" in name for name in Stack(OPTIONS, layers=2, final_norm=False).state_dict())


def test_layer_scale_comes_after_dropout_and_before_the_sum() -> None:
    """With everything dropped, nothing is scaled."""
    residual = randomised(Residual(replace(OPTIONS, pre_norm=True, dropout=1.0, layer_scale=3.0)))
    x = random_tensor(*X)
    assert torch.equal(residual(x, torch.sin), x)


DROP_PATH = 0.3


def branch_of_ones(count: int, drop_path: float = DROP_PATH, **options: Any) -> Tensor:
    """The contribution of a sub-layer that returns ones to `count` samples of (2, 12), in training: (count, 2, 12)."""
    residual = Residual(replace(OPTIONS, pre_norm=True, drop_path=drop_path, **options))
    torch.manual_seed(0)
    return residual(torch.zeros(count, 2, 12), torch.ones_like)


def test_a_sample_skips_a_sublayer_as_a_whole_or_scales_it_up() -> None:
    branch = branch_of_ones(100)
    values = branch[:, 0, 0]
    assert torch.equal(branch, values[:, None, None].expand_as(branch))
    torch.testing.assert_close(values.unique(), torch.tensor([0.0, 1 / (1 - DROP_PATH)]))


def test_drop_path_keeps_the_expectation_and_samples_are_independent() -> None:
    """40,000 samples: one standard deviation of the mean is 0.0033, of a correlation of neighbours 0.005."""
    values = branch_of_ones(40_000)[:, 0, 0]
    assert values.mean().item() == pytest.approx(1, abs=0.012)
    assert (values == 0).float().mean().item() == pytest.approx(DROP_PATH, abs=0.01)
    neighbours = torch.corrcoef(torch.stack((values[:-1], values[1:])))
    assert abs(neighbours[0, 1].item()) < 0.02


def test_the_two_sublayers_of_a_block_are_dropped_independently() -> None:
    block = Block(replace(OPTIONS, pre_norm=True, drop_path=0.5))
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, TOKENS, 12).expand(400, -1, -1)
    kinds, counts = block(x).flatten(1).round(decimals=3).unique(dim=0, return_counts=True)
    assert len(kinds) == 4, "neither, either and both"
    assert counts.min() > 60, "expected 100 each, with a standard deviation of 9"


@pytest.mark.parametrize("drop_path", [0.0, 1.0])
def test_never_and_always_skipping_are_exact(drop_path: float) -> None:
    branch = branch_of_ones(10, drop_path)
    assert torch.equal(branch, torch.full_like(branch, 1 - drop_path))


def test_a_skipped_sublayer_gets_no_gradient_from_its_sample() -> None:
    residual = Residual(replace(OPTIONS, pre_norm=True, drop_path=0.5)).double()
    torch.manual_seed(0)
    x, factor = random_tensor(8, TOKENS, 12), torch.ones(8, 1, 1, dtype=torch.float64, requires_grad=True)
    y = residual(x, lambda x: x * factor)
    (gradient,) = torch.autograd.grad(y.sum(), factor)
    skipped = (y == x).flatten(1).all(dim=1)
    assert 0 < skipped.sum() < 8 and torch.equal(gradient.flatten() == 0, skipped)


@both_orders
def test_drop_path_and_a_layer_scale_of_one_do_nothing_in_evaluation(pre_norm: bool) -> None:
    options = replace(OPTIONS, pre_norm=pre_norm, layer_scale=1.0)
    without_drop_path = randomised(Stack(options, layers=3, final_norm=pre_norm))
    with_drop_path = Stack(replace(options, drop_path=0.9), layers=3, final_norm=pre_norm).double()
    with_drop_path.load_state_dict(without_drop_path.state_dict())
    x = random_tensor(*X)
    assert torch.equal(with_drop_path.eval()(x), without_drop_path(x))
    torch.manual_seed(0)
    assert not torch.allclose(with_drop_path.train()(x), without_drop_path(x))


@pytest.mark.parametrize(
    ("layers", "rates"), [(1, [0.0]), (2, [0.0, 0.2]), (5, [0.0, 0.05, 0.1, 0.15, 0.2])], ids=["one", "two", "five"]
)
def test_drop_path_grows_linearly_over_the_depth(layers: int, rates: list[float]) -> None:
    stack = Stack(replace(OPTIONS, drop_path=0.2), layers=layers, final_norm=False)
    stack_rates = [[residual.drop_path for residual in block.residuals] for block in stack.blocks]
    assert stack_rates == [pytest.approx([rate, rate]) for rate in rates]


def test_qk_norm_applies_to_every_attention_of_a_stack() -> None:
    for qk_norm, kind in ((True, nn.LayerNorm), (False, nn.Identity)):
        options = replace(OPTIONS, qk_norm=qk_norm)
        stacks = nn.ModuleList([Stack(options, layers=2, final_norm=True, cross=cross) for cross in (False, True)])
        attentions = [module for module in stacks.modules() if isinstance(module, Attention)]
        assert len(attentions) == 6
        assert all(type(norm) is kind for attention in attentions for norm in (attention.q_norm, attention.k_norm))


def test_every_norm_has_the_eps_of_the_options() -> None:
    options = replace(OPTIONS, pre_norm=True, qk_norm=True, norm_eps=0.02)
    for module in (Block(options, cross=True), Stack(options, layers=2, final_norm=True, cross=True)):
        norms = [norm for norm in module.modules() if isinstance(norm, nn.LayerNorm)]
        assert norms and {norm.eps for norm in norms} == {0.02}


def test_without_its_final_norm_an_encoder_returns_the_plain_sum() -> None:
    ours = randomised(Stack(replace(OPTIONS, pre_norm=True), layers=2, final_norm=True))
    without_norm = Stack(replace(OPTIONS, pre_norm=True), layers=2, final_norm=False).double()
    tensors = {name: value for name, value in ours.state_dict().items() if not name.startswith("norm.")}
    without_norm.load_state_dict(tensors)
    x = random_tensor(*X)
    torch.testing.assert_close(ours.norm(without_norm(x)), ours(x), rtol=0, atol=0)


# Token by token.


@both_orders
@pytest.mark.parametrize("with_positions", [False, True], ids=["plain", "positions"])
@pytest.mark.parametrize("pieces", [[1] * 9, [4, 3, 1, 1]], ids=["tokens", "chunks"])
def test_a_stack_gives_the_same_outputs_for_pieces_and_for_all_tokens_at_once(
    pre_norm: bool, with_positions: bool, pieces: list[int]
) -> None:
    """With a cache for each block; a memory's positions are in its keys, not in its values."""
    decoder = randomised(Stack(replace(OPTIONS, pre_norm=pre_norm), layers=3, final_norm=pre_norm, cross=True))
    x, memory = random_tensor(BATCH, 9, 12), random_tensor(BATCH, MEMORY, 12)
    keys = memory + random_tensor(1, MEMORY, 12) if with_positions else memory
    real = (torch.arange(MEMORY) < torch.tensor([[MEMORY], [2]]))[:, None, None]
    expected = decoder(x, causal=True, memory=Memory(keys, memory, real))
    caches = decoder.caches(Memory(keys, memory))
    outputs = [
        decoder(piece, causal=True, caches=caches, memory=Memory(None, None, real)) for piece in x.split(pieces, 1)
    ]
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, **EXACT)
    assert len(caches) == 3 and all(isinstance(cache, BlockCache) for cache in caches)
    assert {(cache.own.length, cache.memory.length) for cache in caches} == {(9, MEMORY)}


@both_orders
def test_the_last_block_output_is_the_output(pre_norm: bool) -> None:
    decoder = randomised(Stack(replace(OPTIONS, pre_norm=pre_norm), layers=3, final_norm=pre_norm, cross=True))
    x, memory = random_tensor(*X), random_tensor(BATCH, MEMORY, 12)
    outputs = decoder.block_outputs(x, memory=Memory(memory, memory))
    assert len(outputs) == 3 and torch.equal(decoder(x, memory=Memory(memory, memory)), outputs[-1])


# Custom attentions.


class Averaging(nn.Module):
    """An attention that averages all values and adds its guide."""

    def forward(self, *, v: Tensor, guide: Tensor, **_: Any) -> Tensor:
        """v (B, M, C) -> (B, 1, C)."""
        return v.mean(dim=1, keepdim=True) + guide


def test_custom_attentions_replace_ours_and_get_the_guide() -> None:
    options = replace(OPTIONS, pre_norm=True)
    guide, x, memory = random_tensor(12), random_tensor(*X), random_tensor(*Y)
    source = Memory(memory, memory)
    block = randomised(Block(options, attention=Averaging()))
    y = x + block.residuals[0].norm(x).mean(dim=1, keepdim=True) + guide
    expected = y + block.feed_forward(block.residuals[1].norm(y))
    torch.testing.assert_close(block(x, guide=guide), expected, **EXACT)
    assert not any("attention" in name for name in block.state_dict())

    stack = randomised(Stack(options, layers=2, final_norm=False, cross=True, cross_attention=lambda i: Averaging()))
    y = x
    for block in stack.blocks:
        z = block.residuals[0].norm(y)
        y = y + block.attention(q=z, k=z, v=z)
        y = y + memory.mean(dim=1, keepdim=True) + guide
        y = y + block.feed_forward(block.residuals[2].norm(y))
    torch.testing.assert_close(stack(x, memory=source, guide=guide), y, **EXACT)


def test_a_stack_makes_its_attentions_by_number() -> None:
    numbers: list[int] = []

    def make_attention(i: int) -> nn.Module:
        numbers.append(i)
        return Averaging()

    Stack(OPTIONS, layers=3, final_norm=False, attention=make_attention)
    assert numbers == [0, 1, 2]


def test_options_reach_every_attention_and_norm() -> None:
    options = replace(OPTIONS, pre_norm=True, norm="rms", qk_norm=True, attention_width=18, attention_bias=False)
    stack = Stack(options, layers=2, final_norm=True, cross=True)
    attentions = [module for module in stack.modules() if isinstance(module, Attention)]
    assert len(attentions) == 4
    for attention in attentions:
        assert attention.in_proj.weight.shape == (54, 12) and attention.out_proj.weight.shape == (12, 18)
        assert attention.in_proj.bias is None and attention.out_proj.bias is None
    norms = [module for module in stack.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 2 * 3 + 4 * 2 + 1 and not any(isinstance(module, nn.LayerNorm) for module in stack.modules())


@pytest.mark.parametrize("hooked", ["expand", "activation", "contract"])
def test_hooks_in_a_feed_forward_receive_what_they_receive_with_gradients(hooked: str) -> None:
    """Without gradients, one kernel may compute the first map and the activation."""
    torch.manual_seed(0)
    layer, x = FeedForward(OPTIONS).eval(), torch.randn(3, 12)
    received: list[tuple[Tensor, Tensor]] = []
    layer.get_submodule(hooked).register_forward_hook(lambda module, inputs, output: received.append((*inputs, output)))
    layer(x)
    with torch.no_grad():
        layer(x)
    for ours, expected in zip(received[1], received[0], strict=True):
        torch.testing.assert_close(ours, expected)
