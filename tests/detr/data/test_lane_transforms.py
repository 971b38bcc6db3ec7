"""Points stay on what they mark: bright squares of three pixels, found again after each transform."""

import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from detr.data.lane_transforms import LaneAugmentation, augment

CENTRES = [(40, 30), (90, 50), (60, 70)]  # x, y of pixels
NOTHING = LaneAugmentation(share=1.0, rotation=0.0, flip=0.0, crop=1.0, colour=0.0)


def marked() -> tuple[Tensor, Tensor, Tensor]:
    """An image 100 pixels high and 120 wide with three squares, and one lane through their centres."""
    image = torch.zeros(3, 100, 120, dtype=torch.uint8)
    for x, y in CENTRES:
        image[:, y - 1 : y + 2, x - 1 : x + 2] = 255
    points = torch.tensor([CENTRES], dtype=torch.float32) + 0.5
    return image, points, torch.ones(1, 3, dtype=torch.bool)


def brightness(image: Tensor, points: Tensor) -> list[int]:
    return [int(image[0, int(y), int(x)]) for x, y in points[0].tolist()]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "changes", [{"flip": 1.0}, {"rotation": 10.0}, {"crop": 0.8}, {"flip": 0.5, "rotation": 8.0, "crop": 0.85}]
)
def test_points_follow_the_pixels(changes, seed):
    image, points, valid = marked()
    options = LaneAugmentation(**{**vars(NOTHING), **changes})
    size = (200, 240)
    moved, where, inside = augment(image, points, valid, size, options, generator("lane", seed))
    assert moved.shape == (3, *size) and moved.dtype == torch.uint8 and inside.all()
    assert min(brightness(moved, where)) > 200
    assert (moved[0] > 200).float().mean() < 0.02, "most of the image is dark"
    assert not torch.allclose(where, points * 2), "the transform does something"


def test_without_a_generator_an_image_is_only_resized():
    image, points, valid = marked()
    options = LaneAugmentation(share=1.0, rotation=30.0, flip=1.0, crop=0.5, colour=0.5)
    resized, where, inside = augment(image, points, valid, (50, 180), options, None)
    assert resized.shape == (3, 50, 180) and inside.all()
    assert torch.allclose(where, points * torch.tensor([1.5, 0.5]))


def test_images_beyond_the_share_are_only_resized():
    image, points, valid = marked()
    options = LaneAugmentation(share=0.3, rotation=0.0, flip=1.0, crop=1.0, colour=0.0)
    flipped = 0
    for seed in range(200):
        same, where, _ = augment(image, points, valid, (100, 120), options, generator("share", seed))
        flipped += not torch.equal(where, points)
        assert torch.equal(where, points) == torch.equal(same, image)
    assert 40 < flipped < 80


def test_points_outside_are_invalid_and_lanes_with_one_point_are_dropped():
    image, _, _ = marked()
    points = torch.tensor([[[10.0, 10.0], [130.0, 20.0], [20.0, 30.0]], [[5.0, 5.0], [-1.0, 9.0], [1.0, 101.0]]])
    _, where, valid = augment(image, points, torch.ones(2, 3, dtype=torch.bool), (100, 120), NOTHING, None)
    assert where.shape == (1, 3, 2) and valid.tolist() == [[True, False, True]]


def test_an_image_without_lanes_is_augmented():
    image, _, _ = marked()
    options = LaneAugmentation(share=1.0, rotation=5.0, flip=0.5, crop=0.9, colour=0.3)
    empty = torch.zeros(0, 4, 2), torch.zeros(0, 4, dtype=torch.bool)
    moved, points, valid = augment(image, *empty, (100, 120), options, generator("empty"))
    assert moved.shape == image.shape and points.shape == (0, 4, 2) and valid.shape == (0, 4)


def test_the_same_seed_gives_the_same_image():
    options = LaneAugmentation(share=0.9, rotation=5.0, flip=0.5, crop=0.9, colour=0.3)
    first, second = (augment(*marked(), (64, 64), options, generator("same", 1)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
