"""Position encodings: fixed sines in one and two dimensions, and learned tables with their resampling.

Sine encodings are from Vaswani et al. 2017 (arXiv 1706.03762, section 3.5), and in two dimensions from Carion et al.
2020 (arXiv 2005.12872, section A.4).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

# Three layouts of sine encodings are in use. A model works only with the layout that it was trained with.
Layout = Literal[
    "interleaved",  # the paper's
    "halves",  # Marian's (and transformers' for Marian models): the paper's values, sines before cosines
    "halves_t2t",  # tensor2tensor's and fairseq's: sines before cosines, with exponents up to 1
]


def sine(positions: Tensor, width: int, temperature: float = 10000.0, layout: Layout = "interleaved") -> Tensor:
    """Sines and cosines of positions at decreasing frequencies: (...) -> (..., width), `width` even.

    For position p, temperature T and i = 0, ..., width/2 - 1, "interleaved" is PE(p, 2i) = sin(p / T^(2i/width))
    and PE(p, 2i+1) = cos(p / T^(2i/width)). "halves" has these values in another order: all sines, then all cosines.
    "halves_t2t" has all sines, then all cosines, of p / T^(i/(width/2 - 1)).
    """
    dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
    i = torch.arange(width // 2, dtype=dtype, device=positions.device)  # (width/2,)
    exponents = i / max(1, width // 2 - 1) if layout == "halves_t2t" else 2 * i / width
    angles = positions[..., None] / temperature**exponents  # (..., width/2)
    waves = (angles.sin(), angles.cos())
    if layout == "interleaved":
        return torch.stack(waves, dim=-1).flatten(-2)  # (..., width/2, 2) -> (..., width)
    return torch.cat(waves, dim=-1)


def sine_2d(
    real: Tensor,
    width: int,
    temperature: float = 10000.0,
    *,
    centred: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sine encodings of a padded map: real (B, H, W) boolean -> (B, H, W, width), `width` a multiple of four.

    `real` is False at padding. The first half of the channels encodes the row, the second half the column. Row r
    (counted from 1) has the coordinate 2 pi r / R, where R is the image's number of rows on the map, without padding.
    If `centred`, it has the coordinate of the row's centre, 2 pi (r - 0.5) / R, as in Deformable DETR (Zhu et al.
    2021, arXiv 2010.04159). The same holds for columns. Coordinates therefore do not depend on the amount of padding.
    `dtype` is float32 or float64.
    """
    rows, columns = real.cumsum(1, dtype=dtype), real.cumsum(2, dtype=dtype)  # (B, H, W)
    shift = 0.5 if centred else 0.0
    rows = (rows - shift) / (rows[:, -1:, :] + 1e-6) * 2 * math.pi
    columns = (columns - shift) / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sine(axis, width // 2, temperature) for axis in (rows, columns)], dim=-1)


class Learned1d(nn.Module):
    """A learned vector for each of the first `longest` positions of a sequence (Radford et al. 2019, GPT-2)."""

    def __init__(self, width: int, longest: int):
        super().__init__()
        self.table = nn.Embedding(longest, width)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, count: int, start: int = 0, padding: Tensor | None = None) -> Tensor:
        """Encodings of `count` tokens at the positions from `start` on: (count, C).

        With left padding, `padding` (B,) int64 is the number of padding tokens of each sequence. Positions then count
        from the first real token of each sequence, and the result is (B, count, C). Raises UserError if `start`
        + `count` exceeds `longest`.
        """
        if start + count > self.table.num_embeddings:
            raise UserError(
                f"a sequence of {start + count:,} tokens does not fit {self.table.num_embeddings:,} learned positions; "
                "truncate it, or use sine positions, which have no limit."
            )
        positions = torch.arange(start, start + count, device=self.table.weight.device)  # (N,)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)  # (B, N)
        x: Tensor = self.table(positions)
        return x


class Learned2d(nn.Module):
    """A learned vector for each row and each column of a map of at most `side` by `side` positions."""

    def __init__(self, width: int, side: int = 50):
        super().__init__()
        self.rows = nn.Embedding(side, width // 2)
        self.columns = nn.Embedding(side, width // 2)
        nn.init.uniform_(self.rows.weight)
        nn.init.uniform_(self.columns.weight)

    def forward(self, real: Tensor) -> Tensor:
        """real (B, H, W) -> (B, H, W, width); the first half of the channels encodes the column, the second the row.

        Only the shape of `real` is used. Raises UserError if the map is larger than the tables.
        """
        batch, height, width = real.shape
        side = self.rows.num_embeddings
        if max(height, width) > side:
            raise UserError(
                f"A feature map of {height}x{width} does not fit learned positions of {side}x{side}; use smaller "
                "images, or sine positions, which have no limit."
            )
        columns = self.columns.weight[:width].expand(height, -1, -1)  # (H, W, C/2)
        rows = self.rows.weight[:height, None].expand(-1, width, -1)  # (H, W, C/2)
        return torch.cat((columns, rows), dim=-1).expand(batch, -1, -1, -1)


# Six methods of resampling a table of positions are in use, with different results.
Resampling = Literal[
    "bicubic_antialias",  # timm
    "bilinear_antialias",  # timm, for Google's .npz files
    "bicubic",  # transformers
    "bicubic_offset",  # the code of DINO, and of DINOv2 without registers: scales a side m to n by (n + 0.1) / m
    "bicubic_corners",  # torchvision: the corners of both grids coincide
    "bilinear_corners",  # Google's vit_jax
]


def resample(grid: Tensor, size: tuple[int, int], resampling: Resampling) -> Tensor:
    """Resample a learned table to another grid: (h, w, C) -> (*size, C).

    Returns `grid` itself if it already has this size. Both sides are compared, not their product: a grid of 4 x 9 is
    resampled to 6 x 6. Raises UserError when "bicubic_offset" is exported with a dynamic size.
    """
    # A graph that is exported with a dynamic size always resamples; at the table's own size, no value changes.
    dynamic = torch.compiler.is_exporting() and not all(isinstance(side, int) for side in size)
    if not dynamic and tuple(grid.shape[:2]) == tuple(size):
        return grid
    mode, _, variant = resampling.partition("_")
    if variant == "offset":
        return _resample_with_offset(grid, size, mode, dynamic)
    table = F.interpolate(
        grid.to(torch.promote_types(grid.dtype, torch.float32)).permute(2, 0, 1)[None],  # (h, w, C) -> (1, C, h, w)
        size=tuple(size),
        mode=mode,
        align_corners=variant == "corners",
        antialias=variant == "antialias",
    )
    return table[0].permute(1, 2, 0).to(grid.dtype)  # (1, C, H, W) -> (H, W, C)


def _resample_with_offset(grid: Tensor, size: tuple[int, int], mode: str, dynamic: bool) -> Tensor:
    """Resample by the factors (n + 0.1) / m, from sides m to sides n: (h, w, C) -> (*size, C).

    DINO (Caron et al. 2021, arXiv 2104.14294) added 0.1 so that rounding cannot make the output too small. PyTorch also
    divides coordinates by these factors, so the values differ from those of resampling by n / m.
    """
    if dynamic:
        raise UserError(
            "model.positions.resample=bicubic_offset cannot be exported with a variable image size, as its factors "
            "differ from 1 at the size of the table; give model.positions.resample=bicubic, which is equal at that "
            "size and differs slightly at others."
        )
    table = F.interpolate(
        grid.to(torch.promote_types(grid.dtype, torch.float32)).permute(2, 0, 1)[None],  # (h, w, C) -> (1, C, h, w)
        scale_factor=[(n + 0.1) / m for n, m in zip(size, grid.shape[:2], strict=True)],
        mode=mode,
    )
    return table[0].permute(1, 2, 0).to(grid.dtype)  # (1, C, H, W) -> (H, W, C)


class LearnedGrid(nn.Module):
    """A learned vector for each position of a grid of patches and, with `on_token`, one for the class token.

    For a grid of another size, the table is resampled. It is stored with two spatial axes, (h, w, C), so that the size
    of the grid can be read from a checkpoint. The model that uses this module initialises the vectors.
    """

    def __init__(self, width: int, size: tuple[int, int], *, on_token: bool, resampling: Resampling):
        super().__init__()
        self.resampling: Resampling = resampling
        self.grid = nn.Parameter(torch.empty(*size, width))
        self.token = nn.Parameter(torch.empty(width)) if on_token else None

    def forward(self, size: tuple[int, int]) -> Tensor:
        """Encodings of the positions of a grid of patches: size (h, w) -> (h * w, C), row by row.

        The class token is not included; its encoding is `token`.
        """
        return resample(self.grid, size, self.resampling).flatten(0, 1)

    def adapt(self, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Return a checkpoint's tensors with the table of the module `name` resampled to this grid."""
        table = tensors.get(f"{name}.grid")
        if table is None or table.ndim != 3:
            return tensors
        height, width, _ = self.grid.shape
        return {**tensors, f"{name}.grid": resample(table, (height, width), self.resampling)}

    def adaptations(self, tensors: dict[str, Tensor], name: str) -> list[str]:
        """Return a sentence on the resampling that `adapt` does for these tensors; an empty list if it does none."""
        table = tensors.get(f"{name}.grid")
        if table is None or table.ndim != 3 or table.shape[:2] == self.grid.shape[:2]:
            return []
        (old_rows, old_columns), (rows, columns) = table.shape[:2], self.grid.shape[:2]
        return [
            f"positions of {old_rows} x {old_columns} patches are resampled to {rows} x {columns} by "
            f"model.{name}.resample={self.resampling}"
        ]
