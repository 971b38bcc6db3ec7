"""The augmentation against PIL, against boxes painted into the pixels, and against the reference's size rule."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from detr.data.transforms import (
    Augmentation,
    Objects,
    as_bounding_boxes,
    augment,
    random_size_crop,
    resize,
    resize_masks,
    resized_shape,
)

PAPER = Augmentation(
    kind="detr",
    sizes=list(range(480, 801, 32)),
    eval_size=800,
    max_size=1333,
    middle_sizes=[400, 500, 600],
    crop=(384, 600),
)


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def image_of(height: int, width: int) -> torch.Tensor:
    """Random pixels uint8 (3, height, width)."""
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator())


def objects_of(image: torch.Tensor, boxes: list[list[float]], masks: torch.Tensor | None = None) -> Objects:
    """Objects with the labels 0, 1, ..."""
    as_boxes = as_bounding_boxes(image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    return Objects(as_boxes, torch.arange(len(boxes)), masks)


def reference_size(height: int, width: int, size: int, max_size: int | None) -> tuple[int, int]:
    """The published rule for (height, width), implemented from its description."""
    small, large = float(min(height, width)), float(max(height, width))
    if max_size is not None and large / small * size > max_size:
        size = round(max_size * small / large)
    if min(height, width) == size:
        return height, width
    return (int(size * height / width), size) if width < height else (size, int(size * width / height))


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(427, 640, (800, 1199)), (240, 640, (500, 1333)), (640, 427, (1199, 800))]
)
def test_published_sizes(height: int, width: int, expected: tuple[int, int]):
    assert resized_shape(height, width, 800, 1333) == expected


def test_sizes_follow_the_reference_rule():
    rng = np.random.default_rng(0)
    for height, width, size, limit in rng.integers(16, 1500, (2000, 4)).tolist():
        for max_size in (None, limit):
            assert resized_shape(height, width, size, max_size) == reference_size(height, width, size, max_size)


def test_a_thin_strip_keeps_one_pixel():
    image = image_of(2, 900)
    assert resize(image, objects_of(image, []), 64, 100)[0].shape == (3, 1, 100)


def test_resizing_agrees_with_pil():
    image = image_of(90, 120)
    ours, _ = resize(image, objects_of(image, []), 40, 1333)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((53, 40), Image.Resampling.BILINEAR)
    difference = ours.permute(1, 2, 0).int() - torch.from_numpy(np.array(pil)).int()
    assert ours.shape == (3, 40, 53)
    assert difference.abs().max() <= 1  # both round once after each axis


def test_an_image_of_the_right_size_is_not_resized():
    image = image_of(64, 64)
    assert resize(image, objects_of(image, []), 64, 64)[0] is image


def painted(height: int, width: int, boxes: list[list[int]]) -> torch.Tensor:
    """Black, with box i bright in channel i."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        image[i, y0:y1, x0:x1] = 255
    return image


def bright_area(channel: torch.Tensor) -> list[int]:
    """The xyxy box of the bright pixels of (H, W)."""
    rows, columns = (channel > 127).nonzero().unbind(1)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def test_boxes_stay_on_their_objects():
    """After a flip, a crop and two resizings."""
    objects = [[10, 20, 210, 180], [300, 40, 620, 400], [60, 250, 280, 460]]
    image = painted(480, 640, objects)
    for seed in range(25):
        augmented, (boxes, labels, masks) = augment(image, objects_of(image, objects), PAPER, generator(seed))
        assert masks is None and len(boxes) == len(labels) > 0
        assert min(augmented.shape[1:]) in PAPER.sizes or max(augmented.shape[1:]) == PAPER.max_size
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            # A pixel before the second resizing is at most two after it; an edge is blurred over one of those.
            assert max(abs(x - y) for x, y in zip(bright_area(augmented[label]), box, strict=True)) <= 2


def test_masks_stay_on_their_objects_and_change_nothing_else():
    """After a flip, a crop and two resizings, a mask shows the bright pixels of its object."""
    objects = [[10, 20, 210, 180], [300, 40, 620, 400], [60, 250, 280, 460]]
    image = painted(480, 640, objects)
    for seed in range(25):
        plain = augment(image, objects_of(image, objects), PAPER, generator(seed))
        augmented, (boxes, labels, masks) = augment(
            image, objects_of(image, objects, (image > 0).byte()), PAPER, generator(seed)
        )
        assert torch.equal(plain[0], augmented) and torch.equal(plain[1].boxes, boxes)
        assert torch.equal(plain[1].labels, labels) and masks.dtype == torch.uint8
        assert masks.shape == (len(boxes), *augmented.shape[1:])
        for box, label, mask in zip(boxes.tolist(), labels.tolist(), masks, strict=True):
            # The nearest pixel and the antialiased edge differ by at most two pixels, after two resizings.
            assert max(abs(x - y) for x, y in zip(bright_area(mask * 255), box, strict=True)) <= 3
            assert ((augmented[label] > 127) != mask.bool()).float().mean() < 0.01


@pytest.mark.parametrize("shape", [(61, 97), (13, 20), (80, 33), (40, 60), (120, 180), (800, 1199)])
def test_a_resized_mask_is_that_of_the_official_code(shape: tuple[int, int]):
    """It calls `interpolate(mode="nearest")`, which rounds, so pixels whose origin is a whole number may differ.

    Here, these pixels are copies of the pixel of their origin.
    """
    masks = torch.randint(0, 2, (3, 40, 60), dtype=torch.uint8, generator=generator())
    resized = resize_masks(masks, list(shape))
    official = torch.nn.functional.interpolate(masks[:, None].float(), shape, mode="nearest")[:, 0].byte()
    (rows, whole_rows), (columns, whole_columns) = (
        (torch.arange(new) * old // new, torch.arange(new) * old % new == 0)
        for new, old in zip(shape, (40, 60), strict=True)
    )
    assert torch.equal(resized[:, ~whole_rows][:, :, ~whole_columns], official[:, ~whole_rows][:, :, ~whole_columns])
    assert torch.equal(
        resized[:, whole_rows][:, :, whole_columns], masks[:, rows[whole_rows]][:, :, columns[whole_columns]]
    )
    assert resized.shape == (3, *shape) and resized.dtype == torch.uint8


def test_an_object_whose_mask_is_cropped_away_is_kept_for_its_box():
    """The mask is the left half of the box, and the window shows the right half."""
    image = image_of(20, 20)
    mask = torch.zeros(2, 20, 20, dtype=torch.uint8)
    mask[0, :, :10] = mask[1, :, :5] = 1
    boxes, labels, masks = objects_of(image, [[0, 0, 20, 20], [0, 0, 5, 20]], mask).crop(0, 10, 20, 10)
    assert boxes.tolist() == [[0, 0, 10, 20]] and labels.tolist() == [0]
    assert masks is not None and masks.shape == (1, 20, 10) and not masks.any()
    assert boxes.canvas_size == (20, 10)


def test_crops_keep_exactly_the_visible_boxes():
    objects = [[0, 0, 20, 20], [30, 30, 60, 50], [80, 80, 100, 100]]
    image = painted(100, 100, objects)
    shapes = set()
    for seed in range(50):
        augmented, (boxes, labels, masks) = random_size_crop(
            image, objects_of(image, objects, (image > 0).byte()), (30, 60), generator(seed)
        )
        shapes.add(tuple(augmented.shape[1:]))
        assert labels.tolist() == [i for i in range(3) if augmented[i].any()]
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            assert box == bright_area(augmented[label])
        assert masks is not None and torch.equal(masks, (augmented[labels] > 0).byte())
    assert all(30 <= side <= 60 for shape in shapes for side in shape) and len(shapes) > 10


def test_a_crop_of_a_small_image_keeps_its_short_side():
    image = image_of(20, 500)
    augmented, _ = random_size_crop(image, objects_of(image, []), (384, 600), generator())
    assert augmented.shape[1] == 20 and 384 <= augmented.shape[2] <= 500


def test_the_result_depends_on_the_generator_alone():
    image = image_of(300, 400)

    def run(seed: int) -> torch.Tensor:
        torch.rand(seed)  # the global generator must not matter
        return augment(image, objects_of(image, [[10, 10, 200, 200]]), PAPER, generator(seed))[0]

    assert torch.equal(run(1), run(1))
    assert len({tuple(run(seed).shape) for seed in range(8)}) > 2


def test_half_of_the_images_are_flipped():
    image = torch.zeros(3, 4, 400, dtype=torch.uint8)
    image[:, :, 200:] = 200  # bright on the right unless flipped
    options = Augmentation(kind="flip", sizes=[4], eval_size=4, max_size=400, middle_sizes=[4], crop=(4, 4))
    flips = [augment(image, objects_of(image, []), options, generator(seed))[0][0, 0, 0] > 100 for seed in range(400)]
    assert 160 < sum(flips) < 240  # four standard deviations of a fair coin


def test_evaluation_and_kind_none_only_resize():
    image = image_of(90, 120)
    plain = Augmentation(kind="none", sizes=[1], eval_size=45, max_size=1333, middle_sizes=[1], crop=(1, 1))
    for rng, options in ((None, PAPER), (generator(), plain)):
        augmented, (boxes, labels, _) = augment(image, objects_of(image, [[0, 0, 60, 90]]), options, rng)
        size = options.eval_size
        assert augmented.shape[1] == size and labels.tolist() == [0]
        torch.testing.assert_close(boxes.tolist()[0], [0.0, 0.0, augmented.shape[2] / 2, float(size)])


def test_empty_and_inverted_options_are_refused():
    for changes, word in (({"sizes": []}, "sizes"), ({"middle_sizes": []}, "middle_sizes"), ({"crop": (9, 8)}, "crop")):
        with pytest.raises(UserError, match=f"data.augmentation.{word}="):
            dataclasses.replace(PAPER, **changes)
