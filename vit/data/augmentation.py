"""Augment training images: `view` augments one image of any size, `views` a stack of small images on the device.

A view is an augmented copy of an image. All its random choices are computed from one vector of uniform numbers, which
is sampled before the image is processed and depends only on (seed, epoch, index of the sample, index of the view). So
each image of a stack has its own random choices, which depend neither on the device nor on the other images of the
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
ERASED_AREA = (0.02, 0.33)  # least and greatest share of the image's area, as in torchvision's RandomErasing
# Least and greatest ratio of an erased box's width to its height. torchvision's RandomErasing has the same limits for
# the ratio of height to width.
ERASED_RATIO = (0.3, 3.3)

# The indices, in a view's vector of uniform numbers, of the numbers that each step of augmentation uses.
_CROP_UNIFORMS = slice(0, 2 * BOX_ATTEMPTS + 2)
_FLIP_UNIFORM = _CROP_UNIFORMS.stop
_ERASES_UNIFORM = _FLIP_UNIFORM + 1  # decides whether to erase
_ERASE_UNIFORMS = slice(_ERASES_UNIFORM + 1, _ERASES_UNIFORM + 1 + 2 * BOX_ATTEMPTS + 2)
# Five numbers: whether to mix, by which method, the share, and the y and x of the centre of CutMix's box.
_MIX_UNIFORMS = slice(_ERASE_UNIFORMS.stop, _ERASE_UNIFORMS.stop + 5)
_POLICY_UNIFORMS = slice(_MIX_UNIFORMS.stop, _MIX_UNIFORMS.stop + 3 * policies.MAX_OPERATIONS)
UNIFORMS_PER_VIEW = _POLICY_UNIFORMS.stop


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Options of augmentation, in the order in which its steps are applied. Each view makes its own random choices.

    crop: "resized" crops a random box and resizes it to the size of the model's input. "none" resizes the image to
        cover this size and crops its centre. "padded" does the same as "none", then adds a border of zeros and crops
        this size at a random position.
    scale: least and greatest area of a "resized" box, as a share of the image's area.
    ratio: least and greatest ratio of a "resized" box's width to its height.
    padding: width of the border of a "padded" crop in pixels.
    flip: probability of a horizontal flip.
    policy: "rand" (RandAugment), "trivial" (TrivialAugment) or "none".
    operations: number of operations that "rand" applies to a view, from 0 to 4 (N in the paper).
    magnitude: strength of these operations, from 0 to 30 (M in the paper).
    erase: probability of erasing a random rectangle, that is, setting it to the mean colour.
    mixup: alpha of Beta(alpha, alpha), from which mixup samples an image's weight in its weighted mean with a partner
        (a second image from train); 0 = off.
    cutmix: alpha of Beta(alpha, alpha), from which CutMix samples the share of its area that an image keeps; the rest
        is a box pasted from a partner; 0 = off.
    cutmix_share: probability that an image to be mixed is mixed by CutMix; used if `mixup` and `cutmix` are above 0.
    mix: probability that an image is mixed with a partner, by mixup or CutMix.
    repeats: number of views of each image in an optimizer step.
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
        """Check the options.

        Raises UserError if `scale` or `ratio` is not positive and in ascending order, or if `operations` or `magnitude`
        is too high.
        """
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise UserError(f"data.augmentation.{name}=[{low}, {high}]: expected the smaller limit first, above 0.")
        if self.operations > policies.MAX_OPERATIONS or self.magnitude >= policies.MAGNITUDE_LEVELS:
            raise UserError(
                f"data.augmentation.operations={self.operations} and magnitude={self.magnitude}: expected at most "
                f"{policies.MAX_OPERATIONS} operations of a magnitude up to {policies.MAGNITUDE_LEVELS - 1}."
            )

    def check(self, batch_size: int) -> None:
        """Raise UserError when `repeats` is greater than `batch_size`, the number of views in a batch."""
        if self.repeats > batch_size:
            raise UserError(
                f"data.augmentation.repeats={self.repeats} makes more views of one image than "
                f"data.batch_size={batch_size}; give fewer repeats or a larger batch."
            )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with a partner, a second image from train."""
        return self.mix > 0 and self.mixup + self.cutmix > 0


def sample_uniforms(count: int, generator: torch.Generator) -> Tensor:
    """Sample the uniform numbers of `count` views: (count, UNIFORMS_PER_VIEW), float64 in [0, 1)."""
    return torch.rand(count, UNIFORMS_PER_VIEW, generator=generator, dtype=torch.float64)


# The first steps: from an image, or a stack of images, to views.


def view(
    image: Tensor, uniforms: Tensor, options: Augmentation, size: tuple[int, int], interpolation: Interpolation
) -> Tensor:
    """Crop, resize and flip one image of any size, and apply the policy; erasing and mixing follow in `model_inputs`.

    image uint8 (C, h, w), uniforms (UNIFORMS_PER_VIEW,) -> uint8 (C, *size).
    """
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
    """Make a training view of each image of a stack, as `view` does, on the stack's device.

    images uint8 (N, C, h, w), uniforms (N, UNIFORMS_PER_VIEW) -> uint8 (N, C, *size). Crop, resize and flip are one
    bilinear sampling without antialiasing, which suits images about as large as `size`.
    """
    images = _resampled(images, uniforms, options, size)
    return policies.apply(images, uniforms[:, _POLICY_UNIFORMS], options.policy, options.operations, options.magnitude)


def evaluation_view(image: Tensor, size: tuple[int, int], crop_ratio: float, interpolation: Interpolation) -> Tensor:
    """Resize images and crop their centre, as in evaluation: uint8 (..., C, h, w) -> uint8 (..., C, *size).

    An image keeps its aspect ratio and is resized to the smallest size that covers `size` / `crop_ratio`. Its centre of
    the given `size` is then cropped. Sizes are rounded as in torchvision.
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
    """Crop, resize and flip each image by one bilinear sampling: uint8 (N, C, h, w) -> uint8 (N, C, *size)."""
    count, _, height, width = images.shape
    flips = uniforms[:, _FLIP_UNIFORM] < options.flip
    factor = max(length / n for length, n in zip(size, (height, width), strict=True))
    h, w = size[0] / factor, size[1] / factor  # of the centre that `evaluation_view` keeps, in pixels of the image
    boxes = np.tile([(height - h) / 2, (width - w) / 2, h, w], (count, 1))  # (N, 4) top, left, height, width
    if options.crop == "resized":
        boxes = _random_boxes(uniforms[:, _CROP_UNIFORMS], height, width, options.scale, options.ratio)
    elif options.crop == "padded":
        boxes[:, :2] += (_random_shifts(uniforms, options.padding) - options.padding) / factor
    if options.crop == "none" and not flips.any() and size == (height, width):
        return images
    top, left, h, w = boxes.T
    theta = np.zeros((count, 2, 3), dtype=np.float32)  # maps output coordinates to input coordinates, both in -1..1
    theta[:, 0, 0], theta[:, 0, 2] = np.where(flips, -w, w) / width, (2 * left + w) / width - 1
    theta[:, 1, 1], theta[:, 1, 2] = h / height, (2 * top + h) / height - 1
    grid = F.affine_grid(torch.from_numpy(theta).to(images.device), [count, 1, *size], align_corners=False)
    padding = "zeros" if options.crop == "padded" else "border"
    return F.grid_sample(images.float(), grid, padding_mode=padding, align_corners=False).round_().to(torch.uint8)


def _random_boxes(
    numbers: np.ndarray, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """Choose random boxes (N, 4) top, left, height, width in pixels, from uniform `numbers` (N, 22) in [0, 1).

    Each of ten attempts has a random area (`scale` limits its share of the image's area) and a random ratio of width to
    height (limited by `ratio`). The first attempt that fits into the image becomes the box. If none fits, the box is
    the largest centred one with a ratio within the limits.
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
    corner = np.where(any_fits[:, None], numbers[:, 2 * BOX_ATTEMPTS :], 0.5)  # y and x, as shares of the free space
    return np.stack((corner[:, 0] * (height - h), corner[:, 1] * (width - w), h, w), axis=1)


def _random_shifts(numbers: NDArray[Any], padding: int) -> NDArray[Any]:
    """Choose each crop's top and left in the padded image, in whole pixels from 0 to 2 * padding: (N, 2)."""
    pixels: NDArray[Any] = np.floor(numbers[:, _CROP_UNIFORMS][:, -2:] * (2 * padding + 1))
    return pixels


# The last steps: from views to the model's input.


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale values 0..255 (N, C, H, W) to 0..1, subtract the mean of each channel and divide by its std, in fp32."""
    shift, unit = (constant(v, like=images).view(-1, 1, 1) for v in (mean, std))
    return torch.addcmul(-shift / unit, images.to(torch.float32), 1 / (255 * unit))


def model_inputs(
    images: Tensor, uniforms: np.ndarray | None, options: Augmentation, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Normalise views, and in training also erase and mix them: uint8 (N, C, H, W) -> fp32 (B, C, H, W).

    `uniforms` (N, UNIFORMS_PER_VIEW) are the random numbers of the views; None = evaluation, without erasing and
    mixing. In training with an augmentation that mixes images, N is 2B, and view B + b is the partner of view b.
    Otherwise, N is B.
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
    # Converted to fp32 on the host, since Apple's GPUs have no float64.
    share, box = (torch.from_numpy(v).float().to(images.device) for v in _mixing(uniforms[: len(own)], options, size))
    mixed = torch.lerp(partners, own, share[:, None, None, None])  # (B, C, H, W)
    return torch.where(_box_masks(box, size)[:, None], partners, mixed)


def label_shares(uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> Tensor:
    """Compute the share, 0 to 1, of each mixed image's own label in its target.

    uniforms (2B, UNIFORMS_PER_VIEW), those of the partners last -> float32 (B,). `size` is (height, width) in pixels.
    """
    share, box = _mixing(uniforms[: len(uniforms) // 2], options, size)
    box_share = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (size[0] * size[1])
    return torch.from_numpy(share - box_share).float()


def _erased(images: Tensor, uniforms: np.ndarray, options: Augmentation) -> Tensor:
    """Compute masks of the pixels to erase (to set to the mean colour): (N, C, H, W) -> bool (N, 1, H, W)."""
    height, width = images.shape[-2:]
    boxes = _random_boxes(uniforms[:, _ERASE_UNIFORMS], height, width, ERASED_AREA, ERASED_RATIO).round()
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)
    corners *= (uniforms[:, _ERASES_UNIFORM] < options.erase)[:, None]  # an empty box where nothing is erased
    return _box_masks(torch.from_numpy(corners).float().to(images.device), (height, width))[:, None]


def _mixing(uniforms: np.ndarray, options: Augmentation, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Choose how each image is mixed with its partner: uniforms (B, UNIFORMS_PER_VIEW) -> (B,), (B, 4).

    The first result is each image's own weight in mixup's weighted mean with the partner; 1 for images without mixup.
    The second is the box that CutMix pastes from the partner, y0 x0 y1 x1 in whole pixels; empty for images without
    CutMix.
    """
    from scipy.special import betaincinv  # slow to import

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
        # The box's share of the image's area is the partner's share. Its centre may be anywhere in the image; parts of
        # the box outside the image are cut off.
        side = np.sqrt(1 - betaincinv(options.cutmix, options.cutmix, quantile[pastes])) / 2
        for axis, (centre, length) in enumerate(zip((down, right), size, strict=True)):
            ends = np.stack((centre[pastes] - side, centre[pastes] + side), axis=1).clip(0, 1) * length
            corners[pastes, axis], corners[pastes, axis + 2] = ends.round().T
    return share, corners


def _box_masks(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute masks of the pixels in each box: (N, 4) y0 x0 y1 x1 in whole pixels -> bool (N, H, W)."""
    rows, columns = (torch.arange(length, device=corners.device) for length in size)
    y0, x0, y1, x1 = corners.T[..., None]  # (N, 1) each
    in_rows, in_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
    masks: Tensor = in_rows[:, :, None] & in_columns[:, None, :]  # (N, H, W)
    return masks
