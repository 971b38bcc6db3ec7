"""Augmentation against torchvision's transforms, scipy's sampling, and pixels that say where they come from."""

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
    drawn = generator("augmentation", count, height, width)
    return torch.randint(0, 256, (count, channels, height, width), generator=drawn).to(torch.uint8)


def draw(count: int, seed: int = 0) -> np.ndarray:
    return augmentation.sample_uniforms(count, generator("uniforms", seed)).numpy()


# Random numbers.


def test_numbers_are_drawn_in_double_precision_for_each_view() -> None:
    drawn = augmentation.sample_uniforms(2000, generator(0))
    assert drawn.shape == (2000, UNIFORMS_PER_VIEW) and drawn.dtype == torch.float64
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn.flatten()[:20000].numpy(), "uniform").pvalue > 0.01
    assert torch.equal(augmentation.sample_uniforms(2000, generator(0)), drawn)


def test_no_number_decides_two_things() -> None:
    used = [augmentation._FLIP_UNIFORM, augmentation._ERASES_UNIFORM]
    for name in ("CROP", "ERASE", "MIX", "POLICY"):
        used += range(UNIFORMS_PER_VIEW)[getattr(augmentation, f"_{name}_UNIFORMS")]
    assert sorted(used) == [*range(UNIFORMS_PER_VIEW)]


# One image.

Box = tuple[float, float, float, float]


def box_of(numbers: np.ndarray, height: int, width: int, scale: Any, ratio: Any) -> Box | None:
    """torchvision's recipe, one attempt after the other: ten areas, ten ratios and a place; None when none fits."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        shape = math.exp(low + (high - low) * numbers[10 + attempt])
        w, h = math.sqrt(area * shape), math.sqrt(area / shape)
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
        # A box that lies otherwise in memory is rounded otherwise: at most by one level.
        found = augmentation.view(image, numbers, chosen, (24, 20), interpolation)
        assert found.shape == (3, 24, 20) and found.dtype == torch.uint8
        torch.testing.assert_close(found.int(), expected.int(), rtol=0, atol=1)


def test_boxes_of_a_stack_are_the_recipes() -> None:
    drawn = draw(300)
    for height, width, scale, ratio in ((16, 16, (0.08, 1.0), (0.75, 4 / 3)), (12, 40, (0.3, 1.0), (0.5, 2.0))):
        found = augmentation._random_boxes(drawn[:, :22], height, width, scale, ratio)
        for numbers, box in zip(drawn, found, strict=True):
            expected = box_of(numbers, height, width, scale, ratio)
            if expected is not None:
                np.testing.assert_allclose(box, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(10, 40), (40, 10), (30, 30)])
@pytest.mark.parametrize("ratio", [(1.0, 1.0), (0.5, 0.8), (1.5, 2.5)])
def test_where_no_box_fits_it_is_the_largest_in_the_middle_as_in_torchvision(
    height: int, width: int, ratio: tuple[float, float]
) -> None:
    """All of the area in another shape than the image's never fits, so torchvision's choice is no longer random."""
    found = augmentation._random_boxes(draw(1)[:, :22], height, width, (1.0, 1.0), ratio)[0]
    params = v2.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=ratio).make_params([torch.zeros(3, height, width)])
    expected = [params[key] for key in ("top", "left", "height", "width")]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1)  # torchvision's are whole pixels
    assert found[0] + found[2] <= height + 1e-9 and found[1] + found[3] <= width + 1e-9
    assert ratio[0] - 1e-9 <= found[3] / found[2] <= ratio[1] + 1e-9


@pytest.mark.parametrize(("height", "width"), [(240, 320), (500, 150)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Area, ratio and place of 1,500 each; on images so large that whole pixels do not show."""
    chosen = options(crop="resized")
    ours = augmentation._random_boxes(draw(1500)[:, :22], height, width, chosen.scale, chosen.ratio)
    torch.manual_seed(0)
    transform, empty = v2.RandomResizedCrop(8, scale=chosen.scale, ratio=chosen.ratio), torch.zeros(1, height, width)
    made = [transform.make_params([empty]) for _ in range(1500)]
    theirs = np.array([[params[key] for key in ("top", "left", "height", "width")] for params in made], dtype=float)
    for quantity in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] + b[:, 2] / 2,
        lambda b: b[:, 1] + b[:, 3] / 2,
    ):
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.01


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 3), (2, 9)])
def test_a_crop_of_a_tiny_image_stays_inside_it(height: int, width: int) -> None:
    """Boxes of less than half a pixel; outside there would be black."""
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    for numbers in augmentation.sample_uniforms(200, generator(0)):
        found = augmentation.view(image, numbers, options(crop="resized", scale=(0.001, 0.05)), (4, 4), "bilinear")
        assert torch.equal(found, torch.full((3, 4, 4), 200, dtype=torch.uint8))


def test_without_a_crop_a_view_is_the_evaluated_image_flipped_or_not() -> None:
    (image,) = images(1, 20, 30)
    plain = augmentation.evaluation_view(image, (8, 8), 1.0, "bicubic")
    flips = 0
    for numbers in augmentation.sample_uniforms(40, generator(0)):
        found = augmentation.view(image, numbers, options(flip=0.5), (8, 8), "bicubic")
        flipped = bool(numbers[augmentation._FLIP_UNIFORM] < 0.5)
        assert torch.equal(found, plain.flip(2) if flipped else plain)
        flips += flipped
    assert 8 < flips < 32


def test_a_padded_view_is_shifted_by_whole_pixels_over_zeros() -> None:
    (image,) = images(1)
    shifts = set()
    for numbers in augmentation.sample_uniforms(300, generator(0)):
        found = augmentation.view(image, numbers, options(crop="padded", padding=2), (16, 16), "bilinear")
        down, right = (math.floor(u * 5) for u in numbers[20:22].tolist())
        expected = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))[:, down : down + 16, right : right + 16]
        assert np.array_equal(found.numpy(), expected)
        shifts.add((down, right))
    assert len(shifts) == 25


def test_a_view_ends_with_its_policy() -> None:
    (image,) = images(1)
    for numbers in augmentation.sample_uniforms(10, generator(0)):
        before = augmentation.view(image, numbers, options(crop="resized", flip=0.5), (16, 16), "bilinear")
        found = augmentation.view(
            image, numbers, options(crop="resized", flip=0.5, policy="trivial"), (16, 16), "bilinear"
        )
        expected = policies.apply(before[None], numbers[None, augmentation._POLICY_UNIFORMS].numpy(), "trivial", 1, 0)[
            0
        ]
        assert torch.equal(found, expected)


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
    stack, drawn = images(60, channels=channels), draw(60)
    chosen = options(**MODES[mode])
    torch.manual_seed(0)
    together = augmentation.views(stack, drawn, chosen, size)
    torch.manual_seed(1)  # nothing but `drawn` is random
    alone = [augmentation.views(stack[i : i + 1], drawn[i : i + 1], chosen, size) for i in range(60)]
    assert together.dtype == torch.uint8 and together.shape == (60, channels, *size)
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("mode", MODES)
def test_every_image_of_a_stack_has_its_own_parameters(mode: str) -> None:
    same = images(1).expand(30, -1, -1, -1)
    found = augmentation.views(same, draw(30), options(**MODES[mode]), (16, 16))
    kinds = len(found.flatten(1).unique(dim=0))
    assert kinds == 2 if mode == "none" else kinds > 20


@pytest.mark.parametrize("size", [(16, 16), (11, 23)])
def test_a_crop_of_a_stack_is_bilinear_at_the_boxs_places(size: tuple[int, int]) -> None:
    """By scipy: output pixel i of n stands at (i + 1/2) / n of the box, values between pixels' centres are linear."""
    stack, drawn = images(40, 16, 14), draw(40)
    chosen = options(crop="resized", scale=(0.2, 1.0), flip=0.5)
    found = augmentation.views(stack, drawn, chosen, size)
    for image, numbers, view in zip(stack, drawn, found, strict=True):
        box = box_of(numbers, 16, 14, chosen.scale, chosen.ratio)
        assert box is not None
        rows = box[0] + (np.arange(size[0]) + 0.5) / size[0] * box[2] - 0.5
        columns = box[1] + (np.arange(size[1]) + 0.5) / size[1] * box[3] - 0.5
        if numbers[augmentation._FLIP_UNIFORM] < 0.5:
            columns = columns[::-1]
        places = np.meshgrid(rows, columns, indexing="ij")
        expected = [ndimage.map_coordinates(c, places, order=1, mode="nearest") for c in image.double().numpy()]
        # Half a level by rounding, and a place that is known to 1e-5 of a pixel with slopes of up to 255.
        assert np.abs(view.numpy() - np.stack(expected)).max() < 0.51


def test_a_crop_of_whole_pixels_is_torchvisions_inside() -> None:
    """A quarter of 16 x 16 in whole pixels, enlarged: what lies between pixels of the box is the same.

    One level may differ, since torchvision's weights for uint8 are whole numbers. Along the box's border torchvision
    repeats its outermost pixels, and here the image goes on; so the border of half a pixel, 2 of 32, is left out.
    """
    stack, drawn = images(49), draw(49)
    drawn[:, 20], drawn[:, 21] = np.arange(49) // 7 / 8, np.arange(49) % 7 / 8  # (16 - 8) times this
    chosen = options(crop="resized", scale=(0.25, 0.25), ratio=(1.0, 1.0))
    found = augmentation.views(stack, drawn, chosen, (32, 32))
    for number, (image, view) in enumerate(zip(stack, found, strict=True)):
        expected = functional.resized_crop(image, number // 7, number % 7, 8, 8, [32, 32], antialias=True)
        inside = (slice(None), slice(2, -2), slice(2, -2))
        torch.testing.assert_close(view[inside].int(), expected[inside].int(), rtol=0, atol=1)


def test_the_whole_image_enlarged_is_torchvisions_up_to_its_border() -> None:
    stack, drawn = images(5), draw(5)
    chosen = options(crop="resized", scale=(1.0, 1.0), ratio=(1.0, 1.0))
    expected = functional.resize(stack, [40, 40], antialias=True)
    found = augmentation.views(stack, drawn, chosen, (40, 40))
    torch.testing.assert_close(found.int(), expected.int(), rtol=0, atol=1)  # whole-number weights, as above
    assert torch.equal(augmentation.views(stack, drawn, chosen, (16, 16)), stack)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (9, 20), (28, 28), (32, 32), (224, 160)])
def test_flips_of_a_stack_are_exact(height: int, width: int) -> None:
    stack, drawn = images(20, height, width), draw(20)
    flipped = drawn[:, augmentation._FLIP_UNIFORM] < 0.5
    found = augmentation.views(stack, drawn, options(flip=0.5), (height, width))
    for image, view, is_flipped in zip(stack, found, flipped, strict=True):
        assert torch.equal(view, functional.horizontal_flip(image) if is_flipped else image)
    assert torch.equal(augmentation.views(stack, drawn, options(flip=1.0), (height, width)), stack.flip(3))
    assert augmentation.views(stack, drawn, options(), (height, width)) is stack


@pytest.mark.parametrize("padding", [1, 4])
@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_padded_crops_of_a_stack_are_those_of_one_image_exactly(padding: int, flip: float) -> None:
    stack, numbers = images(60, 16, 20), augmentation.sample_uniforms(60, generator(0))
    chosen = options(crop="padded", padding=padding, flip=flip)
    found = augmentation.views(stack, numbers.numpy(), chosen, (16, 20))
    for image, row, view in zip(stack, numbers, found, strict=True):
        assert torch.equal(view, augmentation.view(image, row, chosen, (16, 20), "bilinear"))


@pytest.mark.parametrize("size", [(16, 32), (32, 16), (24, 24), (40, 20)])
def test_without_a_crop_a_stack_shows_what_is_evaluated(size: tuple[int, int]) -> None:
    """Also in another shape: covered and cut to the centre, never stretched. One level: see above."""
    stack, drawn = images(6), draw(6)
    found = augmentation.views(stack, drawn, options(), size)
    expected = augmentation.evaluation_view(stack, size, 1.0, "bilinear")
    torch.testing.assert_close(found.int(), expected.int(), rtol=0, atol=1)


@pytest.mark.parametrize("size", [(32, 32), (16, 32)])
def test_padding_is_counted_in_pixels_of_the_view(size: tuple[int, int]) -> None:
    """A white image twice as large, moved by up to three pixels: black are as many lines as it was moved by."""
    stack, drawn = torch.full((80, 1, 16, 16), 255, dtype=torch.uint8), draw(80)
    found = augmentation.views(stack, drawn, options(crop="padded", padding=3), (32, 32))
    down, right = (np.floor(drawn[:, i] * 7) - 3 for i in (20, 21))
    for view, y, x in zip(found, down, right, strict=True):
        # Half of the outermost line blends with the black beside it.
        assert abs((view[0, :, 16] < 128).sum().item() - abs(y)) <= 1
        assert abs((view[0, 16] < 128).sum().item() - abs(x)) <= 1


def test_a_stack_is_left_as_it_was() -> None:
    stack = images(20)
    before = stack.clone()
    for mode in MODES.values():
        augmentation.views(stack, draw(20), options(**mode), (16, 16))
    assert torch.equal(stack, before)


# As evaluated.


@pytest.mark.parametrize(("height", "width"), [(16, 16), (20, 50), (50, 20), (7, 9)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_an_evaluated_image_is_covered_and_cut_as_by_torchvision(height: int, width: int, crop_ratio: float) -> None:
    stack = images(3, height, width)
    found = augmentation.evaluation_view(stack, (14, 14), crop_ratio, "bicubic")
    transforms = v2.Compose(
        [v2.Resize(round(14 / crop_ratio), InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(14)]
    )
    assert torch.equal(found, transforms(stack))
    assert torch.equal(found[1], augmentation.evaluation_view(stack[1], (14, 14), crop_ratio, "bicubic"))


def test_an_image_of_the_right_size_is_evaluated_as_it_is() -> None:
    stack = images(3, 8, 12)
    assert torch.equal(augmentation.evaluation_view(stack, (8, 12), 1.0, "bilinear"), stack)


# To what the network sees.


@pytest.mark.parametrize("channels", [1, 3])
def test_normalising_is_the_plain_formula(channels: int) -> None:
    stack, mean, std = images(4, channels=channels), MEAN[:channels], STD[:channels]
    expected = functional.normalize(stack.double() / 255, mean, std)
    found = augmentation.normalise(stack, mean, std)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)  # fp32 of values up to five
    assert torch.equal(augmentation.model_inputs(stack, None, options(erase=1.0, mixup=1.0), mean, std), found)


def test_nothing_is_erased_or_mixed_when_it_is_off() -> None:
    stack = images(8)
    found = augmentation.model_inputs(stack, draw(8), options(flip=1.0, policy="rand"), MEAN, STD)
    assert torch.equal(found, augmentation.normalise(stack, MEAN, STD))


def erased_boxes(blank: Tensor) -> list[tuple[int, int, int, int] | None]:
    """Top, left, height, width of the True pixels of each (H, W), which must be a full rectangle; None without any."""
    boxes: list[tuple[int, int, int, int] | None] = []
    for one in blank:
        rows, columns = one.any(dim=1).nonzero().flatten(), one.any(dim=0).nonzero().flatten()
        if not len(rows):
            boxes.append(None)
            continue
        top, left = int(rows[0]), int(columns[0])
        height, width = int(rows[-1]) - top + 1, int(columns[-1]) - left + 1
        assert one[top : top + height, left : left + width].all() and one.sum() == height * width
        boxes.append((top, left, height, width))
    return boxes


def test_erasing_blanks_a_rectangle_to_the_mean_in_all_channels() -> None:
    stack = torch.full((400, 3, 64, 48), 255, dtype=torch.uint8)  # nowhere the mean
    found = augmentation.model_inputs(stack, draw(400), options(erase=0.3), MEAN, STD)
    blank = found == 0
    assert torch.equal(blank.all(dim=1), blank.any(dim=1))
    assert torch.equal(found[~blank], augmentation.normalise(stack, MEAN, STD)[~blank])
    boxes = erased_boxes(blank.all(dim=1))
    assert stats.binomtest(sum(box is not None for box in boxes), 400, 0.3).pvalue > 0.01
    for box in filter(None, boxes):
        _, _, height, width = box
        # 2 to 33 percent of the area, one side up to 3.3 of the other, all to half a pixel a side
        assert (height - 0.5) * (width - 0.5) / (64 * 48) <= 0.33 and (height + 0.5) * (width + 0.5) / (64 * 48) >= 0.02
        assert (width - 0.5) / (height + 0.5) <= 3.3 and (width + 0.5) / (height - 0.5) >= 0.3


def test_erased_areas_are_distributed_as_torchvisions() -> None:
    stack = torch.full((1000, 1, 224, 200), 255, dtype=torch.uint8)
    found = augmentation.model_inputs(stack, draw(1000), options(erase=1.0), MEAN[:1], STD[:1])
    ours = np.array([box for box in erased_boxes(found[:, 0] == 0) if box is not None], dtype=float)
    torch.manual_seed(0)
    transform, empty = v2.RandomErasing(p=1.0, scale=(0.02, 0.33), ratio=(0.3, 3.3)), torch.zeros(1, 224, 200)
    made = [transform.make_params([empty]) for _ in range(1000)]
    theirs = np.array([[params[key] for key in "ijhw"] for params in made], dtype=float)
    assert len(ours) == 1000
    for quantity in (lambda b: b[:, 2] * b[:, 3], lambda b: np.abs(np.log(b[:, 3] / b[:, 2])), lambda b: b[:, 0]):
        assert stats.ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.01


# Mixing: own images of ones and partners of zeros say by each pixel where it comes from.


def mixed(count: int, size: tuple[int, int], drawn: np.ndarray, **changes: Any) -> tuple[Tensor, Tensor]:
    """(B, H, W) of ones where one's own and zeros where the partner's; and the shares of the labels (B,)."""
    own = torch.full((count, 1, *size), 255, dtype=torch.uint8)
    stack = torch.cat((own, torch.zeros_like(own)))
    chosen = options(**changes)
    found = augmentation.model_inputs(stack, drawn, chosen, [0.0], [1.0])
    shares = augmentation.label_shares(drawn, chosen, size)
    assert found.shape == (count, 1, *size) and shares.shape == (count,) and shares.dtype == torch.float32
    assert shares.min() >= 0 and shares.max() <= 1
    return found[:, 0], shares


@pytest.mark.parametrize("size", [(32, 32), (12, 40)])
def test_a_cut_images_share_of_pixels_is_its_share_of_the_label(size: tuple[int, int]) -> None:
    found, shares = mixed(500, size, draw(1000), cutmix=1.0)
    assert {*found.unique().tolist()} == {0.0, 1.0}
    own = [int(one.sum()) for one in found]
    assert [round(float(share) * size[0] * size[1], 3) for share in shares] == own
    boxes = [box for box in erased_boxes(found == 0) if box is not None]
    assert len(boxes) > 450
    free = [b for b in boxes if b[0] > 0 and b[1] > 0 and b[0] + b[2] < size[0] and b[1] + b[3] < size[1]]
    shapes = np.array([(b[2] / size[0], b[3] / size[1]) for b in free])
    assert len(free) > 20 and np.abs(shapes[:, 0] - shapes[:, 1]).max() <= 1 / min(size) + 1 / max(size)


def test_boxes_are_cut_anywhere_down_and_across_for_themselves() -> None:
    """A small box's middle is uniform in both directions, and knowing the one says nothing of the other."""
    drawn = draw(2000)
    drawn[:, augmentation._MIX_UNIFORMS.start + 2] = 0.98  # a share of 0.98, and so boxes of 9 of 64 pixels
    found, _ = mixed(1000, (64, 64), drawn, cutmix=1.0)
    boxes = np.array([box for box in erased_boxes(found == 0) if box is not None], dtype=float)
    middles = boxes[:, :2] + boxes[:, 2:] / 2
    assert len(boxes) > 950 and abs(np.corrcoef(middles.T)[0, 1]) < 0.1, "known to 0.03"
    # Boxes that reach over the border have their middles moved inside, so places next to it are left out.
    for column in middles.T:
        inner = column[(column > 8) & (column < 56)]
        assert stats.kstest(inner, stats.uniform(8, 48).cdf).pvalue > 0.01


def test_a_blended_images_share_of_each_pixel_is_its_share_of_the_label() -> None:
    found, shares = mixed(500, (5, 7), draw(1000), mixup=0.8)
    torch.testing.assert_close(found, shares[:, None, None].expand_as(found), rtol=0, atol=1e-6)
    assert shares.unique().numel() > 490


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_shares_of_blended_images_are_betas(alpha: float) -> None:
    drawn = draw(8000)
    _, shares = mixed(4000, (1, 1), drawn, mixup=alpha)
    assert stats.kstest(shares.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_shares_of_cut_images_are_betas_where_no_border_cuts_the_box(alpha: float) -> None:
    drawn = draw(4000)
    drawn[:, augmentation._MIX_UNIFORMS.start + 3 : augmentation._MIX_UNIFORMS.stop] = 0.5  # centres in the middle
    shares = augmentation.label_shares(drawn, options(cutmix=alpha), (5000, 5000))
    assert stats.kstest(shares.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_cut_images_are_as_torchvisions() -> None:
    """The whole distribution of the shares, boxes that reach over the border included."""
    shares = augmentation.label_shares(draw(3000), options(cutmix=1.0), (224, 224)).double().numpy()
    torch.manual_seed(0)
    transform, empty = v2.CutMix(alpha=1.0, num_classes=10), torch.zeros(1, 3, 224, 224)
    made = [transform.make_params([empty])["lam_adjusted"] for _ in range(1500)]
    assert stats.ks_2samp(shares, np.array(made)).pvalue > 0.01


def test_mixing_with_oneself_changes_nothing() -> None:
    stack, drawn = images(100), draw(200)
    twice = torch.cat((stack, stack))
    for changes in ({"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0, "mix": 0.5}):
        found = augmentation.model_inputs(twice, drawn, options(**changes), MEAN, STD)
        assert torch.equal(found, augmentation.normalise(stack, MEAN, STD))


def test_a_mixed_image_is_of_its_own_partner() -> None:
    """Row b with row B + b: every image has a level of its own, which the result must lie between."""
    count = 50
    own, partners = torch.arange(count), 255 - torch.arange(count)
    stack = torch.cat((own, partners)).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    drawn, chosen = draw(2 * count), options(mixup=1.0)
    found = augmentation.model_inputs(stack, drawn, chosen, [0.0], [1 / 255])
    shares = augmentation.label_shares(drawn, chosen, (4, 4))
    expected = own * shares + partners * (1 - shares)
    torch.testing.assert_close(found, expected[:, None, None, None].expand_as(found), rtol=0, atol=1e-3)


def test_mixing_looks_at_the_own_images_numbers_alone() -> None:
    drawn = draw(200)
    other = np.concatenate((drawn[:100], draw(100, seed=1)))
    for changes in ({"mixup": 0.4}, {"cutmix": 1.0}):
        ours, theirs = (mixed(100, (8, 8), numbers, **changes) for numbers in (drawn, other))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(
    ("changes", "cut", "blended"),
    [
        ({"mixup": 1.0, "cutmix": 1.0}, 0.5, 0.5),
        ({"mixup": 1.0, "cutmix": 1.0, "cutmix_share": 0.2}, 0.2, 0.8),
        ({"mixup": 1.0, "cutmix": 1.0, "mix": 0.3, "cutmix_share": 1.0}, 0.3, 0.0),
        ({"mixup": 1.0, "cutmix": 0.0, "cutmix_share": 0.9, "mix": 0.6}, 0.0, 0.6),
        ({"mixup": 0.0, "cutmix": 1.0, "cutmix_share": 0.1, "mix": 0.6}, 0.6, 0.0),
    ],
)
def test_images_are_mixed_in_one_of_two_ways_as_often_as_asked(
    changes: dict[str, float], cut: float, blended: float
) -> None:
    found, shares = mixed(1000, (16, 16), draw(2000), **changes)
    inside = (found > 0) & (found < 1)
    was_blended = inside.flatten(1).any(dim=1)
    assert torch.equal(inside[was_blended], torch.ones_like(inside[was_blended])), "all pixels or none"
    was_cut = ~was_blended & (shares < 1)
    for seen, chance in ((was_blended, blended), (was_cut, cut)):
        if chance in (0.0, 1.0):
            assert seen.float().mean().item() == chance
        else:  # boxes that round to nothing leave some images as they are
            assert seen.float().mean().item() == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize("changes", [{"mix": 0.0, "mixup": 1.0}, {"mixup": 0.0, "cutmix": 0.0}])
def test_without_mixing_there_are_no_partners(changes: dict[str, float]) -> None:
    assert not options(**changes).mixes
    stack = images(6)
    found = augmentation.model_inputs(stack, draw(6), options(**changes), MEAN, STD)
    assert torch.equal(found, augmentation.normalise(stack, MEAN, STD))
    assert options(mixup=0.1).mixes and options(cutmix=0.1).mixes


def test_own_and_partner_are_erased_for_themselves_before_they_are_mixed() -> None:
    stack, drawn = torch.full((100, 1, 16, 16), 255, dtype=torch.uint8), draw(100)
    chosen = options(erase=0.5, mixup=1.0)
    found = augmentation.model_inputs(stack, drawn, chosen, [0.0], [1.0])
    apart = augmentation.model_inputs(stack, drawn, options(erase=0.5), [0.0], [1.0])
    share = augmentation.label_shares(drawn, chosen, (16, 16))[:, None, None, None]
    torch.testing.assert_close(found, apart[:50] * share + apart[50:] * (1 - share), rtol=0, atol=1e-6)
    assert not torch.equal(apart[:50] == 0, apart[50:] == 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
def test_a_gpu_shows_the_same_views_and_mixes_them_alike() -> None:
    """A place that rounds otherwise may differ by a level, or by a pixel where the nearest is taken."""
    stack, drawn = images(200), draw(200)
    for mode in MODES.values():
        here = augmentation.views(stack, drawn, options(**mode), (16, 16))
        there = augmentation.views(stack.cuda(), drawn, options(**mode), (16, 16)).cpu()
        assert ((here.int() - there.int()).abs() > 1).float().mean() < 1e-3
    chosen = options(erase=0.5, mixup=1.0, cutmix=1.0)
    here = augmentation.model_inputs(stack, drawn, chosen, MEAN, STD)
    torch.testing.assert_close(
        augmentation.model_inputs(stack.cuda(), drawn, chosen, MEAN, STD).cpu(), here, rtol=0, atol=1e-5
    )


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale": (0.9, 0.1)}, "data.augmentation.scale=[0.9, 0.1]: expected the least first, above 0."),
        ({"scale": (0.0, 0.5)}, "data.augmentation.scale=[0.0, 0.5]: expected the least first, above 0."),
        ({"ratio": (2.0, 1.0)}, "data.augmentation.ratio=[2.0, 1.0]: expected the least first, above 0."),
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
def test_what_the_types_cannot_refuse_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        options(**changes)
    assert str(caught.value) == sentence
