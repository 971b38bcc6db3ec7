"""Self-attention over a square map or within its windows, with relative positions.

Windows in a plain ViT are from ViTDet (Li et al. 2022, arXiv 2203.16527, section 3), relative positions that are
decomposed into rows and columns from MViTv2 (Li et al. 2022, arXiv 2112.01526, section 4.1).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.nn.attention import Attention, Cache


class WindowAttention(Attention):
    """Self-attention of the tokens of a map of `side` by `side` positions, within windows of `window` by `window`.

    If `window` is None, every token attends to the whole map. If `window` does not divide `side`, the map is padded
    with zeros at the bottom and right; as in the official code, tokens also attend to this padding.

    The score of a query q and a key that lies i rows and j columns before it is increased by q . R_i + q . C_j. The
    vectors R and C are the rows of the learned tables `rows` and `columns`, (2 S - 1, D) each, where S is the side of
    the window; row k is the vector of the distance k - (S - 1). q is the projected query, which is not divided by
    sqrt(D) here.
    """

    def __init__(self, *, width: int, heads: int, side: int, window: int | None):
        super().__init__(width=width, heads=heads)
        self.side = side
        self.window = window or side  # S
        self.rows = nn.Parameter(torch.zeros(2 * self.window - 1, width // heads))
        self.columns = nn.Parameter(torch.zeros(2 * self.window - 1, width // heads))

    def forward(
        self,
        *,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        may_look: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        cache: Cache | None = None,
        guide: Any = None,
    ) -> Tensor:
        """q (B, side^2, C), row by row -> (B, side^2, C); keys and values are those of q."""
        assert k is q and v is q and may_look is None and bias is None and not causal and cache is None
        windows = self.split(q)
        return self.join(super().forward(q=windows, k=windows, v=windows))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, may_look: Tensor | None, bias: Tensor | None, causal: bool
    ) -> Tensor:
        """See `Attention.attend`; adds the relative positions to the scores."""
        return super().attend(q, k, v, may_look=may_look, bias=self.relative_positions(q), causal=causal)

    def relative_positions(self, q: Tensor) -> Tensor:
        """What relative positions add to the scores of projected queries: (B, h, S^2, D) -> (B, h, S^2, S^2)."""
        places = torch.arange(self.window, device=q.device)
        distances = places[:, None] - places + self.window - 1  # (S, S), of query and key on one axis, from 0
        grid = q.unflatten(2, (self.window, self.window))  # (B, h, S, S, D)
        of_rows = torch.einsum("bhyxd,ykd->bhyxk", grid, self.rows[distances])
        of_columns = torch.einsum("bhyxd,xkd->bhyxk", grid, self.columns[distances])
        scores = of_rows[..., :, None] + of_columns[..., None, :]  # (B, h, S, S, S, S)
        return scores.flatten(4).flatten(2, 3)

    def split(self, x: Tensor) -> Tensor:
        """Split a map into W^2 windows, padded with zeros: (B, side^2, C) -> (B W^2, S^2, C)."""
        if self.window == self.side:
            return x
        size, count = self.window, -(-self.side // self.window)  # S, W
        padding = count * size - self.side
        x = F.pad(x.unflatten(1, (self.side, self.side)), (0, 0, 0, padding, 0, padding))  # (B, W S, W S, C)
        x = x.unflatten(2, (count, size)).unflatten(1, (count, size))  # (B, W, S, W, S, C)
        return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)  # -> (B, W, W, S, S, C) -> (B W^2, S^2, C)

    def join(self, windows: Tensor) -> Tensor:
        """Join windows to a map, without the padding: (B W^2, S^2, C) -> (B, side^2, C)."""
        if self.window == self.side:
            return windows
        size, count = self.window, -(-self.side // self.window)  # S, W
        x: Tensor = windows.unflatten(1, (size, size)).unflatten(0, (-1, count, count))  # (B, W, W, S, S, C)
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # -> (B, W, S, W, S, C) -> (B, W S, W S, C)
        return x[:, : self.side, : self.side].flatten(1, 2)
