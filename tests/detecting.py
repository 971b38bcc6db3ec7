"""Images for tests of detectors: coloured tiles of unequal sizes, padded to a batch."""

import torch
from torch import Tensor

from common.machine.seeds import generator


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    """Images of coloured tiles of 16 pixels."""
    images = []
    for height, width in sizes:
        tiles = 3 * torch.randn(3, height // 16 + 1, width // 16 + 1, generator=generator(height, width))
        images.append(tiles.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width])
    return images


def batch(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Zero pad images at the bottom and right to one size, as `collate` does."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    padded = torch.zeros(len(images), 3, *sizes.amax(0).tolist(), dtype=images[0].dtype)
    for image, row in zip(images, padded, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return padded, sizes
