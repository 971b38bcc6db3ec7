"""The masked autoencoder: a ViT encodes the visible patches of an image, and a small decoder predicts the others.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3. The encoder's tensors
have the names of `vit.models.classifier.Classifier`, so a classifier can start from a checkpoint.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn.blocks import BlockOptions, Stack
from common.nn.linear import Linear
from common.nn.patches import Form, Patches
from common.nn.positions import LearnedGrid, sine
from common.types import Layers, Positive, PositiveFloat, Side


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """The sizes of the decoder: width of a token, heads of each attention, blocks, hidden width of the feed-forward."""

    width: Positive
    heads: Positive
    layers: Layers
    feedforward: Positive


class MaskedAutoencoder(nn.Module):
    """An encoder of a class token and the visible patches, and a decoder of all patches.

    Positions are fixed sines and cosines, which the state dict contains.
    """

    undecayed = ("positions", "decoder_positions")

    def __init__(
        self,
        *,
        channels: int,
        image_size: tuple[int, int],
        patch_size: Side,
        embedding: Form,
        width: Positive,
        heads: Positive,
        layers: Layers,
        feedforward: Positive,
        decoder: DecoderOptions,
        norm_eps: PositiveFloat,
    ):
        """Build the network. The data determine `channels` and `image_size`; `embedding` is as in Classifier.

        Raises UserError when a width is not a multiple of four or not divisible by its `heads`, or `image_size` not by
        `patch_size`.
        """
        super().__init__()
        for key, size, count in (("", width, heads), ("decoder.", decoder.width, decoder.heads)):
            if size % count or size % 4:
                raise UserError(
                    f"model.{key}width={size} must be divisible by model.{key}heads={count}, and by 4 for positions."
                )
        self.channels = channels
        self.patches = Patches(channels=channels, size=patch_size, width=width, form=embedding)
        grid = self.patches.grid(*image_size)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = _fixed_positions(width, grid)
        self.encoder = Stack(_block_options(width, heads, feedforward, norm_eps), layers=layers, final_norm=True)
        self.decoder_embedding = Linear(width, decoder.width)
        self.mask_token = nn.Parameter(torch.empty(decoder.width))
        self.decoder_positions = _fixed_positions(decoder.width, grid)
        options = _block_options(decoder.width, decoder.heads, decoder.feedforward, norm_eps)
        self.decoder = Stack(options, layers=decoder.layers, final_norm=True)
        self.pixels = Linear(decoder.width, patch_size**2 * channels)
        self._initialise()

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """Predict the pixels of all patches: images (B, channels, H, W), visible (B, V) -> (B, N, p * p * channels).

        `visible` are the int64 indices of the V patches of each image that the encoder receives, in any order; patches
        are numbered row by row. The predicted pixels of a patch are ordered by row, column and channel.
        """
        x = self.encode(images, visible)
        tokens = self.decoder_embedding(x)  # (B, 1 + V, D)
        grid = self.patches.grid(images.shape[-2], images.shape[-1])
        patches = self.mask_token.to(tokens.dtype).expand(images.shape[0], grid[0] * grid[1], -1)  # (B, N, D)
        patches = patches.scatter(1, visible[:, :, None].expand(-1, -1, tokens.shape[-1]), tokens[:, 1:])
        table = self.decoder_positions(grid)  # (N, D)
        assert self.decoder_positions.token is not None
        x = self.decoder(torch.cat((tokens[:, :1] + self.decoder_positions.token, patches + table), dim=1))
        with full_precision(images.device):  # as the head of a classifier
            pixels: Tensor = self.pixels(x[:, 1:].to(images.dtype))
        return pixels

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Encode the class token and the visible patches: (B, channels, H, W), (B, V) -> (B, 1 + V, C)."""
        grid = self.patches.grid(images.shape[-2], images.shape[-1])
        patches = self.patches(images) + self.positions(grid)  # (B, N, C)
        patches = patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[-1]))  # (B, V, C)
        assert self.positions.token is not None
        token = (self.class_token + self.positions.token).expand(images.shape[0], 1, -1)
        x: Tensor = self.encoder(torch.cat((token, patches), dim=1))
        return x

    def input_summary(self) -> list[str]:
        """Return a line for the start summary with the number of patches of an image."""
        rows, columns, _ = self.positions.grid.shape
        size = self.patches.size
        return [f"{rows * columns:,} patches an image: {rows} x {columns} of {size} x {size} pixels"]

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors with the fixed positions of this model's grid, if the grids differ.

        A checkpoint without a decoder gets the fixed positions of the decoder, too.
        """
        own = {"positions.grid": self.positions.grid, "decoder_positions.grid": self.decoder_positions.grid}
        replaced = {n: t for n, t in own.items() if n in tensors and _differs(tensors[n], t)}
        of_decoder = self.decoder_positions.state_dict(prefix="decoder_positions.")
        replaced |= {name: tensor for name, tensor in of_decoder.items() if name not in tensors}
        return {**tensors, **{name: tensor.detach().cpu() for name, tensor in replaced.items()}}

    def adaptations(self, tensors: dict[str, Tensor]) -> list[str]:
        """Return a sentence if `adapt` computes the positions for another grid; otherwise an empty list."""
        table = tensors.get("positions.grid")
        if table is None or not _differs(table, self.positions.grid):
            return []
        rows, columns, _ = self.positions.grid.shape
        return [
            f"the fixed positions of {table.shape[0]} x {table.shape[1]} patches become those of {rows} x {columns}"
        ]

    def _initialise(self) -> None:
        """Initialise parameters as the authors' code does: Xavier's bound is that of the joint matrix of q, k and v."""
        for name, parameter in self.named_parameters():
            if name in ("class_token", "mask_token"):
                nn.init.normal_(parameter, std=0.02)
            elif "positions" not in name and parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter.detach().view(len(parameter), -1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


def sine_table(rows: int, columns: int, width: int) -> Tensor:
    """Compute the fixed positions of a grid of patches: (rows, columns, width), `width` a multiple of four.

    The first half of the channels encodes the column and the second half the row, each by sines before cosines.
    """
    encodings = [sine(torch.arange(n, dtype=torch.float64), width // 2, layout="halves") for n in (columns, rows)]
    x, y = encodings[0].expand(rows, -1, -1), encodings[1][:, None].expand(-1, columns, -1)
    return torch.cat((x, y), dim=-1).float()


def _fixed_positions(width: int, grid: tuple[int, int]) -> LearnedGrid:
    """Return a table of positions that is not trained; that of the class token is zero."""
    positions = LearnedGrid(width, grid, on_token=True, resampling="bicubic")
    assert positions.token is not None
    with torch.no_grad():
        positions.grid.copy_(sine_table(*grid, width))
        positions.token.zero_()
    return positions.requires_grad_(False)


def _block_options(width: int, heads: int, feedforward: int, norm_eps: float) -> BlockOptions:
    return BlockOptions(
        width=width, heads=heads, feedforward=feedforward, pre_norm=True, norm_eps=norm_eps, activation=nn.GELU
    )


def _differs(table: Tensor, own: Tensor) -> bool:
    return table.ndim == 3 and table.shape != own.shape and table.shape[-1] == own.shape[-1]
