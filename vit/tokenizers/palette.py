"""A palette of colours, by which each pixel becomes one token (Chen et al. 2020, image GPT, section 3.1)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.machine.device import full_precision

MAX_DISTINCT = 2**17  # maximum number of distinct colours that k-means sees; of more, as many are chosen at random
MAX_ITERATIONS = 100  # of k-means
SEED = 0


class Palette:
    """V colours (V, channels), each value in [-1, 1] for 0 to 255, as in the authors' kmeans_centers.npy.

    `lossless` states whether the palette holds every colour of the images that it was fitted to. The index of a pixel
    then determines its value; otherwise, different values share an index.
    """

    def __init__(self, colours: Tensor, lossless: bool):
        assert colours.ndim == 2 and len(colours), colours.shape
        self.colours, self.lossless = colours.float(), lossless

    def __len__(self) -> int:
        return len(self.colours)

    @property
    def channels(self) -> int:
        """The number of channels of the images: 1 (grey) or 3 (RGB)."""
        return self.colours.shape[1]

    @classmethod
    def fit(cls, pixels: Tensor, count: int) -> "Palette":
        """Fit a palette of at most `count` colours to pixels, uint8 (n, channels).

        If the pixels have at most `count` distinct colours, the palette consists of these. Otherwise, it consists of
        the centres of k-means (Lloyd's algorithm from the start of k-means++), in which each distinct colour counts as
        often as it occurs. Colours are sorted by their channels, so that the indices of grey levels ascend.
        """
        colours, weights = _distinct(pixels.numpy())
        lossless = len(colours) <= count
        values = colours / 127.5 - 1
        if not lossless:
            from sklearn.cluster import KMeans  # slow to import

            if len(values) > MAX_DISTINCT:
                chosen = np.random.default_rng(SEED).permutation(len(values))[:MAX_DISTINCT]
                values, weights = values[chosen], weights[chosen]
            means = KMeans(min(count, len(values)), n_init=1, max_iter=MAX_ITERATIONS, random_state=SEED)
            values = means.fit(values, sample_weight=weights).cluster_centers_
            values = values[np.lexsort(values.T[::-1])]
        return cls(torch.from_numpy(values.astype(np.float32)), lossless)

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 (B, channels, H, W) -> the index of each pixel's nearest colour, row by row: int64 (B, H W)."""
        with full_precision(images.device):  # bf16 could confuse neighbouring colours
            colours = self.colours.to(images.device)
            pixels = images.flatten(2).transpose(1, 2).float() / 127.5 - 1  # (B, H W, channels)
            # The squared distance is a^2 - 2 a b + b^2, and a^2 is the same for all colours b.
            return (colours.square().sum(1) - 2 * pixels @ colours.T).argmin(-1)

    def decode(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Indices (..., H W) -> images uint8 (..., channels, H, W) of the given `size` (H, W), on the CPU."""
        values = (127.5 * (self.colours[tokens.cpu()] + 1)).round().clamp(0, 255).to(torch.uint8)  # (..., H W, c)
        images: Tensor = values.transpose(-1, -2).unflatten(-1, size)
        return images


def _distinct(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Find the distinct rows of pixels (n, channels), sorted, and the number of times that each occurs."""
    channels = pixels.shape[1]
    codes = np.zeros(len(pixels), np.int64)
    for channel in range(channels):
        codes = codes * 256 + pixels[:, channel]
    distinct, counts = np.unique(codes, return_counts=True)
    colours = np.stack([distinct // 256 ** (channels - 1 - channel) % 256 for channel in range(channels)], axis=1)
    return colours.astype(np.float64), counts
