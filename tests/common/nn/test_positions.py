"""Positions against the papers' formulas in plain Python."""

import itertools
import math
from collections import OrderedDict
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.nn.positions import Layout, Learned2d, LearnedGrid, Resampling, resample, sine, sine_2d

MASK = torch.tensor(
    [
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
        [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ],
    dtype=torch.bool,
)


def plain_sine(position: float, width: int, temperature: float = 10000.0) -> list[float]:
    """Vaswani et al., section 3.5, one channel at a time."""
    channels = []
    for channel in range(width):
        angle = position / temperature ** (2 * (channel // 2) / width)
        channels.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return channels


def plain_sine_2d(real: Tensor, width: int) -> Tensor:
    """Carion et al., A.4, one position at a time: real positions up to it in its column (row), over all of them."""
    batch, height, columns = real.shape
    result = torch.zeros(batch, height, columns, width)
    for image in range(batch):
        for i in range(height):
            for j in range(columns):
                above = sum(bool(real[image, k, j]) for k in range(i + 1))
                in_column = sum(bool(real[image, k, j]) for k in range(height))
                left = sum(bool(real[image, i, k]) for k in range(j + 1))
                in_row = sum(bool(real[image, i, k]) for k in range(columns))
                y = above / (in_column + 1e-6) * 2 * math.pi
                x = left / (in_row + 1e-6) * 2 * math.pi
                result[image, i, j] = torch.tensor(plain_sine(y, width // 2) + plain_sine(x, width // 2))
    return result


def test_sine_is_the_papers_formula() -> None:
    positions = torch.arange(60).reshape(3, 20)
    expected = torch.tensor([plain_sine(p, 16) for p in range(60)]).reshape(3, 20, 16)
    # An angle of 60 has an error of 60 * 2^-24 in fp32.
    torch.testing.assert_close(sine(positions, 16), expected, rtol=0, atol=1e-5)


def test_sine_takes_another_temperature() -> None:
    expected = torch.tensor([plain_sine(p, 8, temperature=20.0) for p in range(7)])
    torch.testing.assert_close(sine(torch.arange(7), 8, temperature=20.0), expected, rtol=0, atol=2e-6)


def test_halves_has_the_papers_values_with_all_sines_first() -> None:
    halves, paper = sine(torch.arange(40), 12, layout="halves"), sine(torch.arange(40), 12)
    assert torch.equal(halves, torch.cat([paper[:, 0::2], paper[:, 1::2]], dim=1))


@pytest.mark.parametrize("width", [2, 4, 16])
def test_halves_t2t_has_exponents_that_reach_one(width: int) -> None:
    """tensor2tensor's formula, one channel at a time; a single frequency has exponent 0."""
    half = width // 2
    expected = [
        [wave(p / 10000 ** (i / max(1, half - 1))) for wave in (math.sin, math.cos) for i in range(half)]
        for p in range(40)
    ]
    values = sine(torch.arange(40), width, layout="halves_t2t")
    torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-5)  # see the test of the paper's formula


def test_no_two_layouts_agree() -> None:
    """A model trained with one is useless with another."""
    tables = [sine(torch.arange(64), 16, layout=layout) for layout in get_args(Layout)]
    assert len(tables) == 3
    for a, b in itertools.combinations(tables, 2):
        assert (a - b).abs().max() > 1


@pytest.mark.parametrize("width", [4, 24, 256])
def test_sine_2d_is_the_papers_formula_on_padded_maps(width: int) -> None:
    torch.testing.assert_close(sine_2d(MASK, width), plain_sine_2d(MASK, width), rtol=0, atol=2e-6)


def test_sine_2d_of_an_image_does_not_move_with_its_padding() -> None:
    padded = torch.zeros(2, 9, 11, dtype=torch.bool)
    padded[0, :4, :7] = True
    padded[1] = True
    alone = sine_2d(torch.ones(1, 4, 7, dtype=torch.bool), 32)
    torch.testing.assert_close(sine_2d(padded, 32)[0, :4, :7], alone[0], rtol=0, atol=1e-6)


def test_sine_2d_gives_every_position_a_different_vector() -> None:
    table = sine_2d(torch.ones(1, 25, 34, dtype=torch.bool), 128)[0].flatten(0, 1)
    distances = torch.cdist(table, table).fill_diagonal_(torch.inf)
    assert distances.min() > 0.01


def test_learned_positions_are_column_then_row() -> None:
    positions = Learned2d(6, side=5)
    x = positions(torch.ones(2, 3, 4, dtype=torch.bool))
    assert x.shape == (2, 3, 4, 6)
    for image in range(2):
        for i in range(3):
            for j in range(4):
                expected = torch.cat([positions.columns.weight[j], positions.rows.weight[i]])
                assert torch.equal(x[image, i, j], expected)


def test_learned_positions_start_uniform_and_learn() -> None:
    torch.manual_seed(0)
    positions = Learned2d(64)
    for table in (positions.rows.weight, positions.columns.weight):
        assert table.shape == (50, 32) and table.min() >= 0 and table.max() <= 1
        assert table.mean().item() == pytest.approx(0.5, abs=0.05)
    weight = torch.randn(2, 3, 4, 64, generator=generator("weight"))
    (positions(torch.ones(2, 3, 4, dtype=torch.bool)) * weight).sum().backward()
    torch.testing.assert_close(positions.columns.weight.grad[:4], weight.sum((0, 1))[:, :32])
    torch.testing.assert_close(positions.rows.weight.grad[:3], weight.sum((0, 2))[:, 32:])


@pytest.mark.parametrize("height, width", [(51, 1), (1, 51)])
def test_a_map_larger_than_the_learned_tables_is_refused(height: int, width: int) -> None:
    positions = Learned2d(4)
    positions(torch.ones(1, 50, 50, dtype=torch.bool))
    with pytest.raises(UserError, match=f"map of {height}x{width} does not fit learned positions of 50x50"):
        positions(torch.ones(1, height, width, dtype=torch.bool))


# Learned grids, and the six conventions of resampling them.

CONVENTIONS: list[Resampling] = list(get_args(Resampling))
CHANNELS = 8


def table(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(height, width, CHANNELS, generator=generator(height, width), dtype=torch.float64).to(dtype)


def by_timm(grid: Tensor, size: tuple[int, int], convention: str) -> Tensor:
    timm_layers = pytest.importorskip("timm.layers")
    flat = grid.flatten(0, 1)[None]
    old = (grid.shape[0], grid.shape[1])
    mode = convention.partition("_")[0]
    resampled = timm_layers.resample_abs_pos_embed(flat, list(size), list(old), num_prefix_tokens=0, interpolation=mode)
    return resampled[0].unflatten(0, size)


def by_transformers(grid: Tensor, size: tuple[int, int], convention: str) -> Tensor:
    vit = pytest.importorskip("transformers.models.vit.modeling_vit")
    config = vit.ViTConfig(hidden_size=CHANNELS, num_attention_heads=2, image_size=2 * len(grid), patch_size=2)
    embeddings = vit.ViTEmbeddings(config)
    embeddings.position_embeddings.data[0, 1:] = grid.flatten(0, 1)
    resampled = embeddings.interpolate_pos_encoding(
        torch.zeros(1, size[0] * size[1] + 1, CHANNELS), *(2 * n for n in size)
    )
    return resampled.detach()[0, 1:].unflatten(0, size)


def by_torchvision(grid: Tensor, size: tuple[int, int], convention: str) -> Tensor:
    from torchvision.models.vision_transformer import interpolate_embeddings

    flat = torch.cat((torch.zeros(1, CHANNELS), grid.flatten(0, 1)))[None]
    state = interpolate_embeddings(2 * size[0], 2, OrderedDict({"encoder.pos_embedding": flat}))
    return state["encoder.pos_embedding"][0, 1:].unflatten(0, size)


def by_scipy(grid: Tensor, size: tuple[int, int], convention: str) -> Tensor:
    """As in vit_jax when it loads a checkpoint."""
    factors = (size[0] / grid.shape[0], size[1] / grid.shape[1], 1)
    return torch.from_numpy(ndimage.zoom(grid.numpy(), factors, order=1))


def by_dino(grid: Tensor, size: tuple[int, int], convention: str) -> Tensor:
    """As in DINO's interpolate_pos_encoding: coordinates are divided by (n + 0.1) / m.

    Computed by hand: weights of Keys' cubic kernel with a = -0.75 (PyTorch's), and the border repeated.
    """

    def kernel(distance: float) -> float:
        d, a = abs(distance), -0.75
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    def weights(m: int, n: int) -> Tensor:
        matrix = torch.zeros(n, m, dtype=torch.float64)
        for i in range(n):
            x = (i + 0.5) * m / (n + 0.1) - 0.5
            for j in range(math.floor(x) - 1, math.floor(x) + 3):
                matrix[i, min(max(j, 0), m - 1)] += kernel(x - j)
        return matrix

    rows, columns = (weights(m, n) for m, n in zip(grid.shape[:2], size, strict=True))
    return torch.einsum("ih,jw,hwc->ijc", rows, columns, grid.double()).float()


PEERS = {
    "bicubic_offset": by_dino,
    "bicubic_antialias": by_timm,
    "bilinear_antialias": by_timm,
    "bicubic": by_transformers,
    "bicubic_corners": by_torchvision,
    "bilinear_corners": by_scipy,
}
GRIDS = {  # transformers and torchvision take only square tables, and torchvision makes only square ones
    "bicubic": [((4, 4), (6, 6)), ((6, 6), (4, 4)), ((6, 6), (4, 9)), ((5, 5), (3, 8))],
    "bicubic_corners": [((4, 4), (6, 6)), ((6, 6), (4, 4)), ((5, 5), (8, 8))],
}
GRIDS |= {
    convention: [((4, 4), (6, 6)), ((6, 6), (4, 4)), ((4, 9), (6, 6)), ((5, 3), (2, 8))]
    for convention in CONVENTIONS[:2]
}
GRIDS["bilinear_corners"] = GRIDS["bicubic_offset"] = GRIDS["bicubic_antialias"]


@pytest.mark.parametrize(
    ("convention", "old", "new"), [(convention, *grids) for convention in CONVENTIONS for grids in GRIDS[convention]]
)
def test_each_convention_agrees_with_its_source(
    convention: Resampling, old: tuple[int, int], new: tuple[int, int]
) -> None:
    grid = table(*old)
    # fp32; torch's interpolation weights have errors of about 1e-6, and values have size three
    torch.testing.assert_close(
        resample(grid, new, convention), PEERS[convention](grid, new, convention), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_same_grid_comes_back_untouched(convention: Resampling) -> None:
    grid = table(4, 9)
    assert resample(grid, (4, 9), convention) is grid
    assert resample(grid, torch.Size((4, 9)), convention) is grid


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_another_grid_with_as_many_positions_is_resampled(convention: Resampling) -> None:
    """Both have 36 positions; the number of tokens does not distinguish them."""
    grid = table(4, 9, torch.float64)
    resampled = resample(grid, (6, 6), convention)
    assert not torch.allclose(resampled.flatten(0, 1), grid.flatten(0, 1), atol=0.1)
    if convention == "bicubic_offset":
        return  # its values are compared in test_each_convention_agrees_with_its_source
    mode, _, variant = convention.partition("_")
    options = {"align_corners": variant == "corners", "antialias": variant == "antialias"}
    expected = F.interpolate(grid.movedim(2, 0)[None], size=(6, 6), mode=mode, **options)[0].movedim(0, 2)
    torch.testing.assert_close(resampled, expected, rtol=0, atol=1e-12)


def test_no_two_conventions_agree_on_a_smaller_grid() -> None:
    resampled = [resample(table(6, 6), (4, 4), convention) for convention in CONVENTIONS]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(resampled) for b in resampled[:i])


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_constant_table_stays_constant(convention: Resampling) -> None:
    constant = torch.full((4, 9, CHANNELS), 0.7)
    torch.testing.assert_close(
        resample(constant, (7, 5), convention), torch.full((7, 5, CHANNELS), 0.7), rtol=0, atol=1e-6
    )


def test_rows_stay_rows_and_columns_columns() -> None:
    """A table of row and column numbers, one in each channel, in the convention that keeps corners."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 4), torch.linspace(0, 1, 9), indexing="ij")
    resampled = resample(torch.stack((rows, columns), dim=-1), (7, 5), "bilinear_corners")
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 7), torch.linspace(0, 1, 5), indexing="ij")
    torch.testing.assert_close(resampled, torch.stack((rows, columns), dim=-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_resampling_computes_half_types_in_fp32_and_returns_the_type_of_the_table(dtype: torch.dtype) -> None:
    grid = table(4, 4, dtype)
    resampled = resample(grid, (6, 5), "bicubic_antialias")
    compute_dtype = torch.promote_types(dtype, torch.float32)
    assert resampled.dtype == dtype
    assert torch.equal(resampled, resample(grid.to(compute_dtype), (6, 5), "bicubic_antialias").to(dtype))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_table_gets_gradients_through_its_resampling(convention: Resampling) -> None:
    grid = table(4, 3).requires_grad_()
    resample(grid, (6, 5), convention).sum().backward()
    assert grid.grad is not None and grid.grad.abs().sum() > 0
    if convention == "bicubic_antialias":
        assert grid.grad.sum().item() == pytest.approx(6 * 5 * CHANNELS, rel=1e-5), (
            "interpolation weights add up to one"
        )


def test_a_learned_grid_is_returned_row_by_row() -> None:
    positions = LearnedGrid(CHANNELS, (2, 3), on_token=False, resampling="bicubic")
    positions.grid.data = table(2, 3)
    assert positions.token is None and {*positions.state_dict()} == {"grid"}
    for number, (row, column) in enumerate(np.ndindex(2, 3)):
        assert torch.equal(positions((2, 3))[number], positions.grid[row, column])
    assert torch.equal(positions((4, 4)), resample(positions.grid, (4, 4), "bicubic").reshape(16, CHANNELS))
    assert LearnedGrid(CHANNELS, (2, 3), on_token=True, resampling="bicubic").state_dict()["token"].shape == (CHANNELS,)


class Positions(nn.Module):
    def __init__(self, convention: Resampling) -> None:
        super().__init__()
        self.positions = LearnedGrid(CHANNELS, (3, 4), on_token=False, resampling=convention)
        self.positions.grid.data = table(3, 4)

    def forward(self, image: Tensor) -> Tensor:
        return self.positions((image.shape[0], image.shape[1]))


def test_the_offset_of_dino_is_not_exported() -> None:
    """At the size of the table it would not return the table itself."""
    dynamic = {i: torch.export.Dim(name, min=2, max=64) for i, name in enumerate(("height", "width"))}
    with pytest.raises(UserError, match=r"cannot be exported with a variable image size, .* give .*resample=bicubic,"):
        torch.export.export(Positions("bicubic_offset"), (torch.empty(5, 6),), dynamic_shapes=(dynamic,))


@pytest.mark.parametrize("convention", [convention for convention in CONVENTIONS if convention != "bicubic_offset"])
def test_an_exported_grid_serves_any_size_and_returns_its_own_untouched(convention: Resampling) -> None:
    model = Positions(convention)
    dynamic = {i: torch.export.Dim(name, min=2, max=64) for i, name in enumerate(("height", "width"))}
    exported = torch.export.export(model, (torch.empty(5, 6),), dynamic_shapes=(dynamic,)).module()
    for size in ((3, 4), (4, 3), (2, 7), (12, 2)):
        assert torch.equal(exported(torch.empty(size)), model(torch.empty(size))), size
