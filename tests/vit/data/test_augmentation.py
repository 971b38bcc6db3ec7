"""Augmentation against torchvision's transforms, scipy's interpolation, and images that identify each pixel."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from common.errors import UserError
from common.machine.seeds import generator
from vit.data import augmentation, policies
from vit.data.augmentation import UNIFORMS_PER_VIEW, Augmentation

NOTHING: dict[str, Any] = {
    **{"crop": "none", "scale": (0.08, 1.0), "ratio": (0.75, 4 / 3), "padding": 0, "flip": 0.0, "policy": "none"},
    **{"operations": 2, "magnitude": 9, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "cutmix_share": 0.5, "mix": 1.0},
    "repeats": 1,
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def options(**changes: Any) -> Augmentation:
    return Augmentation(**{**NOTHING, **changes})


def images(count: int, height: int = 16, width: int = 16, channels: int = 3) -> Tensor:
    random = generator("augmentation", count, height, width)
    return torch.randint(0, 256, (count, channels, height, width), generator=random).to(torch.uint8)


def sample_uniforms(count: int, seed: int = 0) -> np.ndarray:
    return augmentation.sample_uniforms(count, generator("uniforms", seed)).numpy()


# Random numbers.


def test_uniforms_are_sampled_in_double_precision_for_each_view() -> None:
    uniforms = augmentation.sample_uniforms(2000, generator(0))
    assert uniforms.shape == (2000, UNIFORMS_PER_VIEW) and uniforms.dtype == torch.float64
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert stats.kstest(uniforms.flatten()[:20000].numpy(), "uniform").pvalue > 0.01
    assert torch.equal(augmentation.sample_uniforms(2000, generator(0)), uniforms)


def test_each_uniform_number_has_one_use() -> None:
    used = [augmentation._FLIP_UNIFORM, augmentation._ERASES_UNIFORM]
    for name in ("CROP", "ERASE", "MIX", "POLICY"):
        used += range(UNIFORMS_PER_VIEW)[getattr(augmentation, f"_{name}_UNIFORMS")]
    assert sorted(used) == [*range(UNIFORMS_PER_VIEW)]


# One image.

Box = tuple[float, float, float, float]


def box_of(numbers: np.ndarray, height: int, width: int, scale: Any, ratio: Any) -> Box | None:
    """torchvision's algorithm, attempt by attempt: ten areas, ten ratios and a corner; None when no box fits."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        box_ratio = math.exp(low + (high - low) * numbers[10 + attempt])
        w, h = math.sqrt(area * box_ratio), math.sqrt(area / box_ratio)
        if w <= width and h <= height:
            return numbers[20] * (height - h), numbers[21] * (width - w), h, w
    return None


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 40), (60, 30), (30, 50)])
def test_a_view_of_a_crop_is_torchvisions_resized_crop(height: int, width: int, interpolation: Any) -> None:
    (image,) = images(1, height, width)
    chosen = options(crop="resized", scale=(0.2, 0.9))
    for numbers in augmentation.sample_uniforms(20, generator(0)):
        box = box_of(numbers.numpy(), height, width, chosen.scale, chosen.ratio)
        assert box is not None
        expected = functional.resized_crop(
            image, *map(round, box), [24, 20], InterpolationMode(interpolation), antialias=True
        )
        # A crop with another memory layout may be rounded differently, by at most one level.
        view = augmentation.view(image, numbers, chosen, (24, 20), interpolation)
        assert view.shape == (3, 24, 20) and view.dtype == torch.uint8
        torch.testing.assert_close(view.int(), expected.int(), rtol=0, atol=1)


def test_boxes_of_a_stack_are_those_of_torchvisions_algorithm() -> None:
    uniforms = sample_uniforms(300)
    for height, width, scale, ratio in ((16, 16, (0.08, 1.0), (0.75, 4 / 3)), (12, 40, (0.3, 1.0), (0.5, 2.0))):
        boxes = augmentation._random_boxes(uniforms[:, :22], height, width, scale, ratio)
        for numbers, box in zip(uniforms, boxes, strict=True):
            expected = box_of(numbers, height, width, scale, ratio)
            if expected is not None:
                np.testing.assert_allclose(box, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (30, 30)])
@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.5, 0.8), (1.5, 2.5)])
def test_where_no_box_fits_the_largest_centred_box_is_used_as_in_torchvision(
    height: int, width: int, ratio: tuple[float, float]
) -> None:
    """A box of the whole area and another ratio than the image's never fits, so torchvision's choice is not random."""
    box = augmentation._random_boxes(sample_uniforms(1)[:, :22], height, width, (1.0, 1.0), ratio)[0]
    params = v2.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=ratio).make_params([torch.zeros(3, height, width)])
    expected = [params[key] for key in ("top", "left", "height", "width")]
    np.testing.assert_allclose(box, expected, rtol=0, atol=1)  # torchvision's are whole pixels
    assert box[0] + box[2] <= height + 1e-9 and box[1] + box[3] <= width + 1e-9
    assert ratio[0] - 1e-9 <= box[3] / box[2] <= ratio[1] + 1e-9


@pytest.mark.parametrize(("height", "width"), [(240, 320), (500, 150)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Area, ratio and position of 1,500 boxes each, in images so large that rounding to pixels is negligible."""
    chosen = options(crop="resized")
    ours = augmentation._random_boxes(sample_uniforms(1500)[:, :22], height, width, chosen.scale, chosen.ratio)
    torch.manual_seed(0)
    transform, empty = v2.RandomResizedCrop(8, scale=chosen.scale, ratio=chosen.ratio), torch.zeros(1, height, width)
    parameters = [transform.make_params([empty]) for _ in range(1500)]
    theirs = np.array(
        [[params[key] for key in ("top", "left", "height", "width")] for params in parameters], dtype=float
    )
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.01


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 3), (2, 9)])
def test_a_crop_of_a_tiny_image_stays_inside_it(height: int, width: int) -> None:
    """Boxes of less than half a pixel; pixels outside the image would be black."""
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    for numbers in augmentation.sample_uniforms(200, generator(0)):
        view = augmentation.view(image, numbers, options(crop="resized", scale=(0.001, 0.05)), (4, 4), "bilinear")
        assert torch.equal(view, torch.full((3, 4, 4), 200, dtype=torch.uint8))


def test_without_a_crop_a_view_is_the_evaluation_view_flipped_or_not() -> None:
    (image,) = images(1, 20, 30)
    plain = augmentation.evaluation_view(image, (8, 8), 1.0, "bicubic")
    flips = 0
    for numbers in augmentation.sample_uniforms(40, generator(0)):
        view = augmentation.view(image, numbers, options(flip=0.5), (8, 8), "bicubic")
        flipped = bool(numbers[augmentation._FLIP_UNIFORM] < 0.5)
        assert torch.equal(view, plain.flip(2) if flipped else plain)
        flips += flipped
    assert 8 < flips < 32


def test_a_padded_view_is_shifted_by_whole_pixels_over_zeros() -> None:
    (image,) = images(1)
    shifts = set()
    for numbers in augmentation.sample_uniforms(300, generator(0)):
        view = augmentation.view(image, numbers, options(crop="padded", padding=2), (16, 16), "bilinear")
        down, right = (math.floor(u * 5) for u in numbers[20:22].tolist())
        expected = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))[:, down : down + 16, right : right + 16]
        assert np.array_equal(view.numpy(), expected)
        shifts.add((down, right))
    assert len(shifts) == 25


def test_a_view_ends_with_its_policy() -> None:
    (image,) = images(1)
    for numbers in augmentation.sample_uniforms(10, generator(0)):
        before = augmentation.view(image, numbers, options(crop="resized", flip=0.5), (16, 16), "bilinear")
        view = augmentation.view(
            image, numbers, options(crop="resized", flip=0.5, policy="trivial"), (16, 16), "bilinear"
        )
        expected = policies.apply(before[None], numbers[None, augmentation._POLICY_UNIFORMS].numpy(), "trivial", 1, 0)[
            0
        ]
        assert torch.equal(view, expected)


# A stack.

MODES: dict[str, dict[str, Any]] = {
    "resized": {"crop": "resized", "scale": (0.3, 1.0), "flip": 0.5},
    "padded": {"crop": "padded", "padding": 3, "flip": 0.5},
    "none": {"flip": 0.5},
    "rand": {"crop": "resized", "policy": "rand"},
    "trivial": {"crop": "padded", "padding": 2, "flip": 0.5, "policy": "trivial"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
def test_a_stack_is_its_images_one_by_one_bit_for_bit(mode: str, channels: int, size: tuple[int, int]) -> None:
    stack, uniforms = images(60, channels=channels), sample_uniforms(60)
    chosen = options(**MODES[mode])
    torch.manual_seed(0)
    together = augmentation.views(stack, uniforms, chosen, size)
    torch.manual_seed(1)  # only `uniforms` are random
    alone = [augmentation.views(stack[i : i + 1], uniforms[i : i + 1], chosen, size) for i in range(60)]
    assert together.dtype == torch.uint8 and together.shape == (60, channels, *size)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mode", MODES)
def test_every_image_of_a_stack_has_its_own_parameters(mode: str) -> None:
    same = images(1).expand(30, -1, -1, -1)
    views = augmentation.views(same, sample_uniforms(30), options(**MODES[mode]), (16, 16))
    distinct = len(views.flatten(1).unique(dim=0))
    assert distinct == 2 if mode == "none" else distinct > 20


@pytest.mark.parametrize("size", [(16, 16), (11, 23)])
def test_a_crop_of_a_stack_is_a_bilinear_sampling_of_its_box(size: tuple[int, int]) -> None:
    """By scipy: output pixel i of n is at (i + 1/2) / n of the box, and values between pixel centres are linear."""
    stack, uniforms = images(40, 16, 14), sample_uniforms(40)
    chosen = options(crop="resized", scale=(0.2, 1.0), flip=0.5)
    views = augmentation.views(stack, uniforms, chosen, size)
    for image, numbers, view in zip(stack, uniforms, views, strict=True):
        box = box_of(numbers, 16, 14, chosen.scale, chosen.ratio)
        assert box is not None
        rows = box[0] + (np.arange(size[0]) + 0.5) / size[0] * box[2] - 0.5
        columns = box[1] + (np.arange(size[1]) + 0.5) / size[1] * box[3] - 0.5
        if numbers[augmentation._FLIP_UNIFORM] < 0.5:
            columns = columns[::-1]
        positions = np.meshgrid(rows, columns, indexing="ij")
        expected = [ndimage.map_coordinates(c, positions, order=1, mode="nearest") for c in image.double().numpy()]
        # Rounding is half a level; positions are exact to 1e-5 of a pixel, with slopes of up to 255.
        assert np.abs(view.numpy() - np.stack(expected)).max() < 0.51


def test_a_crop_of_whole_pixels_is_torchvisions_except_at_its_border() -> None:
    """A quarter of 16 x 16 in whole pixels, enlarged: values between pixels of the box are the same.

    One level may differ, since torchvision's coefficients for uint8 are integers. At the box's border torchvision
    repeats the outermost pixels, and here the image continues; so the border of half a pixel, 2 of 32, is not compared.
    """
    stack, uniforms = images(49), sample_uniforms(49)
    uniforms[:, 20], uniforms[:, 21] = np.arange(49) // 7 / 8, np.arange(49) % 7 / 8  # (16 - 8) times this
    chosen = options(crop="resized", scale=(0.25, 0.25), ratio=(1.0, 1.0))
    views = augmentation.views(stack, uniforms, chosen, (32, 32))
    for number, (image, view) in enumerate(zip(stack, views, strict=True)):
        expected = functional.resized_crop(image, number // 7, number % 7, 8, 8, [32, 32], antialias=True)
        interior = (slice(None), slice(2, -2), slice(2, -2))
        torch.testing.assert_close(view[interior].int(), expected[interior].int(), rtol=0, atol=1)


def test_the_whole_image_enlarged_is_torchvisions_including_its_border() -> None:
    stack, uniforms = images(5), sample_uniforms(5)
    chosen = options(crop="resized", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    expected = functional.resize(stack, [40, 40], antialias=True)
    views = augmentation.views(stack, uniforms, chosen, (40, 40))
    torch.testing.assert_close(views.int(), expected.int(), rtol=0, atol=1)  # integer coefficients, as above
    assert torch.equal(augmentation.views(stack, uniforms, chosen, (16, 16)), stack)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 20), (28, 28), (32, 32), (224, 160)])
def test_flips_of_a_stack_are_exact(height: int, width: int) -> None:
    stack, uniforms = images(20, height, width), sample_uniforms(20)
    flipped = uniforms[:, augmentation._FLIP_UNIFORM] < 0.5
    views = augmentation.views(stack, uniforms, options(flip=0.5), (height, width))
    for image, view, is_flipped in zip(stack, views, flipped, strict=True):
        assert torch.equal(view, functional.horizontal_flip(image) if is_flipped else image)
    assert torch.equal(augmentation.views(stack, uniforms, options(flip=1.0), (height, width)), stack.flip(3))
    assert augmentation.views(stack, uniforms, options(), (height, width)) is stack


@pytest.mark.parametrize("padding", [1, 4])
@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_padded_crops_of_a_stack_are_those_of_one_image_exactly(padding: int, flip: float) -> None:
    stack, numbers = images(60, 16, 20), augmentation.sample_uniforms(60, generator(0))
    chosen = options(crop="padded", padding=padding, flip=flip)
    views = augmentation.views(stack, numbers.numpy(), chosen, (16, 20))
    for image, row, view in zip(stack, numbers, views, strict=True):
        assert torch.equal(view, augmentation.view(image, row, chosen, (16, 20), "bilinear"))


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (24, 24), (40, 20)])
def test_without_a_crop_the_views_of_a_stack_are_its_evaluation_views(size: tuple[int, int]) -> None:
    """Also at another aspect ratio: covered and cropped to the centre, never stretched. One level: see above."""
    stack, uniforms = images(6), sample_uniforms(6)
    views = augmentation.views(stack, uniforms, options(), size)
    expected = augmentation.evaluation_view(stack, size, 1.0, "bilinear")
    torch.testing.assert_close(views.int(), expected.int(), rtol=0, atol=1)


@pytest.mark.parametrize("size", [(32, 32), (16, 32)])
def test_padding_is_counted_in_pixels_of_the_view(size: tuple[int, int]) -> None:
    """A white image, enlarged twice and shifted by up to three pixels, gets as many black lines as its shift."""
    stack, uniforms = torch.full((80, 1, 16, 16), 255, dtype=torch.uint8), sample_uniforms(80)
    views = augmentation.views(stack, uniforms, options(crop="padded", padding=3), (32, 32))
    down, right = (np.floor(uniforms[:, i] * 7) - 3 for i in (20, 21))
    for view, y, x in zip(views, down, right, strict=True):
        # Half of the outermost line blends with the black beside it.
        assert abs((view[0, :, 16] < 128).sum().item() - abs(y)) <= 1
        assert abs((view[0, 16] < 128).sum().item() - abs(x)) <= 1


def test_a_stack_is_left_as_it_was() -> None:
    stack = images(20)
    before = stack.clone()
    for mode in MODES.values():
        augmentation.views(stack, sample_uniforms(20), options(**mode), (16, 16))
    assert torch.equal(stack, before)


# Evaluation.


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 50), (50, 20), (7, 9)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_an_evaluation_view_is_resized_and_cropped_as_by_torchvision(
    height: int, width: int, crop_ratio: float
) -> None:
    stack = images(3, height, width)
    views = augmentation.evaluation_view(stack, (14, 14), crop_ratio, "bicubic")
    transforms = v2.Compose(
        [v2.Resize(round(14 / crop_ratio), InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(14)]
    )
    assert torch.equal(views, transforms(stack))
    assert torch.equal(views[1], augmentation.evaluation_view(stack[1], (14, 14), crop_ratio, "bicubic"))


def test_the_evaluation_view_of_an_image_of_its_size_is_the_image() -> None:
    stack = images(3, 8, 12)
    assert torch.equal(augmentation.evaluation_view(stack, (8, 12), 1.0, "bilinear"), stack)


# The network's input.


@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_is_its_formula(channels: int) -> None:
    stack, mean, std = images(4, channels=channels), MEAN[:channels], STD[:channels]
    expected = functional.normalize(stack.double() / 255, mean, std)
    inputs = augmentation.normalise(stack, mean, std)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.double(), expected, rtol=0, atol=2e-6)  # fp32 of values up to five
    assert torch.equal(augmentation.model_inputs(stack, None, options(erase=1.0, mixup=1.0), mean, std), inputs)


def test_without_erasing_and_mixing_images_are_only_normalised() -> None:
    stack = images(8)
    inputs = augmentation.model_inputs(stack, sample_uniforms(8), options(flip=1.0, policy="rand"), MEAN, STD)
    assert torch.equal(inputs, augmentation.normalise(stack, MEAN, STD))


def erased_boxes(blank: Tensor) -> list[tuple[int, int, int, int] | None]:
    """Top, left, height, width of each mask's True pixels (H, W), which must be a full rectangle; None without any."""
    boxes: list[tuple[int, int, int, int] | None] = []
    for mask in blank:
        rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
        if not len(rows):
            boxes.append(None)
            continue
        top, left = int(rows[0]), int(columns[0])
        height, width = int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
        assert mask[top : top + height, left : left + width].all() and mask.sum() == height * width
        boxes.append((top, left, height, width))
    return boxes


def test_erasing_blanks_a_rectangle_to_the_mean_in_all_channels() -> None:
    stack = torch.full((400, 3, 64, 48), 255, dtype=torch.uint8)  # no pixel equals the mean
    inputs = augmentation.model_inputs(stack, sample_uniforms(400), options(erase=0.3), MEAN, STD)
    blank = inputs == 0
    assert torch.equal(blank.all(dim=1), blank.any(dim=1))
    assert torch.equal(inputs[~blank], augmentation.normalise(stack, MEAN, STD)[~blank])
    boxes = erased_boxes(blank.all(dim=1))
    assert stats.binomtest(sum(box is not None for box in boxes), 400, 0.3).pvalue > 0.01
    for box in filter(None, boxes):
        _, _, height, width = box
        # 2 to 33 percent of the area, one side up to 3.3 of the other, all to half a pixel a side
        assert (height - 0.5) * (width - 0.5) / (64 * 48) <= 0.33 and (height + 0.5) * (width + 0.5) / (64 * 48) >= 0.02
        assert (width - 0.5) / (height + 0.5) <= 3.3 and (width + 0.5) / (height - 0.5) >= 0.3


def test_erased_areas_are_distributed_as_torchvisions() -> None:
    stack = torch.full((1000, 1, 224, 200), 255, dtype=torch.uint8)
    inputs = augmentation.model_inputs(stack, sample_uniforms(1000), options(erase=1.0), MEAN[:1], STD[:1])
    ours = np.array([box for box in erased_boxes(inputs[:, 0] == 0) if box is not None], dtype=float)
    torch.manual_seed(0)
    transform, empty = v2.RandomErasing(p=1.0, scale=(0.02, 0.33), ratio=(0.3, 3.3)), torch.zeros(1, 224, 200)
    parameters = [transform.make_params([empty]) for _ in range(1000)]
    theirs = np.array([[params[key] for key in "ijhw"] for params in parameters], dtype=float)
    assert len(ours) == 1000
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: np.abs(np.log(b[:, 3] / b[:, 2])), lambda b: b[:, 0]):
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.01


# Mixing: own images of ones and partners of zeros, so that each pixel shows its origin.


def mixed(count: int, size: tuple[int, int], uniforms: np.ndarray, **changes: Any) -> tuple[Tensor, Tensor]:
    """Mixed images (B, H, W) of own pixels (one) and the partner's (zero), and the shares of the own labels (B,)."""
    ones = torch.full((count, 1, *size), 255, dtype=torch.uint8)
    stack = torch.cat((ones, torch.zeros_like(ones)))
    chosen = options(**changes)
    inputs = augmentation.model_inputs(stack, uniforms, chosen, [0.0], [1.0])
    shares = augmentation.label_shares(uniforms, chosen, size)
    assert inputs.shape == (count, 1, *size) and shares.shape == (count,) and shares.dtype == torch.float32
    assert shares.min() >= 0 and shares.max() <= 1
    return inputs[:, 0], shares


@pytest.mark.parametrize("size", [(32, 32), (12, 40)])
def test_an_images_share_of_pixels_after_cutmix_is_its_share_of_the_label(size: tuple[int, int]) -> None:
    own_pixels, shares = mixed(500, size, sample_uniforms(1000), cutmix=1.0)
    assert {*own_pixels.unique().tolist()} == {0.0, 1.0}
    own = [int(image.sum()) for image in own_pixels]
    assert [round(float(share) * size[0] * size[1], 3) for share in shares] == own
    boxes = [box for box in erased_boxes(own_pixels == 0) if box is not None]
    assert len(boxes) > 450
    unclipped = [b for b in boxes if b[0] > 0 and b[1] > 0 and b[0] + b[2] < size[0] and b[1] + b[3] < size[1]]
    sides = np.array([(b[2] / size[0], b[3] / size[1]) for b in unclipped])
    assert len(unclipped) > 20 and np.abs(sides[:, 0] - sides[:, 1]).max() <= 1 / min(size) + 1 / max(size)


def test_the_position_of_a_cutmix_box_is_uniform_in_both_directions_independently() -> None:
    """The centre of a small box is uniform in both directions, and these are uncorrelated."""
    uniforms = sample_uniforms(2000)
    uniforms[:, augmentation._MIX_UNIFORMS.start + 2] = 0.98  # a share of 0.98, and so boxes of 9 of 64 pixels
    own_pixels, _ = mixed(1000, (64, 64), uniforms, cutmix=1.0)
    boxes = np.array([box for box in erased_boxes(own_pixels == 0) if box is not None], dtype=float)
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    assert len(boxes) > 950 and abs(np.corrcoef(centres.T)[0, 1]) < 0.1, "standard error 0.03"
    # Boxes that are clipped at the border have other centres, so centres near it are not counted.
    for column in centres.T:
        inner = column[(column > 8) & (column < 56)]
        assert stats.kstest(inner, stats.uniform(8, 48).cdf).pvalue > 0.01


def test_an_images_share_of_each_pixel_after_mixup_is_its_share_of_the_label() -> None:
    own_pixels, shares = mixed(500, (5, 7), sample_uniforms(1000), mixup=0.8)
    torch.testing.assert_close(own_pixels, shares[:, None, None].expand_as(own_pixels), rtol=0, atol=1e-6)
    assert shares.unique().numel() > 490


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_shares_of_mixup_are_beta_distributed(alpha: float) -> None:
    uniforms = sample_uniforms(8000)
    _, shares = mixed(4000, (1, 1), uniforms, mixup=alpha)
    assert stats.kstest(shares.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_shares_of_cutmix_are_beta_distributed_where_no_box_is_clipped(alpha: float) -> None:
    uniforms = sample_uniforms(4000)
    uniforms[:, augmentation._MIX_UNIFORMS.start + 3 : augmentation._MIX_UNIFORMS.stop] = 0.5  # centres in the middle
    shares = augmentation.label_shares(uniforms, options(cutmix=alpha), (5000, 5000))
    assert stats.kstest(shares.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_shares_of_cutmix_are_distributed_as_torchvisions() -> None:
    """The distribution of the shares with clipped boxes included."""
    shares = augmentation.label_shares(sample_uniforms(3000), options(cutmix=1.0), (224, 224)).double().numpy()
    torch.manual_seed(0)
    transform, empty = v2.CutMix(alpha=1.0, num_classes=10), torch.zeros(1, 3, 224, 224)
    parameters = [transform.make_params([empty])["lam_adjusted"] for _ in range(1500)]
    assert stats.ks_2samp(shares, np.array(parameters)).pvalue > 0.01


def test_mixing_an_image_with_itself_changes_nothing() -> None:
    stack, uniforms = images(100), sample_uniforms(200)
    twice = torch.cat((stack, stack))
    for changes in ({"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0, "mix": 0.5}):
        inputs = augmentation.model_inputs(twice, uniforms, options(**changes), MEAN, STD)
        assert torch.equal(inputs, augmentation.normalise(stack, MEAN, STD))


def test_each_image_is_mixed_with_its_own_partner() -> None:
    """Row b is mixed with row B + b: each image has a grey level of its own, and mixed levels are interpolated."""
    count = 50
    own, partners = torch.arange(count), 255 - torch.arange(count)
    stack = torch.cat((own, partners)).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    uniforms, chosen = sample_uniforms(2 * count), options(mixup=1.0)
    inputs = augmentation.model_inputs(stack, uniforms, chosen, [0.0], [1 / 255])
    shares = augmentation.label_shares(uniforms, chosen, (4, 4))
    expected = own * shares + partners * (1 - shares)
    torch.testing.assert_close(inputs, expected[:, None, None, None].expand_as(inputs), rtol=0, atol=1e-3)


def test_mixing_depends_only_on_the_own_images_uniforms() -> None:
    uniforms = sample_uniforms(200)
    other_partners = np.concatenate((uniforms[:100], sample_uniforms(100, seed=1)))
    for changes in ({"mixup": 0.4}, {"cutmix": 1.0}):
        first, second = (mixed(100, (8, 8), numbers, **changes) for numbers in (uniforms, other_partners))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("changes", "pasted", "blended"),
    [
        ({"mixup": 1.0, "cutmix": 1.0}, 0.5, 0.5),
        ({"mixup": 1.0, "cutmix": 1.0, "cutmix_share": 0.2}, 0.2, 0.8),
        ({"mixup": 1.0, "cutmix": 1.0, "mix": 0.3, "cutmix_share": 1.0}, 0.3, 0.0),
        ({"mixup": 1.0, "cutmix": 0.0, "cutmix_share": 0.9, "mix": 0.6}, 0.0, 0.6),
        ({"mixup": 0.0, "cutmix": 1.0, "cutmix_share": 0.1, "mix": 0.6}, 0.6, 0.0),
    ],
)
def test_mixup_and_cutmix_are_as_frequent_as_configured(
    changes: dict[str, float], pasted: float, blended: float
) -> None:
    own_pixels, shares = mixed(1000, (16, 16), sample_uniforms(2000), **changes)
    blended_pixels = (own_pixels > 0) & (own_pixels < 1)
    is_blended = blended_pixels.flatten(1).any(dim=1)
    assert torch.equal(blended_pixels[is_blended], torch.ones_like(blended_pixels[is_blended])), "all pixels or none"
    is_pasted = ~is_blended & (shares < 1)
    for is_mixed, probability in ((is_blended, blended), (is_pasted, pasted)):
        if probability in (0.0, 1.0):
            assert is_mixed.float().mean().item() == probability
        else:  # a box that rounds to zero pixels leaves its image unchanged
            assert is_mixed.float().mean().item() == pytest.approx(probability, abs=0.05)


@pytest.mark.parametrize("changes", [{"mix": 0.0, "mixup": 1.0}, {"mixup": 0.0, "cutmix": 0.0}])
def test_without_mixing_there_are_no_partners(changes: dict[str, float]) -> None:
    assert not options(**changes).mixes
    stack = images(6)
    inputs = augmentation.model_inputs(stack, sample_uniforms(6), options(**changes), MEAN, STD)
    assert torch.equal(inputs, augmentation.normalise(stack, MEAN, STD))
    assert options(mixup=0.1).mixes and options(cutmix=0.1).mixes


def test_own_image_and_partner_are_erased_independently_before_they_are_mixed() -> None:
    stack, uniforms = torch.full((100, 1, 16, 16), 255, dtype=torch.uint8), sample_uniforms(100)
    chosen = options(erase=0.5, mixup=1.0)
    inputs = augmentation.model_inputs(stack, uniforms, chosen, [0.0], [1.0])
    unmixed = augmentation.model_inputs(stack, uniforms, options(erase=0.5), [0.0], [1.0])
    share = augmentation.label_shares(uniforms, chosen, (16, 16))[:, None, None, None]
    torch.testing.assert_close(inputs, unmixed[:50] * share + unmixed[50:] * (1 - share), rtol=0, atol=1e-6)
    assert not torch.equal(unmixed[:50] == 0, unmixed[50:] == 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
def test_views_and_mixed_images_on_a_gpu_are_those_on_the_cpu() -> None:
    """A position that rounds differently may change a value by one level, or by a pixel where the nearest is taken."""
    stack, uniforms = images(200), sample_uniforms(200)
    for mode in MODES.values():
        on_cpu = augmentation.views(stack, uniforms, options(**mode), (16, 16))
        on_gpu = augmentation.views(stack.cuda(), uniforms, options(**mode), (16, 16)).cpu()
        assert ((on_cpu.int() - on_gpu.int()).abs() > 1).float().mean() < 1e-3
    chosen = options(erase=0.5, mixup=1.0, cutmix=1.0)
    on_cpu = augmentation.model_inputs(stack, uniforms, chosen, MEAN, STD)
    torch.testing.assert_close(
        augmentation.model_inputs(stack.cuda(), uniforms, chosen, MEAN, STD).cpu(), on_cpu, rtol=0, atol=1e-5
    )


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale": (0.9, 0.1)}, "data.augmentation.scale=[0.9, 0.1]: expected the smaller limit first, above 0."),
        ({"scale": (0.0, 0.5)}, "data.augmentation.scale=[0.0, 0.5]: expected the smaller limit first, above 0."),
        ({"ratio": (2.0, 1.0)}, "data.augmentation.ratio=[2.0, 1.0]: expected the smaller limit first, above 0."),
        (
            {"operations": 5},
            "data.augmentation.operations=5 and magnitude=9: expected at most 4 operations of a magnitude up to 30.",
        ),
        (
            {"magnitude": 31},
            "data.augmentation.operations=2 and magnitude=31: expected at most 4 operations of a magnitude up to 30.",
        ),
    ],
)
def test_options_that_types_cannot_refuse_are_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        options(**changes)
    assert str(caught.value) == sentence
