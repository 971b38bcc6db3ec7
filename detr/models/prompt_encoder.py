"""The prompt encoder of SAM (Kirillov et al. 2023, arXiv 2304.02643, section 3 and appendix A).

Prompts are a dict of tensors, of N prompts for the B images of a batch. A prompt asks for the masks of one object:

image: (N,) int64, the index of each prompt's image in the batch.
points: (N, P, 2) x and y in pixels of the images that the model receives; the centre of the first pixel is (0, 0).
labels: (N, P) int64, what each point is: one of the constants below.
masks: (N, 4h, 4w) logits of a mask that is to be improved, on the maps of `MaskDecoder`; this key may be missing.
"""

import math

import torch
from torch import Tensor, nn

from common.nn.norms import LayerNorm2d

Prompts = dict[str, Tensor]

BACKGROUND, OBJECT, TOP_LEFT, BOTTOM_RIGHT = range(4)  # labels of points; the last two are the corners of a box
PADDING = -2  # label of an entry of `points` that does not exist, since other prompts of the batch have more points


class PromptEncoder(nn.Module):
    """Encodes points and boxes as tokens, and masks as maps that are added to the image embedding.

    A position (x, y) is encoded by sines and cosines of random frequencies (Tancik et al. 2020, arXiv 2006.10739). A
    prompt without a box gets an additional token "not a point", as in the official code.
    """

    frequencies: Tensor

    def __init__(self, *, width: int, image_size: int, side: int, mask_channels: int):
        """Create the encoder.

        Args:
            width: the number of channels C of tokens and maps.
            image_size: side of the images in pixels.
            side: side of the image embedding.
            mask_channels: channels of the last but one map that is computed from a mask.
        """
        super().__init__()
        self.image_size, self.side = image_size, side
        self.register_buffer("frequencies", torch.randn(2, width // 2))
        self.labels = nn.Embedding(4, width)
        self.no_point = nn.Embedding(1, width)
        self.no_mask = nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, stride=2),
            LayerNorm2d(mask_channels // 4, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, stride=2),
            LayerNorm2d(mask_channels, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(mask_channels, width, 1),
        )

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (N, P + 1, C), their mask `real` (N, P + 1), and maps (N or 1, C, h, w or 1, 1).

        `real` is False for tokens that do not exist. The maps are to be added to the image embedding.
        """
        labels = prompts["labels"]
        has_box = (labels == TOP_LEFT).any(1, keepdim=True)  # (N, 1)
        positions = self.encode((prompts["points"] + 0.5) / self.image_size)  # (N, P, C)
        points = positions + self.labels(labels.clamp(min=0))
        tokens = torch.cat((points, self.no_point.weight.expand(len(points), 1, -1)), dim=1)
        real = torch.cat((labels != PADDING, ~has_box), dim=1)
        if "masks" not in prompts:
            return tokens, real, self.no_mask.weight[..., None, None]
        return tokens, real, self.mask_downscaling(prompts["masks"][:, None])

    def encode(self, positions: Tensor) -> Tensor:
        """Encode relative x and y: (..., 2) -> (..., C)."""
        x, y = (2 * positions - 1).unbind(-1)
        # Products of scalars stay in fp32 under autocast; a matrix product in bf16 would be too inexact.
        angles = 2 * math.pi * (x[..., None] * self.frequencies[0] + y[..., None] * self.frequencies[1])
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def map_positions(self) -> Tensor:
        """Encode the centres of the image embedding's positions, row by row: (hw, C)."""
        centres = (
            torch.arange(self.side, device=self.frequencies.device, dtype=self.frequencies.dtype) + 0.5
        ) / self.side
        rows, columns = torch.meshgrid(centres, centres, indexing="ij")  # (h, w)
        return self.encode(torch.stack((columns, rows), dim=-1)).flatten(0, 1)
