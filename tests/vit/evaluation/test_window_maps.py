"""Maps of attention within windows against sums over single tokens, and pictures of windows and biases."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from common.nn.attention import record_attention
from common.report.colours import SIGNED
from vit.evaluation.pictures import draw_attention_sheet, draw_biases
from vit.evaluation.window_maps import bias_maps, window_maps
from vit.models.swin import Swin

SIZES = [(16, 16), (14, 18), (6, 10)]


def swin(*keys: str) -> Swin:
    """A small Swin Transformer with random tensors and windows of 4 on maps of 16 x 16, 8 x 8 and 4 x 4 tokens."""
    options = ["model.depths=[2,2,1]", "model.heads=[2,2,4]", *keys]
    model: Swin = build(
        configure("train", ["model=swin", *options])["model"], classes=3, channels=1, image_size=(16, 16)
    )
    random = generator("maps")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=random)
    return model.eval()


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 1, height, width, generator=generator("images", height, width))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layer", [0, 1, 3, -1])
def test_a_map_is_the_mean_over_tokens_of_the_attention_to_a_token(size: tuple[int, int], layer: int) -> None:
    model, pixels = swin(), images(*size)
    maps, _ = window_maps(model, pixels, layer)
    scale = 2 ** [0, 0, 1, 1, 2][layer]
    height, width = (math.ceil(side / scale) for side in size)
    assert maps.shape == (2, 4 if layer == -1 else 2, height, width)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(maps.shape[:2]))
    with record_attention(model) as records, torch.no_grad():
        model(pixels)
    attention = [*records.values()][layer][0].unflatten(0, (2, -1))[1, :, 0]  # (n, S, S) of the second image, head 0
    positions = model.window_layout(layer % 5, *size, torch.device("cpu")).positions.view(len(attention), -1)
    expected = torch.zeros(height * width)
    for window, keys in zip(attention, positions.tolist(), strict=True):
        for query, weights in zip(keys, window, strict=True):
            for key, weight in zip(keys, weights, strict=True):
                if query >= 0 and key >= 0:
                    expected[key] += weight / (height * width)
    torch.testing.assert_close(maps[1, 0].flatten(), expected)


@pytest.mark.parametrize("size", SIZES)
def test_uniform_attention_gives_uniform_maps(size: tuple[int, int]) -> None:
    model = swin()
    for name, parameter in model.named_parameters():
        if "in_proj" in name or "table" in name:
            nn.init.zeros_(parameter)
    for layer in range(5):
        maps, _ = window_maps(model, images(*size), layer)
        torch.testing.assert_close(maps, torch.full_like(maps, 1 / maps[0, 0].numel()))


def test_edges_are_those_of_windows_and_of_shifted_windows() -> None:
    model = swin()
    edges = [window_maps(model, images(16, 18), layer).edges for layer in range(5)]
    assert edges == [
        ([4, 8, 12], [4, 8, 12, 16]),
        ([2, 6, 10, 14], [2, 6, 10, 14]),
        ([4], [4, 8]),
        ([2, 6], [2, 6]),
        ([], [4]),
    ]


def test_the_cell_of_a_bias_map_is_the_bias_to_the_token_at_this_place() -> None:
    model = swin()
    maps = bias_maps(model, 1)
    bias = model.stages[0].blocks[1].attention.relative_position_bias()  # (h, S, S)
    assert maps.shape == (2, 7, 7)
    query = 4 * 2 + 1  # in row 2 and column 1 of the window
    for key in range(16):
        rows, columns = key // 4 - 2, key % 4 - 1
        assert torch.equal(maps[:, 3 + rows, 3 + columns], bias[:, query, key])


@pytest.mark.parametrize("layer", [5, -6])
def test_a_missing_layer_is_refused(layer: int) -> None:
    for compute in (lambda: window_maps(swin(), images(16, 16), layer), lambda: bias_maps(swin(), layer)):
        with pytest.raises(UserError, match=f"there is no layer {layer}: this model has 5 layers"):
            compute()


def test_a_model_without_biases_is_refused() -> None:
    with pytest.raises(UserError, match=r"attention=bias: Linear has no relative position biases, .*=maps\.$"):
        bias_maps(nn.Linear(2, 2), 0)


def test_white_lines_separate_windows_in_a_sheet() -> None:
    image, maps = torch.zeros(3, 480, 480, dtype=torch.uint8), torch.rand(1, 8, 8)
    plain, lined = draw_attention_sheet(image, maps), draw_attention_sheet(image, maps, ([4], [2, 6]))
    changed = (plain != lined).any(0).nonzero()
    tile = changed[changed[:, 1] >= 480]  # of the mean, beside the image
    columns = tile[tile[:, 0] == 10][:, 1].tolist()
    assert len(columns) == 2 and columns[1] - columns[0] == 4 * 60, "two lines, four cells apart"
    assert (lined[:, 10, columns] == 255).all()


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_the_colour_of_a_bias_is_its_sign_and_size_relative_to_the_largest(scale: float) -> None:
    biases: Any = scale * torch.tensor([[[-1.0, 0.0, 1.0]], [[0.0, 0.0, 0.0]]])
    picture = draw_biases(biases)
    cells = [tuple(picture[:, 20, x].tolist()) for x in (20, 200, 380)]
    assert cells == [SIGNED[0], SIGNED[2], SIGNED[-1]]
    assert picture.dtype == torch.uint8 and picture.shape[2] > 2 * 400
    assert tuple(picture[:, 20, -200].tolist()) == SIGNED[2], "a head without biases is white"


def built(*keys: str) -> tuple[Any, nn.Module]:
    """The task of a command line, and its model in evaluation mode."""
    config = configure("train", [*keys])
    task = build(config["task"], data=build(config["data"]))
    return task, build(config["model"], **task.model_arguments()).eval()


@pytest.mark.parametrize("attention", ["maps", "bias"])
def test_a_prediction_shows_windows_or_biases_and_writes_the_same_picture(attention: str, tmp_path: Path) -> None:
    task, model = built("model=swin", f"task.predict.attention={attention}", "task.predict.layer=1")
    Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "ramp.png")
    (batch,) = task.read(str(tmp_path / "ramp.png"))
    (answer,) = task.answers(model, batch)
    assert {"maps": {"maps", "edges"}, "bias": {"bias"}}[attention] <= answer.keys()
    list(task.show(batch, [answer], tmp_path / "out"))
    shown = Image.open(io.BytesIO(task.predict(model, tmp_path / "ramp.png")._repr_png_()))
    written = Image.open(tmp_path / "out/ramp.png.attention.png")
    assert np.array_equal(np.array(shown), np.array(written)) and min(shown.size) > 400


@pytest.mark.parametrize(("model", "attention"), [("swin", "rollout"), ("vit", "bias")])
def test_the_rollout_of_a_swin_transformer_and_the_biases_of_a_vit_are_refused(model: str, attention: str) -> None:
    task, network = built(f"model={model}", f"task.predict.attention={attention}")
    batch = task.data.collate([task.data.sample("test", 0, None)])
    with pytest.raises(UserError, match=rf"task\.predict\.attention={attention}: .*use task\.predict\.attention=maps"):
        task.answers(network, batch)
