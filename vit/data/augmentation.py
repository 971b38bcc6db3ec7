"""Augmentation of training images, on one image of any size or on a stack of small ones on the device.

All of a view's random choices are a vector of uniform numbers, drawn by (seed, epoch, index, copy) before any image is
touched; what they mean is a function of the options. So every image of a stack has its own parameters, and a view is
the same wherever and with whatever else it is computed.

Random resized crop: Szegedy et al. 2015 (arXiv 1409.4842, section 6); mixup: Zhang et al. 2018 (arXiv 1710.09412);
CutMix: Yun et al. 2019 (arXiv 1905.04899); random erasing: Zhong et al. 2020 (arXiv 1708.04896); repeated augmentation:
Hoffer et al. 2020 (arXiv 1901.09335). RandAugment and TrivialAugment are in vit/data/policies.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from common.errors import UserError
from common.machine.device import constant
from common.types import Count, Fraction, NonNegativeFloat, Positive, PositiveFloat
from vit.data import policies
from vit.data.policies import Policy

Interpolation = Literal["bilinear", "bicubic"]
ATTEMPTS = 10  # at a box that fits, as in torchvision, before falling back
ERASED = ((0.02, 0.33), (0.3, 3.3))  # part of the image and ratio of the sides; Zhong et al. 2020, section 4.2

# Where a view's numbers lie in its vector of uniform ones.
_CROP = slice(0, 2 * ATTEMPTS + 2)
_FLIP = _CROP.stop
_ERASE = slice(_FLIP + 2, _FLIP + 2 + 2 * ATTEMPTS + 2)  # the number before it says whether
_MIX = slice(_ERASE.stop, _ERASE.stop + 5)  # whether, which, how much, and the cut's centre
_POLICY = slice(_MIX.stop, _MIX.stop + 3 * policies.MOST)
UNIFORMS = _POLICY.stop


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a training image, in this order; all probabilities and ranges are of one view.

    crop: a random part resized ("resized"), the image shifted over a border of zeros ("padded"), or "none".
    scale: resized: the part's share of the area, least and greatest.
    ratio: resized: its width over its height, least and greatest.
    padding: padded: the border in pixels.
    flip: probability of a horizontal flip.
    policy: "rand" (RandAugment), "trivial" (TrivialAugment) or "none".
    operations, magnitude: RandAugment's N, and M of 30.
    erase: probability that a rectangle is blanked.
    mixup, cutmix: the alpha of each one's beta distribution; 0 = off.
    cutmix_share: how often CutMix is taken, where both are on.
    mix: probability of either.
    repeats: differently augmented copies of each image in a step.
    """

    crop: Literal["resized", "padded", "none"]
    scale: tuple[Fraction, Fraction]
    ratio: tuple[PositiveFloat, PositiveFloat]
    padding: Count
    flip: Fraction
    policy: Policy
    operations: Count
    magnitude: Count
    erase: Fraction
    mixup: NonNegativeFloat
    cutmix: NonNegativeFloat
    cutmix_share: Fraction
    mix: Fraction
    repeats: Positive

    def __post_init__(self) -> None:
        """Refuse what a type cannot: limits in the wrong order, and more than the policies know."""
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise UserError(f"data.augmentation.{name}=[{low}, {high}]: expected the least first, above 0.")
        if self.operations > policies.MOST or self.magnitude >= policies.LEVELS:
            raise UserError(
                f"data.augmentation.operations={self.operations} and magnitude={self.magnitude}: expected at most "
                f"{policies.MOST} operations of a magnitude up to {policies.LEVELS - 1}."
            )

    def check(self, batch_size: int) -> None:
        """Raise UserError when the copies of one image alone are more than a batch."""
        if self.repeats > batch_size:
            raise UserError(
                f"data.augmentation.repeats={self.repeats} makes more than data.batch_size={batch_size} of one image."
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with partners."""
        return self.mix > 0 and self.mixup + self.cutmix > 0


def draw(count: int, generator: torch.Generator) -> Tensor:
    """All random numbers of so many views: (count, UNIFORMS), float64 in [0, 1)."""
    return torch.rand(count, UNIFORMS, generator=generator, dtype=torch.float64)


# One image, or a stack, to views.


def view(
    image: Tensor, uniforms: Tensor, options: Augmentation, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """A training view of one image of any size: uint8 (C, h, w) -> (C, *size)."""
    height, width = image.shape[-2:]
    numbers = uniforms.numpy()[None]
    if options.crop == "resized":
        top, left, h, w = (round(v) for v in _boxes(numbers[:, _CROP], height, width, options.scale, options.ratio)[0])
        h, w = max(1, h), max(1, w)
        image = functional.crop(image, min(top, height - h), min(left, width - w), h, w)
        image = image[None].contiguous(memory_format=torch.channels_last)[0]  # a view of rows resizes more slowly
        image = _resized(image, size, interpolation)
    else:
        image = plain(image, size, 1.0, interpolation)
        if options.crop == "padded":
            top, left = (int(v) for v in _shifts(numbers, options.padding)[0])
            image = functional.crop(functional.pad(image, [options.padding]), top, left, *size)
    if numbers[0, _FLIP] < options.flip:
        image = functional.horizontal_flip(image)
    return policies.apply(image[None], numbers[:, _POLICY], options.policy, options.operations, options.magnitude)[0]


def views(images: Tensor, uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> Tensor:
    """A training view of each of a stack: uint8 (N, C, h, w) -> (N, C, *size), where the stack lies.

    Crop, resizing and flip are one bilinear sampling at fractional places, meant for images about as large as `size`:
    nothing is averaged when it shrinks.
    """
    images = _sampled(images, uniforms, options, size)
    return policies.apply(images, uniforms[:, _POLICY], options.policy, options.operations, options.magnitude)


def plain(image: Tensor, size: tuple[int, int], crop_ratio: float, interpolation: Interpolation) -> Tensor:
    """Images as they are evaluated: uint8 (..., C, h, w) -> (..., C, *size).

    Resized, keeping their proportions, to cover `size` / `crop_ratio` (with torchvision's rounding), and cut to their
    centre.
    """
    height, width = image.shape[-2:]
    tall, wide = (round(length / crop_ratio) for length in size)
    covering = (tall, tall * width // height) if tall * width >= wide * height else (wide * height // width, wide)
    cropped: Tensor = functional.center_crop(_resized(image, covering, interpolation), list(size))
    return cropped


def _resized(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized: Tensor = functional.resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    return resized


def _sampled(images: Tensor, uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> Tensor:
    """Crop, resizing and flip of each image at once."""
    count, _, height, width = images.shape
    flips = uniforms[:, _FLIP] < options.flip
    factor = max(length / n for length, n in zip(size, (height, width), strict=True))
    h, w = size[0] / factor, size[1] / factor  # of what is evaluated, see `plain`
    boxes = np.tile([(height - h) / 2, (width - w) / 2, h, w], (count, 1))  # (N, 4) top, left, height, width
    if options.crop == "resized":
        boxes = _boxes(uniforms[:, _CROP], height, width, options.scale, options.ratio)
    elif options.crop == "padded":
        boxes[:, :2] += (_shifts(uniforms, options.padding) - options.padding) / factor
    if options.crop == "none" and not flips.any() and size == (height, width):
        return images
    top, left, h, w = boxes.T
    theta = np.zeros((count, 2, 3), dtype=np.float32)  # output to input, both from -1 to 1
    theta[:, 0, 0], theta[:, 0, 2] = np.where(flips, -w, w) / width, (2 * left + w) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = h / height, (2 * top + h) / height - 1
    grid = F.affine_grid(torch.from_numpy(theta).to(images.device), [count, 1, *size], align_corners=False)
    padding = "zeros" if options.crop == "padded" else "border"
    return F.grid_sample(images.float(), grid, padding_mode=padding, align_corners=False).round_().to(torch.uint8)


def _boxes(numbers: np.ndarray, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]) -> np.ndarray:
    """Random boxes (N, 4) top, left, height, width in pixels, of a share and ratio within limits; numbers (N, 22).

    The first of ten attempts that fits in the image; failing all, the largest centred box of a ratio within limits.
    """
    share = scale[0] + (scale[1] - scale[0]) * numbers[:, :ATTEMPTS]
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * numbers[:, ATTEMPTS : 2 * ATTEMPTS])
    area = share * height * width
    w, h = np.sqrt(area * ratios), np.sqrt(area / ratios)  # (N, 10)
    fits = (w <= width) & (h <= height)
    first, rows = fits.argmax(axis=1), np.arange(len(numbers))
    nearest = min(max(width / height, ratio[0]), ratio[1])
    largest = (min(height, width / nearest), min(width, height * nearest))
    found = fits.any(axis=1)
    h = np.where(found, h[rows, first], largest[0])
    w = np.where(found, w[rows, first], largest[1])
    place = np.where(found[:, None], numbers[:, 2 * ATTEMPTS :], 0.5)
    return np.stack((place[:, 0] * (height - h), place[:, 1] * (width - w), h, w), axis=1)


def _shifts(numbers: NDArray[Any], padding: int) -> NDArray[Any]:
    """Whole pixels from 0 to twice the padding, down and right: (N, 2)."""
    pixels: NDArray[Any] = np.floor(numbers[:, _CROP][:, -2:] * (2 * padding + 1))
    return pixels


# Views to what the network sees.


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Values 0..255 of (N, C, H, W) to floats: each channel's mean taken off, in units of its deviation (of 0..1)."""
    shift, unit = (constant(v, like=images).view(-1, 1, 1) for v in (mean, std))
    return torch.addcmul(-shift / unit, images.to(torch.float32), 1 / (255 * unit))


def finish(
    images: Tensor, uniforms: np.ndarray | None, options: Augmentation, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Views uint8 (N, C, H, W) as the network takes them: normalised, and with `uniforms` erased and mixed.

    With mixing N = 2B and the second half are the partners, row B + b of row b; out come B images.
    """
    images = normalise(images, mean, std)
    if uniforms is None:
        return images
    if options.erase:
        images = images * ~_erased(images, uniforms, options)
    if not options.mixes:
        return images
    own, partners = images.chunk(2)
    size = (images.shape[-2], images.shape[-1])
    # fp32 on the host: Apple's GPU has no float64
    share, cut = (torch.from_numpy(v).float().to(images.device) for v in _mixing(uniforms[: len(own)], options, size))
    mixed = torch.lerp(partners, own, share[:, None, None, None])  # (B, C, H, W)
    return torch.where(_inside(cut, size)[:, None], partners, mixed)


def shares(uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> Tensor:
    """How much of each mixed image's label is its own, not its partner's: (2B, UNIFORMS) -> float32 (B,) in 0..1."""
    share, cut = _mixing(uniforms[: len(uniforms) // 2], options, size)
    cut_out = (cut[:, 2] - cut[:, 0]) * (cut[:, 3] - cut[:, 1]) / (size[0] * size[1])
    return torch.from_numpy(share - cut_out).float()


def _erased(images: Tensor, uniforms: np.ndarray, options: Augmentation) -> Tensor:
    """Where images are blanked (to the mean, after normalisation): (N, 1, H, W)."""
    height, width = images.shape[-2:]
    boxes = _boxes(uniforms[:, _ERASE], height, width, *ERASED).round()
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    corners *= (uniforms[:, _ERASE.start - 1] < options.erase)[:, None]  # an empty box
    return _inside(torch.from_numpy(corners).float().to(images.device), (height, width))[:, None]


def _mixing(uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Each image's own share where it is blended (B,), and the box cut from its partner (B, 4) y0 x0 y1 x1 in pixels.

    A blended image has an empty box, one with a box the share 1, and one that is left alone both.
    """
    whether, which, much, down, right = uniforms[:, _MIX].T
    mixed = whether < options.mix
    chance = options.cutmix_share if options.mixup and options.cutmix else float(options.cutmix > 0)
    cuts = mixed & (which < chance)
    share = np.ones(len(uniforms))
    corners = np.zeros((len(uniforms), 4))
    blends = mixed & ~cuts
    if blends.any():
        share[blends] = betaincinv(options.mixup, options.mixup, much[blends])
    if cuts.any():
        # The box has the partner's share of the area and any centre; what lies outside the image is cut off.
        side = np.sqrt(1 - betaincinv(options.cutmix, options.cutmix, much[cuts])) / 2
        for axis, (centre, length) in enumerate(zip((down, right), size, strict=True)):
            ends = np.stack((centre[cuts] - side, centre[cuts] + side), axis=1).clip(0, 1) * length
            corners[cuts, axis], corners[cuts, axis + 2] = ends.round().T
    return share, corners


def _inside(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels lie in each box: (N, 4) y0 x0 y1 x1 in whole pixels -> bool (N, H, W)."""
    rows, columns = (torch.arange(length, device=corners.device) for length in size)
    y0, x0, y1, x1 = corners.T[..., None]  # (N, 1) each
    down, across = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    inside: Tensor = down[:, :, None] & across[:, None, :]
    return inside
