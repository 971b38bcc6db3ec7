import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import Attention
from vit.evaluation.attention_maps import attention_map, attention_up_to_layer, encoder_attentions, rollout
from vit.models.classifier import Classifier, PositionOptions, VitBlockOptions

GRID = (2, 3)
TOKENS = [(1, True), (3, True), (0, False), (2, False)]  # (prefix, pooled by the class token)


def random_attention(layers: int, prefix: int, heads: int = 2, batch: int = 2) -> list[Tensor]:
    """Attention probabilities (B, h, N, N) of each layer."""
    generator = torch.Generator().manual_seed(0)
    tokens = prefix + GRID[0] * GRID[1]
    scores = torch.randn(layers, batch, heads, tokens, tokens, generator=generator)
    return list((3 * scores).softmax(-1))


def rolled_out_in_loops(attentions: list[Tensor], sample: int) -> list[list[float]]:
    """The paper's section 3, number by number: the matrix (N, N) that leads from the tokens to the last layer."""
    heads, tokens = attentions[0].shape[1], range(attentions[0].shape[2])
    total = [[float(i == j) for j in tokens] for i in tokens]
    for attention in attentions:
        matrix = []
        for i in tokens:
            mean = [sum(float(attention[sample, head, i, j]) for head in range(heads)) / heads for j in tokens]
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
    attentions = random_attention(depth, prefix)
    maps = rollout(attentions, prefix, by_token, GRID)
    assert maps.shape == (2, *GRID)
    for sample in range(2):
        total = torch.tensor(rolled_out_in_loops(attentions, sample))
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
def test_a_map_is_the_attention_of_the_pooled_query(prefix, by_token):
    [attention] = random_attention(1, prefix)
    maps = attention_map(attention, prefix, by_token, GRID)
    assert maps.shape == (2, 2, *GRID)
    for patch in range(6):
        row, column = divmod(patch, 3)
        rows = [attention[1, 0, query, prefix + patch] for query in ([0] if by_token else range(prefix, prefix + 6))]
        assert maps[1, 0, row, column] == pytest.approx(float(sum(rows) / len(rows)), abs=1e-6)


@pytest.mark.parametrize(("prefix", "by_token"), TOKENS)
def test_uniform_attention_gives_uniform_maps(prefix, by_token):
    """A map is 1/N everywhere. In a rollout each layer leaves a token half of its own share.

    So after 3 layers the class token keeps 1/8 and every patch gets 7/8 of 1/N; the mean of the patches also keeps 1/8.
    """
    tokens = prefix + 6
    attention = torch.full((2, 2, tokens, tokens), 1 / tokens)
    torch.testing.assert_close(attention_map(attention, prefix, by_token, GRID), torch.full((2, 2, *GRID), 1 / tokens))
    expected = 7 / 8 / tokens + (0 if by_token else 1 / 8 / 6)
    torch.testing.assert_close(rollout([attention] * 3, prefix, by_token, GRID), torch.full((2, *GRID), expected))


def test_attention_of_each_token_to_itself_alone_stays_there():
    attention = torch.eye(7).expand(1, 2, 7, 7)
    assert rollout([attention] * 4, 1, True, GRID).sum() == 0
    torch.testing.assert_close(rollout([attention] * 4, 1, False, GRID), torch.full((1, *GRID), 1 / 6))


@pytest.mark.parametrize("by_token", [True, False])
def test_the_rows_of_a_rollout_sum_to_one(by_token):
    """The token before the patches counts as one more patch here, so that the map holds the whole row."""
    attentions = random_attention(12, 1)
    row = rollout(attentions, 0, False, (1, 7))
    torch.testing.assert_close(row.sum((1, 2)), torch.ones(2))
    part = rollout(attentions, 1, by_token, GRID).sum((1, 2))
    assert ((part > 0) & (part < 1)).all()


def test_rows_that_do_not_sum_to_one_are_normalised():
    """Probabilities in bf16 are off by up to 2^-9 each, which would add up to several percent over 12 layers."""
    rounded = [attention.bfloat16() for attention in random_attention(12, 0)]
    row = rollout(rounded, 0, False, GRID)
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.sum((1, 2)), torch.ones(2))
    torch.testing.assert_close(row, rollout([attention.float() for attention in rounded], 0, False, GRID))
    assert attention_map(rounded[0], 0, False, GRID).dtype == torch.float32


@pytest.mark.parametrize(("prefix", "by_token", "grid"), [(1, True, (3, 3)), (2, True, GRID), (0, True, (1, 7))])
def test_a_grid_that_does_not_fit_the_tokens_is_an_error(prefix, by_token, grid):
    [attention] = random_attention(1, 1)
    for function, argument in ((attention_map, attention), (rollout, [attention])):
        with pytest.raises(AssertionError):
            function(argument, prefix, by_token, grid)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_recorded_attention_reproduces_the_output_of_the_layer(qk_norm):
    """The probabilities of the last layer times the values, projected, are the attention's own output."""
    model = classifier(registers=2, qk_norm=qk_norm)
    attention = model.encoder.blocks[-1].attention
    recorded: list[Tensor] = []
    handle = attention.register_forward_hook(lambda m, a, k, y: recorded.extend((k["v"], y)), with_kwargs=True)
    images = torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    [_, _, probabilities] = attention_up_to_layer(model, images, -1)
    handle.remove()
    values = attention.in_proj(recorded[0])[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)  # (B, h, N, C/h)
    expected = attention.out_proj((probabilities @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(recorded[1], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("layer", "count"), [(0, 1), (2, 3), (11, 12), (-1, 12), (-12, 1)])
def test_a_layer_comes_last_after_all_earlier_ones_in_order(layer, count):
    """Block 10 after block 9, not after block 1."""
    model = classifier(layers=12)
    images = torch.randn(1, 1, 4, 6)
    listed = attention_up_to_layer(model, images, layer)
    assert encoder_attentions(model) == [f"encoder.blocks.{i}.attention" for i in range(12)]
    with torch.no_grad():
        x = model.embed(images)
        for i, attention in enumerate(attention_up_to_layer(model, images, -1)):
            block = model.encoder.blocks[i]
            normed = block.residuals[0].norm(x)
            q, k, _ = (
                part.unflatten(-1, (2, 4)).transpose(1, 2) for part in block.attention.in_proj(normed).chunk(3, -1)
            )
            torch.testing.assert_close(attention, (q @ k.transpose(-2, -1) / 2).softmax(-1), atol=1e-6, rtol=1e-5)
            if i < count:
                assert torch.equal(listed[i], attention)
            x = block(x)
    assert len(listed) == count


@pytest.mark.parametrize("layer", [3, -4])
def test_a_missing_layer_is_an_error_with_the_number_of_layers(layer):
    with pytest.raises(
        UserError, match=rf"no layer {layer}: this model has 3 layers; give a number from 0 to 2, .* to -3"
    ):
        attention_up_to_layer(classifier(), torch.zeros(1, 1, 4, 6), layer)


@pytest.mark.parametrize("pooling", ["token", "mean", "mean_then_norm"])
@pytest.mark.parametrize("registers", [0, 2])
def test_maps_of_every_kind_of_model_at_another_image_size(pooling, registers):
    model = classifier(pooling=pooling, registers=registers)
    by_token, before = model.class_token is not None, model.before_patches
    attentions = attention_up_to_layer(model, torch.randn(2, 1, 8, 4), 1)
    assert len(attentions) == 2 and all(not attention.requires_grad for attention in attentions)
    maps = attention_map(attentions[-1], before, by_token, (4, 2))
    assert maps.shape == (2, 2, 4, 2) and (maps.sum((2, 3)) <= 1 + 1e-6).all()
    assert rollout(attentions, before, by_token, (4, 2)).shape == (2, 4, 2)


def test_maps_in_the_precision_of_training_are_near_those_in_fp32():
    """The probabilities of bf16 scores: errors of 2^-9 relative to scores of about one."""
    model, images = classifier(), torch.randn(2, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    plain = attention_up_to_layer(model, images, -1)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention_up_to_layer(model, images, -1)
        maps, rolled = attention_map(half[-1], 1, True, GRID), rollout(half, 1, True, GRID)
    torch.testing.assert_close(maps, attention_map(plain[-1], 1, True, GRID), atol=0.01, rtol=0)
    torch.testing.assert_close(rolled, rollout(plain, 1, True, GRID), atol=0.01, rtol=0)
    assert maps.dtype == rolled.dtype == torch.float32


def test_recording_leaves_the_model_unchanged():
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
