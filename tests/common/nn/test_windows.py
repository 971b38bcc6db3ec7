"""A Block with a window attention and its own bias table, against torchvision's Swin block."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock

from common.machine.seeds import generator
from common.nn import attention
from common.nn.attention import Attention
from common.nn.blocks import Block, BlockOptions

WIDTH, HEADS, SIDE, WINDOW = 24, 3, 12, 4
EXACT = {"rtol": 0, "atol": 1e-11}  # float64, one block with values of size ten
THEIR_NAMES = {
    "attention.table": "attn.relative_position_bias_table",
    "attention.inner.in_proj": "attn.qkv",
    "attention.inner.out_proj": "attn.proj",
    "residuals.0.norm": "norm1",
    "residuals.1.norm": "norm2",
    "feed_forward.expand": "mlp.0",
    "feed_forward.contract": "mlp.3",
}


class Windows(nn.Module):
    """Attention within squares of a map, which may be shifted (Liu et al. 2021, arXiv 2103.14030, section 3.2)."""

    def __init__(self, shift: int):
        super().__init__()
        self.shift = shift
        self.inner = Attention(width=WIDTH, heads=HEADS)
        self.table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 2, HEADS))

    def forward(self, *, q: Tensor, guide: tuple[int, int], **_: Any) -> Tensor:
        """q (B, HW, C) of a map of `guide` = (H, W) -> (B, HW, C)."""
        x = q.unflatten(1, guide).roll((-self.shift, -self.shift), (1, 2))  # (B, HW, C) -> (B, H, W, C)
        x = windows(x)  # (B n, ww, C)
        x = self.inner(q=x, k=x, v=x, bias=self.bias(), may_look=self.may_look(len(q), guide) if self.shift else None)
        x = x.view(len(q), guide[0] // WINDOW, guide[1] // WINDOW, WINDOW, WINDOW, WIDTH).transpose(2, 3)
        return x.reshape(len(q), *guide, WIDTH).roll((self.shift, self.shift), (1, 2)).flatten(1, 2)

    def bias(self) -> Tensor:
        """(1, h, ww, ww), by the distance in rows and columns."""
        positions = torch.cartesian_prod(torch.arange(WINDOW), torch.arange(WINDOW))  # (ww, 2)
        distance = positions[:, None] - positions + WINDOW - 1  # (ww, ww, 2)
        return self.table[distance[..., 0] * (2 * WINDOW - 1) + distance[..., 1]].permute(2, 0, 1)[None]

    def may_look(self, batch: int, size: tuple[int, int]) -> Tensor:
        """(B n, 1, ww, ww): pixels that were neighbours before the shift."""
        regions = [(torch.arange(s) >= s - WINDOW).long() + (torch.arange(s) >= s - self.shift) for s in size]
        region = (regions[0][:, None] * 3 + regions[1])[None, :, :, None]
        region = windows(region)[..., 0]  # (n, ww)
        return (region[:, :, None] == region[:, None])[:, None].repeat(batch, 1, 1, 1)


def windows(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B n, ww, C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels).transpose(2, 3)
    return x.reshape(-1, WINDOW * WINDOW, channels)


@pytest.mark.parametrize("implementation", ["materialised", "fused"])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_block_with_a_window_attention_is_torchvisions(
    shift: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation == "fused":
        monkeypatch.setattr(attention, "MAX_MATERIALISED_WEIGHTS", 0)
    theirs = SwinTransformerBlock(WIDTH, HEADS, [WINDOW, WINDOW], [shift, shift]).double()
    rng = generator("swin")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5, generator=rng)
    options = BlockOptions(
        width=WIDTH, heads=HEADS, feedforward=4 * WIDTH, pre_norm=True, activation=nn.GELU, norm_eps=1e-5
    )
    ours = Block(options, attention=Windows(shift)).double()
    values = theirs.state_dict()
    ours.load_state_dict({name: values[their_name(name)] for name in ours.state_dict()})

    size = (SIDE, 2 * WINDOW)
    x = torch.randn(2, *size, WIDTH, dtype=torch.float64, generator=rng, requires_grad=True)
    y, expected = ours(x.flatten(1, 2), guide=size).view_as(x), theirs(x)
    torch.testing.assert_close(y, expected, **EXACT)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=rng)
    parameters = dict(theirs.named_parameters())
    our_gradients = torch.autograd.grad(y, [x, *ours.parameters()], direction)
    their_parameters = [parameters[their_name(name)] for name, _ in ours.named_parameters()]
    assert len(their_parameters) == len(parameters)
    their_gradients = torch.autograd.grad(expected, [x, *their_parameters], direction)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-11, atol=1e-10)


def their_name(name: str) -> str:
    for ours, theirs in THEIR_NAMES.items():
        name = name.replace(ours, theirs)
    return name
