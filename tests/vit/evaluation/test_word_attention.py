"""The attention of words inside one patch, and its picture."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.nn.attention import record_attention
from vit.evaluation.word_attention import FRAME, PatchPlace, attention_inside_patches, draw_word_attention


def tnt(*keys: str, size: tuple[int, int] = (8, 12)) -> Any:
    config = configure("train", ["model=tnt", "model.layers=3", *keys])
    torch.manual_seed(0)
    model = build(config["model"], classes=3, channels=1, image_size=size).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    nn.init.zeros_(model.positions.grid)  # so that the image decides which patch has the most attention
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["token", "mean"])
@pytest.mark.parametrize("layer", [0, 2, -1])
def test_maps_are_those_of_the_patch_with_the_most_outer_attention(pooling: str, layer: int) -> None:
    model, pixels = tnt(f"model.pooling={pooling}"), images(5, 1, 8, 12)
    attention = attention_inside_patches(model, pixels, layer)
    with record_attention(model) as maps, torch.no_grad():
        model(pixels)
    (outer,), (inner,) = (maps[f"{stack}.blocks.{layer % 3}.attention"] for stack in ("encoder", "inner"))
    assert attention.maps.shape == (5, 16, 4, 4)
    torch.testing.assert_close(attention.maps.sum((2, 3)), torch.ones(5, 16))
    for i in range(5):
        rows = outer[i, :, :1, 1:] if pooling == "token" else outer[i]
        looks = rows.mean((0, 1))  # by patch
        place = attention.places[i]
        patch = int(looks.argmax())
        assert place == (patch // 3, patch % 3, 2, 3)
        expected = inner[6 * i + patch].mean(0)
        for word in range(16):
            torch.testing.assert_close(attention.maps[i, word].flatten(), expected[word])
    assert len({*attention.places}) > 1


def test_a_missing_layer_is_refused() -> None:
    with pytest.raises(UserError, match="there is no layer 3: this model has 3 layers"):
        attention_inside_patches(tnt(), images(1, 1, 8, 12), 3)


def test_the_place_of_a_patch_is_a_box_of_pixels() -> None:
    assert PatchPlace(1, 2, 2, 3).box(8, 12) == (4, 8, 8, 12)
    assert PatchPlace(0, 0, 14, 14).box(224, 224) == (0, 0, 16, 16)


@pytest.mark.parametrize(("height", "width", "cell"), [(8, 12, 24), (224, 336, 28)])
def test_the_picture_frames_the_patch_and_shows_each_word_as_the_query(height: int, width: int, cell: int) -> None:
    """`cell` is the side of a word's cell in the tile of a patch: 4 pixels enlarged to 96, or 112 pixels, by 4."""
    image = torch.full((3, height, width), 90, dtype=torch.uint8)
    maps = torch.eye(16).unflatten(1, (4, 4))
    picture = draw_word_attention(image, maps, PatchPlace(1, 2, 2, 3))
    assert picture.dtype == torch.uint8 and len(picture) == 3 and min(picture.shape[1:]) > 300
    framed = (picture == FRAME).all(0)  # (H, W)
    left_half, right_half = framed[:, : framed.shape[1] // 2], framed[:, framed.shape[1] // 2 :]
    rows, columns = (left_half.any(axis).nonzero().flatten() for axis in (1, 0))
    assert right_half.sum() == 16 * 4 * (cell - 1), "one frame of a pixel's width for each of 16 words"
    assert rows.min() > 100 and columns.min() > 100, "the patch is at the lower right"
    tops, lefts = (right_half.any(axis).nonzero().flatten() for axis in (1, 0))
    row = picture[:, tops.min() + 2, framed.shape[1] // 2 + lefts.min() + 2 :].float().mean(0)  # of the first words
    assert row[0] > row[2 * cell] + 50, "the first word attends to itself alone, and not to the third"
