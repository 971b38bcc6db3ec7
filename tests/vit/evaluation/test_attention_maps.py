import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import Attention
from vit.evaluation.attention_maps import attention_map, attention_up_to_layer, encoder_attentions, rollout
from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions

GRID = (2, 3)
TOKENS = [(1, True), (3, True), (0, False), (2, False)]  # (prefix, pooled by the class token)


def random_weights(layers: int, prefix: int, heads: int = 2, batch: int = 2) -> list[Tensor]:
    """Attention weights (B, h, N, N) of each layer."""
    generator = torch.Generator().manual_seed(0)
    tokens = prefix + GRID[0] * GRID[1]
    scores = torch.randn(layers, batch, heads, tokens, tokens, generator=generator)
    return list((3 * scores).softmax(-1))


def rolled_out_in_loops(layers: list[Tensor], sample: int) -> list[list[float]]:
    """The paper's section 3, number by number: the matrix (N, N) that leads from the tokens to the last layer."""
    heads, tokens = layers[0].shape[1], range(layers[0].shape[2])
    total = [[float(i == j) for j in tokens] for i in tokens]
    for weights in layers:
        matrix = []
        for i in tokens:
            mean = [sum(float(weights[sample, head, i, j]) for head in range(heads)) / heads for j in tokens]
            row = [0.5 * value + 0.5 * (i == j) for j, value in enumerate(mean)]
            matrix.append([value / sum(row) for value in row])
        total = [[sum(matrix[i][k] * total[k][j] for k in tokens) for j in tokens] for i in tokens]
    return total


def classifier(*, pooling: str = "token", registers: int = 0, layers: int = 3, qk_norm: bool = False) -> Classifier:
    """A small model on images of 4 x 6 pixels with patches of 2: a grid of 2 x 3."""
    torch.manual_seed(0)
    blocks = VitBlockOptions(
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        layer_scale=None,
        qk_norm=qk_norm,
        norm_eps=1e-6,
        activation="gelu",
    )
    return Classifier(
        classes=3,
        channels=1,
        image_size=(4, 6),
        patch_size=2,
        embedding="convolution",
        width=8,
        heads=2,
        layers=layers,
        feedforward=16,
        pooling=pooling,
        registers=registers,
        positions=PositionOptions(resample="bilinear", on_token=True),
        representation=None,
        blocks=blocks,
    ).eval()


@pytest.mark.parametrize(("prefix", "by_token"), TOKENS)
@pytest.mark.parametrize("depth", [1, 3])
def test_rollout_is_that_of_plain_loops(prefix, by_token, depth):
    layers = random_weights(depth, prefix)
    maps = rollout(layers, prefix, by_token, GRID)
    assert maps.shape == (2, *GRID)
    for sample in range(2):
        total = torch.tensor(rolled_out_in_loops(layers, sample))
        rows = total[:1] if by_token else total[prefix:]
        torch.testing.assert_close(maps[sample].flatten(), rows.mean(0)[prefix:], atol=1e-6, rtol=1e-5)


def test_rollout_of_two_layers_by_hand():
    """A class token and two patches. Layer 1: all look at patch 1. Layer 2: all look at patch 2.

    A_1 = [[.5, .5, 0], [0, 1, 0], [0, .5, .5]]; the class token's row of A_2 is [.5, 0, .5].
    Their product is .5 [.5, .5, 0] + .5 [0, .5, .5] = [.25, .5, .25].
    """
    first, second = torch.zeros(2, 1, 1, 3, 3)
    first[..., 1], second[..., 2] = 1, 1
    assert rollout([first, second], 1, True, (1, 2)).tolist() == [[[0.5, 0.25]]]
    assert rollout([second, first], 1, True, (1, 2)).tolist() == [[[0.25, 0.5]]]
    assert rollout([first, second], 1, False, (1, 2)).tolist() == [[[0.625, 0.375]]]


@pytest.mark.parametrize(("prefix", "by_token"), TOKENS)
def test_a_map_is_the_row_of_what_is_pooled(prefix, by_token):
    [weights] = random_weights(1, prefix)
    maps = attention_map(weights, prefix, by_token, GRID)
    assert maps.shape == (2, 2, *GRID)
    for patch in range(6):
        row, column = divmod(patch, 3)
        looked = [weights[1, 0, query, prefix + patch] for query in ([0] if by_token else range(prefix, prefix + 6))]
        assert maps[1, 0, row, column] == pytest.approx(float(sum(looked) / len(looked)), abs=1e-6)


@pytest.mark.parametrize(("prefix", "by_token"), TOKENS)
def test_uniform_attention_gives_uniform_maps(prefix, by_token):
    """A map is 1/N everywhere. Each of L layers keeps half of what a token has for itself.

    So after 3 layers the class token keeps 1/8 and every patch gets 7/8 of 1/N; the mean of the patches also keeps 1/8.
    """
    tokens = prefix + 6
    weights = torch.full((2, 2, tokens, tokens), 1 / tokens)
    torch.testing.assert_close(attention_map(weights, prefix, by_token, GRID), torch.full((2, 2, *GRID), 1 / tokens))
    expected = 7 / 8 / tokens + (0 if by_token else 1 / 8 / 6)
    torch.testing.assert_close(rollout([weights] * 3, prefix, by_token, GRID), torch.full((2, *GRID), expected))


def test_attention_of_each_token_to_itself_alone_never_leaves_it():
    weights = torch.eye(7).expand(1, 2, 7, 7)
    assert rollout([weights] * 4, 1, True, GRID).sum() == 0
    torch.testing.assert_close(rollout([weights] * 4, 1, False, GRID), torch.full((1, *GRID), 1 / 6))


@pytest.mark.parametrize("by_token", [True, False])
def test_the_rows_of_a_rollout_sum_to_one(by_token):
    """Seen with one more patch in place of each token before the patches, so that the map holds the whole row."""
    layers = random_weights(12, 1)
    row = rollout(layers, 0, False, (1, 7))
    torch.testing.assert_close(row.sum((1, 2)), torch.ones(2))
    part = rollout(layers, 1, by_token, GRID).sum((1, 2))
    assert ((part > 0) & (part < 1)).all()


def test_rows_that_do_not_sum_to_one_are_mended():
    """Weights in bf16 are off by up to 2^-9 each, which 12 layers would add up to several percent."""
    rounded = [weights.bfloat16() for weights in random_weights(12, 0)]
    row = rollout(rounded, 0, False, GRID)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(row, rollout([weights.float() for weights in rounded], 0, False, GRID))
    assert attention_map(rounded[0], 0, False, GRID).dtype == torch.float32


@pytest.mark.parametrize(("prefix", "by_token", "grid"), [(1, True, (3, 3)), (2, True, GRID), (0, True, (1, 7))])
def test_a_grid_that_does_not_fit_the_tokens_is_an_error(prefix, by_token, grid):
    [weights] = random_weights(1, 1)
    for function, argument in ((attention_map, weights), (rollout, [weights])):
        with pytest.raises(AssertionError):
            function(argument, prefix, by_token, grid)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_weights_explain_what_the_attention_gives(qk_norm):
    """The weights of the last layer times the values, projected, are the attention's own output."""
    model = classifier(registers=2, qk_norm=qk_norm)
    attention = model.encoder.blocks[-1].attention
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(lambda m, a, k, y: seen.extend((k["v"], y)), with_kwargs=True)
    images = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    [_, _, weights] = attention_up_to_layer(model, images, -1)
    handle.remove()
    values = attention.in_proj(seen[0])[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)  # (B, h, N, C/h)
    expected = attention.out_proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen[1], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("layer", "count"), [(0, 1), (2, 3), (11, 12), (-1, 12), (-12, 1)])
def test_a_layer_comes_last_after_all_earlier_ones_in_order(layer, count):
    """Block 10 after block 9, not after block 1."""
    model = classifier(layers=12)
    images = torch.randn(1, 1, 4, 6)
    listed = attention_up_to_layer(model, images, layer)
    assert encoder_attentions(model) == [f"encoder.blocks.{i}.attention" for i in range(12)]
    with torch.no_grad():
        x = model.embed(images)
        for i, weights in enumerate(attention_up_to_layer(model, images, -1)):
            block = model.encoder.blocks[i]
            normed = block.residuals[0].norm(x)
            q, k, _ = (
                part.unflatten(-1, (2, 4)).transpose(1, 2) for part in block.attention.in_proj(normed).chunk(3, -1)
            )
            torch.testing.assert_close(weights, (q @ k.transpose(-2, -1) / 2).softmax(-1), atol=1e-6, rtol=1e-5)
            if i < count:
                assert torch.equal(listed[i], weights)
            x = block(x)
    assert len(listed) == count


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_an_error_that_says_how_many_there_are(layer):
    with pytest.raises(
        UserError, match=rf"no layer {layer}: this model has 3 layers; give a number from 0 to 2, .* to -3"
    ):
        attention_up_to_layer(classifier(), torch.zeros(1, 1, 4, 6), layer)


@pytest.mark.parametrize("pooling", ["token", "mean", "mean_then_norm"])
@pytest.mark.parametrize("registers", [0, 2])
def test_maps_of_every_kind_of_model_at_another_image_size(pooling, registers):
    model = classifier(pooling=pooling, registers=registers)
    by_token, before = model.class_token is not None, model.before_patches
    layers = attention_up_to_layer(model, torch.randn(2, 1, 8, 4), 1)
    assert len(layers) == 2 and all(not weights.requires_grad for weights in layers)
    maps = attention_map(layers[-1], before, by_token, (4, 2))
    assert maps.shape == (2, 2, 4, 2) and (maps.sum((2, 3)) <= 1 + 1e-6).all()
    assert rollout(layers, before, by_token, (4, 2)).shape == (2, 4, 2)


def test_maps_in_the_precision_of_training_are_near_those_in_fp32():
    """The weights of bf16 scores: errors of 2^-9 relative to scores of about one."""
    model, images = classifier(), torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    plain = attention_up_to_layer(model, images, -1)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention_up_to_layer(model, images, -1)
        maps, rolled = attention_map(half[-1], 1, True, GRID), rollout(half, 1, True, GRID)
    torch.testing.assert_close(maps, attention_map(plain[-1], 1, True, GRID), atol=0.01, rtol=0)
    torch.testing.assert_close(rolled, rollout(plain, 1, True, GRID), atol=0.01, rtol=0)
    assert maps.dtype == rolled.dtype == torch.float32


def test_watching_leaves_nothing_behind():
    model, images = classifier(), torch.randn(1, 1, 4, 6)
    with torch.no_grad():
        before = model(images)
        attention_up_to_layer(model, images, 0)
        assert torch.equal(model(images), before)
    assert all(module.recorded_attention is None for module in model.modules() if isinstance(module, Attention))


def test_attention_outside_the_encoder_is_not_counted():
    model = classifier(layers=2)
    model.pooler = Attention(width=8, heads=2)
    assert len(encoder_attentions(model)) == 2
    with pytest.raises(AssertionError, match="no attention"):
        encoder_attentions(nn.Linear(1, 1))
