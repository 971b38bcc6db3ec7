"""YOLO's cells and shapes, compared with plain loops."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from common.machine.seeds import generator
from scripts.assigning import grid_cells

GRIDS = (8, 4, 2)


def random_boxes(count: int, seed: int) -> Tensor:
    rng = generator("cells", count, seed)
    size = 0.05 + torch.rand(count, 2, generator=rng, dtype=torch.float64) * 0.6
    centre = size / 2 + torch.rand(count, 2, generator=rng, dtype=torch.float64) * (1 - size)
    return torch.cat([centre, size], dim=1)


def random_shapes(seed: int) -> list[Tensor]:
    shapes = 0.05 + torch.rand(9, 2, generator=generator("shapes", seed), dtype=torch.float64) * 0.6
    return list(shapes[shapes.prod(1).argsort()].split(3))


def iou(a: list[float], b: list[float]) -> float:
    """IoU of two boxes cxcywh."""
    overlap = [
        max(0.0, min(a[i] + a[i + 2] / 2, b[i] + b[i + 2] / 2) - max(a[i] - a[i + 2] / 2, b[i] - b[i + 2] / 2))
        for i in (0, 1)
    ]
    return math.prod(overlap) / (a[2] * a[3] + b[2] * b[3] - math.prod(overlap))


def slot_by_loops(box: list[float], shapes: list[Tensor]) -> tuple[int, int, int, int]:
    rated = [
        (iou([0, 0, *shape], [0, 0, *box[2:]]), grid, number)
        for number, (grid, shape) in enumerate((g, s) for g, part in enumerate(shapes) for s in part.tolist())
    ]
    _, grid, number = max(rated)
    return grid, int(box[0] * GRIDS[grid]), int(box[1] * GRIDS[grid]), number


def test_slots_are_those_of_plain_loops_and_the_last_object_holds_them():
    shapes, collisions = random_shapes(0), 0
    for seed in range(3):
        boxes = random_boxes(40, seed)
        slots = grid_cells.assign_slots(boxes, GRIDS, shapes, first_holds=False)
        ours = torch.cat([slots.grids[:, None], slots.cells, slots.shapes[:, None]], dim=1).tolist()
        ours = [tuple(slot) for slot in ours]
        expected = [slot_by_loops(box, shapes) for box in boxes.tolist()]
        assert ours == expected
        holders = dict(zip(expected, range(40), strict=True))  # of equal keys, the last value stays
        assert slots.holds.tolist() == [holders[slot] == index for index, slot in enumerate(expected)]
        collisions += 40 - len(holders)
    assert collisions > 3


def test_the_first_object_of_a_cell_holds_it_in_yolov1():
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.4, 0.4, 0.1, 0.3], [0.6, 0.3, 0.1, 0.1]])
    slots = grid_cells.assign_slots(boxes, [2], [torch.ones(1, 2)], first_holds=True)
    assert slots.cells.tolist() == [[0, 0], [0, 0], [1, 0]] and slots.holds.tolist() == [True, False, True]
    other_shapes = [torch.tensor([[0.2, 0.2], [0.1, 0.3]])]
    assert grid_cells.assign_slots(boxes, [2], other_shapes, first_holds=True).holds.all()


def test_centres_on_the_borders_of_the_image_have_a_cell():
    boxes = torch.tensor([[1.0, 1.0, 0.2, 0.2], [0.0, 0.0, 0.2, 0.2]])
    assert grid_cells.assign_slots(boxes, [7], [torch.ones(1, 2)], True).cells.tolist() == [[6, 6], [0, 0]]


def test_without_objects_there_are_no_slots_and_nothing_is_ignored():
    shapes, none = random_shapes(0), torch.zeros(0, 4, dtype=torch.float64)
    slots = grid_cells.assign_slots(none, GRIDS, shapes, False)
    assert len(slots.holds) == 0
    assert not grid_cells.ignored_priors(none, GRIDS, shapes, slots).any()


def test_priors_above_the_threshold_are_ignored_unless_they_are_responsible():
    boxes, shapes = random_boxes(5, 3), random_shapes(1)
    slots = grid_cells.assign_slots(boxes, GRIDS, shapes, False)
    responsible = {slot_by_loops(box, shapes) for box in boxes.tolist()}
    expected, first = [], 0
    for grid, side in enumerate(GRIDS):
        for row in range(side):
            for column in range(side):
                for number, shape in enumerate(shapes[grid].tolist(), first):
                    prior = [(column + 0.5) / side, (row + 0.5) / side, *shape]
                    best = max(iou(prior, box) for box in boxes.tolist())
                    expected.append(best > 0.5 and (grid, column, row, number) not in responsible)
        first += len(shapes[grid])
    ignored = grid_cells.ignored_priors(boxes, GRIDS, shapes, slots).tolist()
    assert ignored == expected and any(ignored)


def test_shapes_are_a_fixed_point_of_k_means_with_one_minus_iou():
    """Each cluster is the mean of the sizes that are nearest to it, computed by loops."""
    sizes = random_boxes(300, 7)[:, 2:]
    shapes = grid_cells.cluster_shapes(sizes, 5).tolist()
    members: list[list[list[float]]] = [[] for _ in shapes]
    for size in sizes.tolist():
        members[int(np.argmin([1 - iou([0, 0, *size], [0, 0, *shape]) for shape in shapes]))].append(size)
    np.testing.assert_allclose(shapes, [np.mean(part, axis=0) for part in members], rtol=1e-9)  # float64
    areas = [width * height for width, height in shapes]
    assert areas == sorted(areas)


def test_separate_groups_of_sizes_become_the_shapes():
    groups = torch.tensor([[0.1, 0.1], [0.2, 0.6], [0.8, 0.8]]).double()
    sizes = (groups[:, None] * torch.tensor([0.98, 1.0, 1.02]).double()[None, :, None]).flatten(0, 1)
    torch.testing.assert_close(
        grid_cells.cluster_shapes(sizes[torch.randperm(9, generator=generator("order"))], 3), groups
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_sizes_than_shapes_give_finite_shapes(count):
    shapes = grid_cells.cluster_shapes(random_boxes(count, 0)[:, 2:], 9)
    assert shapes.shape == (9, 2) and shapes.isfinite().all() and (shapes > 0).all()
