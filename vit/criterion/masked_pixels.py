"""The loss of a masked autoencoder: the error of the pixels of masked patches.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from common.machine.seeds import generator
from common.types import Fraction

EPS = 1e-6  # added to the variance of a patch's pixels, as in the authors' code


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """Options of masking and of the loss.

    share: the share of patches that are masked; int(N * (1 - share)) of N patches stay visible.
    normalise: whether the pixels of each patch are normalised by their own mean and variance before the loss
        (section 3, "reconstruction target"); the paper's best results need it, but pictures lose the patches' colours.
    """

    share: Fraction
    normalise: bool

    def visible_count(self, patches: int) -> int:
        """Return the number of visible patches of `patches`; raises UserError if none is visible or none is masked."""
        count = int(patches * (1 - self.share))
        if not 0 < count < patches:
            raise UserError(
                f"task.mask.share={self.share} leaves {count} of {patches} patches visible; at least one must be "
                "visible and one masked: give another share, or a smaller model.patch_size."
            )
        return count


def sample_visible(options: MaskOptions, seeds: Sequence[int], views: int, patches: int) -> Tensor:
    """Choose the visible patches of images at random: int64 (B, V).

    There is a seed for each sample, and B / len(seeds) adjacent images are views of one sample. The choice depends only
    on an image's seed and the number of its view.
    """
    noise = [torch.rand(views // len(seeds), patches, generator=generator("mask", seed)) for seed in seeds]
    return torch.cat(noise).argsort(dim=1, stable=True)[:, : options.visible_count(patches)]


def masked_patches(visible: Tensor, patches: int) -> Tensor:
    """Return which patches are masked: visible (B, V) int64 -> bool (B, N)."""
    masked = torch.ones(len(visible), patches, dtype=torch.bool, device=visible.device)
    return masked.scatter(1, visible, False)


def masked_error(options: MaskOptions, predicted: Tensor, images: Tensor, masked: Tensor, size: int) -> Tensor:
    """Compute the mean squared error of each image over the pixels of its masked patches, in fp32 or higher: (B,).

    predicted (B, N, p * p * C), images (B, C, H, W), masked (B, N); `size` is p.
    """
    targets = patch_pixels(images, size)
    if options.normalise:
        mean, deviation = patch_statistics(targets)
        targets = (targets - mean) / deviation
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    errors = (predicted - targets).square().mean(dim=-1)  # (B, N)
    return (errors * masked).sum(dim=1) / masked.sum(dim=1)


def patch_pixels(images: Tensor, size: int) -> Tensor:
    """Flatten the pixels of each patch, by row, column and channel: (B, C, H, W) -> (B, N, p * p * C)."""
    x = torch.unflatten(torch.unflatten(images, 3, (-1, size)), 2, (-1, size))  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def patch_images(pixels: Tensor, size: int, grid: tuple[int, int]) -> Tensor:
    """Put patches together to images, the inverse of `patch_pixels`: (B, N, p * p * C) -> (B, C, H, W)."""
    x = torch.unflatten(torch.unflatten(pixels, 1, grid), 3, (size, size, -1))  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def patch_statistics(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each patch's pixels: (B, N, P) -> (B, N, 1) each.

    The variance is the unbiased one plus `EPS`, as in the authors' code. Raises UserError for patches of one value.
    """
    if pixels.shape[-1] == 1:
        raise UserError(
            "task.mask.normalise=true: the variance of a patch of one value is not defined; give a larger "
            "model.patch_size, or task.mask.normalise=false."
        )
    return pixels.mean(dim=-1, keepdim=True), (pixels.var(dim=-1, keepdim=True) + EPS).sqrt()
