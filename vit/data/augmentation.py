"""Augmentation of training images: of one image of any size, or of a stack of small images on the device.

All random choices of a view are read from one vector of uniform numbers, a function of (seed, epoch, index of the
image, number of the view) that is sampled before the image is processed. The options decide what each number means. So
each image of a stack has its own parameters, and a view depends neither on the device nor on the other images of the
stack.

Random resized crop: Szegedy et al. 2015 (arXiv 1409.4842, section 6); mixup: Zhang et al. 2018 (arXiv 1710.09412);
CutMix: Yun et al. 2019 (arXiv 1905.04899); random erasing: Zhong et al. 2020 (arXiv 1708.04896); repeated augmentation:
Hoffer et al. 2020 (arXiv 1901.09335). RandAugment and TrivialAugment are in vit/data/policies.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
from common.types import Count, Fraction, NonNegativeFloat, PositiveFloat, Range
from vit.data import policies
from vit.data.policies import Policy

Interpolation = Literal["bilinear", "bicubic"]
BOX_ATTEMPTS = 10  # attempts to find a box that fits into the image, as in torchvision
ERASED_AREA = (0.02, 0.33)  # share of the image; Zhong et al. 2020, section 4.2
ERASED_RATIO = (0.3, 3.3)  # of width to height; section 4.2

# Indices of each step's numbers in the vector of a view.
_CROP_UNIFORMS = slice(0, 2 * BOX_ATTEMPTS + 2)
_FLIP_UNIFORM = _CROP_UNIFORMS.stop
_ERASES_UNIFORM = _FLIP_UNIFORM + 1  # decides whether to erase
_ERASE_UNIFORMS = slice(_ERASES_UNIFORM + 1, _ERASES_UNIFORM + 1 + 2 * BOX_ATTEMPTS + 2)
_MIX_UNIFORMS = slice(_ERASE_UNIFORMS.stop, _ERASE_UNIFORMS.stop + 5)  # whether, which method, share, centre y and x
_POLICY_UNIFORMS = slice(_MIX_UNIFORMS.stop, _MIX_UNIFORMS.stop + 3 * policies.MAX_OPERATIONS)
UNIFORMS_PER_VIEW = _POLICY_UNIFORMS.stop


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The steps of augmentation, in this order. Probabilities and ranges are those of one view.

    crop: resize a random box ("resized"), shift the image over a border of zeros ("padded"), or "none".
    scale: least and greatest area of a resized box, as a share of the image.
    ratio: least and greatest ratio of a resized box's width to its height.
    padding: border of a padded crop in pixels.
    flip: probability of a horizontal flip.
    policy: "rand" (RandAugment), "trivial" (TrivialAugment) or "none".
    operations, magnitude: RandAugment's N, and its M on a scale from 0 to 30.
    erase: probability of erasing a rectangle.
    mixup, cutmix: alpha of each method's beta distribution; 0 = off.
    cutmix_share: probability of CutMix rather than mixup, where both are on.
    mix: probability of mixing by either method.
    repeats: views of each image in a step.
    """

    crop: Literal["resized", "padded", "none"]
    scale: tuple[Fraction, Fraction]
    ratio: tuple[PositiveFloat, PositiveFloat]
    padding: Annotated[int, Range(low=0, high=1000)]
    flip: Fraction
    policy: Policy
    operations: Annotated[int, Range(low=0, high=100)]
    magnitude: Count
    erase: Fraction
    mixup: NonNegativeFloat
    cutmix: NonNegativeFloat
    cutmix_share: Fraction
    mix: Fraction
    repeats: Annotated[int, Range(low=1, high=1000)]

    def __post_init__(self) -> None:
        """Raise UserError for limits in the wrong order, and for too many operations or too high a magnitude."""
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise UserError(f"data.augmentation.{name}=[{low}, {high}]: expected the smaller limit first, above 0.")
        if self.operations > policies.MAX_OPERATIONS or self.magnitude >= policies.MAGNITUDE_LEVELS:
            raise UserError(
                f"data.augmentation.operations={self.operations} and magnitude={self.magnitude}: expected at most "
                f"{policies.MAX_OPERATIONS} operations of a magnitude up to {policies.MAGNITUDE_LEVELS - 1}."
            )

    def check(self, batch_size: int) -> None:
        """Raise UserError when the views of one image exceed a batch."""
        if self.repeats > batch_size:
            raise UserError(
                f"data.augmentation.repeats={self.repeats} makes more views of one image than "
                f"data.batch_size={batch_size}; give fewer repeats or a larger batch."
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with partners."""
        return self.mix > 0 and self.mixup + self.cutmix > 0


def sample_uniforms(count: int, generator: torch.Generator) -> Tensor:
    """Sample all random numbers of `count` views: (count, UNIFORMS_PER_VIEW), float64 in [0, 1)."""
    return torch.rand(count, UNIFORMS_PER_VIEW, generator=generator, dtype=torch.float64)


# From an image, or a stack of images, to views.


def view(
    image: Tensor, uniforms: Tensor, options: Augmentation, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """A training view of one image of any size: uint8 (C, h, w), uniforms (UNIFORMS_PER_VIEW,) -> (C, *size)."""
    height, width = image.shape[-2:]
    numbers = uniforms.numpy()[None]
    if options.crop == "resized":
        box = _random_boxes(numbers[:, _CROP_UNIFORMS], height, width, options.scale, options.ratio)[0]
        top, left, h, w = (round(v) for v in box)
        h, w = max(1, h), max(1, w)
        image = functional.crop(image, min(top, height - h), min(left, width - w), h, w)
        image = image[None].contiguous(memory_format=torch.channels_last)[0]  # a strided crop resizes more slowly
        image = _resized(image, size, interpolation)
    else:
        image = evaluation_view(image, size, 1.0, interpolation)
        if options.crop == "padded":
            top, left = (int(v) for v in _random_shifts(numbers, options.padding)[0])
            image = F.pad(image, [options.padding] * 4)[:, top : top + size[0], left : left + size[1]]
    if numbers[0, _FLIP_UNIFORM] < options.flip:
        image = functional.horizontal_flip(image)
    numbers = numbers[:, _POLICY_UNIFORMS]
    return policies.apply(image[None], numbers, options.policy, options.operations, options.magnitude)[0]


def views(images: Tensor, uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> Tensor:
    """A training view of each image of a stack: uint8 (N, C, h, w) -> (N, C, *size), on the stack's device.

    Crop, resize and flip are one bilinear sampling without antialiasing, meant for images about as large as `size`.
    """
    images = _resampled(images, uniforms, options, size)
    return policies.apply(images, uniforms[:, _POLICY_UNIFORMS], options.policy, options.operations, options.magnitude)


def evaluation_view(image: Tensor, size: tuple[int, int], crop_ratio: float, interpolation: Interpolation) -> Tensor:
    """Images without augmentation, as in evaluation: uint8 (..., C, h, w) -> (..., C, *size).

    An image is resized to cover `size` / `crop_ratio` with its aspect ratio kept (rounded as in torchvision), then
    cropped to its centre.
    """
    height, width = image.shape[-2:]
    if (height, width) == size and crop_ratio == 1:
        return image
    tall, wide = (round(length / crop_ratio) for length in size)
    covering = (tall, tall * width // height) if tall * width >= wide * height else (wide * height // width, wide)
    cropped: Tensor = functional.center_crop(_resized(image, covering, interpolation), list(size))
    return cropped


def _resized(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    resized: Tensor = functional.resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    return resized


def _resampled(images: Tensor, uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> Tensor:
    """Crop, resize and flip each image in one sampling."""
    count, _, height, width = images.shape
    flips = uniforms[:, _FLIP_UNIFORM] < options.flip
    factor = max(length / n for length, n in zip(size, (height, width), strict=True))
    h, w = size[0] / factor, size[1] / factor  # of the part of an image that `evaluation_view` crops
    boxes = np.tile([(height - h) / 2, (width - w) / 2, h, w], (count, 1))  # (N, 4) top, left, height, width
    if options.crop == "resized":
        boxes = _random_boxes(uniforms[:, _CROP_UNIFORMS], height, width, options.scale, options.ratio)
    elif options.crop == "padded":
        boxes[:, :2] += (_random_shifts(uniforms, options.padding) - options.padding) / factor
    if options.crop == "none" and not flips.any() and size == (height, width):
        return images
    top, left, h, w = boxes.T
    theta = np.zeros((count, 2, 3), dtype=np.float32)  # maps output to input coordinates, both in -1..1
    theta[:, 0, 0], theta[:, 0, 2] = np.where(flips, -w, w) / width, (2 * left + w) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = h / height, (2 * top + h) / height - 1
    grid = F.affine_grid(torch.from_numpy(theta).to(images.device), [count, 1, *size], align_corners=False)
    padding = "zeros" if options.crop == "padded" else "border"
    return F.grid_sample(images.float(), grid, padding_mode=padding, align_corners=False).round_().to(torch.uint8)


def _random_boxes(
    numbers: np.ndarray, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """Random boxes (N, 4) top, left, height, width in pixels, from uniform `numbers` (N, 22) in [0, 1).

    A box is the first of ten attempts, with a random area and ratio within the limits, that fits into the image. If
    none fits, it is the largest centred box with a ratio within the limits.
    """
    share = scale[0] + (scale[1] - scale[0]) * numbers[:, :BOX_ATTEMPTS]
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * numbers[:, BOX_ATTEMPTS : 2 * BOX_ATTEMPTS])
    area = share * height * width
    w, h = np.sqrt(area * ratios), np.sqrt(area / ratios)  # (N, 10)
    fits = (w <= width) & (h <= height)
    first, rows = fits.argmax(axis=1), np.arange(len(numbers))
    nearest = min(max(width / height, ratio[0]), ratio[1])
    largest = (min(height, width / nearest), min(width, height * nearest))
    any_fits = fits.any(axis=1)
    h = np.where(any_fits, h[rows, first], largest[0])
    w = np.where(any_fits, w[rows, first], largest[1])
    corner = np.where(any_fits[:, None], numbers[:, 2 * BOX_ATTEMPTS :], 0.5)  # as shares of the free space
    return np.stack((corner[:, 0] * (height - h), corner[:, 1] * (width - w), h, w), axis=1)


def _random_shifts(numbers: NDArray[Any], padding: int) -> NDArray[Any]:
    """Shifts down and right in whole pixels, from 0 to twice the padding: (N, 2)."""
    pixels: NDArray[Any] = np.floor(numbers[:, _CROP_UNIFORMS][:, -2:] * (2 * padding + 1))
    return pixels


# From views to the network's input.


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale values 0..255 (N, C, H, W) to 0..1, subtract the mean of each channel and divide by its std, in fp32."""
    shift, unit = (constant(v, like=images).view(-1, 1, 1) for v in (mean, std))
    return torch.addcmul(-shift / unit, images.to(torch.float32), 1 / (255 * unit))


def model_inputs(
    images: Tensor, uniforms: np.ndarray | None, options: Augmentation, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The network's input from views uint8 (N, C, H, W): normalised, and with `uniforms` also erased and mixed.

    With mixing N is 2B: row B + b is the partner of row b, and B images are returned.
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
    share, box = (torch.from_numpy(v).float().to(images.device) for v in _mixing(uniforms[: len(own)], options, size))
    mixed = torch.lerp(partners, own, share[:, None, None, None])  # (B, C, H, W)
    return torch.where(_box_masks(box, size)[:, None], partners, mixed)


def label_shares(uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> Tensor:
    """The share of each mixed image's own label in its target, 0..1: (2B, UNIFORMS_PER_VIEW) -> float32 (B,)."""
    share, box = _mixing(uniforms[: len(uniforms) // 2], options, size)
    box_share = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (size[0] * size[1])
    return torch.from_numpy(share - box_share).float()


def _erased(images: Tensor, uniforms: np.ndarray, options: Augmentation) -> Tensor:
    """Masks of the pixels to erase, that is, to set to the mean: (N, C, H, W) -> bool (N, 1, H, W)."""
    height, width = images.shape[-2:]
    boxes = _random_boxes(uniforms[:, _ERASE_UNIFORMS], height, width, ERASED_AREA, ERASED_RATIO).round()
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    corners *= (uniforms[:, _ERASES_UNIFORM] < options.erase)[:, None]  # an empty box where nothing is erased
    return _box_masks(torch.from_numpy(corners).float().to(images.device), (height, width))[:, None]


def _mixing(uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Each image's own share in a blend (B,), and the box pasted from its partner (B, 4) y0 x0 y1 x1 in pixels.

    A blended image has an empty box. An image with a pasted box has the share 1. An image that is not mixed has an
    empty box and the share 1.
    """
    whether, which, quantile, down, right = uniforms[:, _MIX_UNIFORMS].T
    mixed = whether < options.mix
    cutmix_probability = options.cutmix_share if options.mixup and options.cutmix else float(options.cutmix > 0)
    pastes = mixed & (which < cutmix_probability)
    share = np.ones(len(uniforms))
    corners = np.zeros((len(uniforms), 4))
    blends = mixed & ~pastes
    if blends.any():
        share[blends] = betaincinv(options.mixup, options.mixup, quantile[blends])
    if pastes.any():
        # The box has the partner's share of the area and a centre anywhere in the image; it is clipped to the image.
        side = np.sqrt(1 - betaincinv(options.cutmix, options.cutmix, quantile[pastes])) / 2
        for axis, (centre, length) in enumerate(zip((down, right), size, strict=True)):
            ends = np.stack((centre[pastes] - side, centre[pastes] + side), axis=1).clip(0, 1) * length
            corners[pastes, axis], corners[pastes, axis + 2] = ends.round().T
    return share, corners


def _box_masks(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of the pixels in each box: (N, 4) y0 x0 y1 x1 in whole pixels -> bool (N, H, W)."""
    rows, columns = (torch.arange(length, device=corners.device) for length in size)
    y0, x0, y1, x1 = corners.T[..., None]  # (N, 1) each
    in_rows, in_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    masks: Tensor = in_rows[:, :, None] & in_columns[:, None, :]  # (N, H, W)
    return masks
