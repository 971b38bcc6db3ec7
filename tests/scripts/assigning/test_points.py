"""Points in boxes, compared with plain loops and with torchvision's FCOS; AutoAssign's centre prior."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS

from common.machine.seeds import generator
from scripts.assigning import points
from scripts.assigning.anchors import BACKGROUND
from scripts.assigning.pyramid import make_points

STRIDES = [2, 4, 8, 16]
SIZE = (60, 90)
LEVELS = make_points(SIZE, STRIDES)


def random_boxes(seed: int, count: int = 7) -> Tensor:
    """Boxes whose areas differ by more than 16 square pixels: torchvision's areas are exact to 8."""
    rng = generator("points", seed)
    while True:
        corner = torch.rand(count, 2, generator=rng) * torch.tensor([60.0, 40.0])
        boxes = torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=rng) ** 2 * 50], dim=1)
        areas = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sort().values
        if areas.diff().min() > 16:
            return boxes


def owner_by_loops(x: float, y: float, level: int, boxes: list[list[float]]) -> int:
    stride, allowed = STRIDES[level], []
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        sides = (x - x0, y - y0, x1 - x, y1 - y)
        central = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2)) < 1.5 * stride
        above = level == 0 or max(sides) > 4 * stride
        below = level == len(STRIDES) - 1 or max(sides) < 8 * stride
        if min(sides) > 0 and central and above and below:
            allowed.append(((x1 - x0) * (y1 - y0), index))
    return min(allowed)[1] if allowed else BACKGROUND


@pytest.mark.parametrize("seed", range(4))
def test_points_are_assigned_as_by_plain_loops_and_by_torchvision(seed):
    boxes = random_boxes(seed)
    owners = points.assign_points(LEVELS, STRIDES, boxes).tolist()
    places = [(x, y, level) for level, part in enumerate(LEVELS) for x, y in part.tolist()]
    assert owners == [owner_by_loops(*place, boxes.tolist()) for place in places]
    squares = [torch.cat([p - s / 2, p + s / 2], dim=1) for p, s in zip(LEVELS, STRIDES, strict=True)]
    head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matched: matched)
    detector = SimpleNamespace(center_sampling_radius=points.RADIUS, head=head)
    counts = [len(part) for part in LEVELS]
    theirs = FCOS.compute_loss(detector, [{"boxes": boxes}], {}, [torch.cat(squares)], counts)
    assert owners == theirs[0].tolist()
    assert len({*owners}) > 4


def test_without_objects_all_points_are_background():
    assert {*points.assign_points(LEVELS, STRIDES, torch.zeros(0, 4)).tolist()} == {BACKGROUND}
    assert points.centre_prior(LEVELS, STRIDES, torch.zeros(0, 4)).shape == (sum(map(len, LEVELS)), 0)


def test_an_object_between_points_has_no_positive():
    boxes = torch.tensor([[9.2, 9.2, 10.8, 10.8], [20.0, 20, 40, 40]])
    assert {*points.assign_points(LEVELS, STRIDES, boxes).tolist()} == {BACKGROUND, 1}


def test_of_equal_areas_the_first_object_gets_the_point_and_a_smaller_one_before_both():
    boxes = torch.tensor([[10.0, 10, 30, 30], [11, 10, 31, 30], [17, 17, 24, 24]])
    places = [torch.tensor([[21.0, 18.0], [19.0, 25.0]])]
    assert points.assign_points(places, [16], boxes).tolist() == [2, 0]
    assert points.assign_points(places, [16], boxes[[1, 0]]).tolist() == [0, 0]


def test_an_object_is_assigned_to_the_level_of_its_farthest_side():
    """A square of 24 pixels: from its centre 12, from points beside it up to 24 pixels."""
    boxes = torch.tensor([[20.0, 20, 44, 44]])
    centre = torch.tensor([[32.0, 32.0]])
    owners = [points.assign_points([centre] * 4, STRIDES, boxes).tolist()]
    assert owners == [[0, BACKGROUND, BACKGROUND, BACKGROUND]]  # 12 < 8 * 2, and not above 4 * 4
    beside = torch.tensor([[27.0, 32.0]])  # 17 pixels to the right side
    assert points.assign_points([beside] * 4, STRIDES, boxes).tolist() == [-1, 0, -1, -1]


def test_centerness_is_one_at_the_centre_and_the_papers_formula_elsewhere():
    boxes = torch.tensor([[0.0, 0, 8, 4], [0, 0, 8, 4]])
    values = points.centerness(torch.tensor([[4.0, 2.0], [2.0, 1.0]]), boxes).tolist()
    assert values == pytest.approx([1.0, math.sqrt(2 / 6 * 1 / 3)])


def test_the_centre_prior_is_a_gaussian_in_strides_inside_the_box_and_zero_outside():
    boxes = random_boxes(9, 3)
    prior = points.centre_prior(LEVELS, STRIDES, boxes)
    places = [(x, y, s) for part, s in zip(LEVELS, STRIDES, strict=True) for x, y in part.tolist()]
    for (row, (x, y, stride)), (column, (x0, y0, x1, y1)) in itertools.product(
        enumerate(places), enumerate(boxes.tolist())
    ):
        dx, dy = (x - (x0 + x1) / 2) / stride, (y - (y0 + y1) / 2) / stride
        inside = x0 < x < x1 and y0 < y < y1
        expected = math.exp(-(dx**2) / 2) * math.exp(-(dy**2) / 2) if inside else 0
        assert float(prior[row, column]) == pytest.approx(expected, rel=1e-4, abs=1e-12)  # fp32
    assert (prior > 0).sum(0).min() > 0
