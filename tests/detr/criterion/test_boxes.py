"""Box functions against torchvision's, and inputs for which those give NaN."""

import torch
import torchvision

from detr.criterion.boxes import giou, pairwise_giou, to_cxcywh, to_xyxy


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Valid xyxy boxes (*shape, 4) in float64, some of which overlap."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=rng, dtype=torch.float64)
    return torch.cat([corner, corner + torch.rand(*shape, 2, generator=rng, dtype=torch.float64)], dim=-1)


def test_conversions_agree_with_torchvision_and_invert_each_other():
    boxes = random_boxes(5, 7)
    expected = torchvision.ops.box_convert(boxes.flatten(0, 1), "xyxy", "cxcywh").view(5, 7, 4)
    torch.testing.assert_close(to_cxcywh(boxes), expected)
    torch.testing.assert_close(to_xyxy(to_cxcywh(boxes)), boxes)


def test_all_pairs_agree_with_torchvision():
    a, b = random_boxes(3, 8), random_boxes(3, 5, seed=1)
    expected = torch.stack([torchvision.ops.generalized_box_iou(x, y) for x, y in zip(a, b, strict=True)])
    assert pairwise_giou(a, b).shape == (3, 8, 5)
    torch.testing.assert_close(pairwise_giou(a, b), expected)


def test_aligned_boxes_give_the_diagonal_of_all_pairs_and_its_gradient():
    a, b = random_boxes(9).requires_grad_(), random_boxes(9, seed=1)
    (gradient,) = torch.autograd.grad(giou(a, b).sum(), a)
    (expected,) = torch.autograd.grad(torchvision.ops.generalized_box_iou(a, b).diagonal().sum(), a)
    torch.testing.assert_close(giou(a, b), torchvision.ops.generalized_box_iou(a, b).diagonal())
    torch.testing.assert_close(gradient, expected)


def test_values_computed_by_hand():
    """A unit square with itself: 1; shifted by 1/2: 1/3; with a gap of 1: -1/3, since the hull is 3."""
    square = torch.tensor([0.0, 0.0, 1.0, 1.0])
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.5, 0, 1.5, 1], [2.0, 0, 3, 1]])
    torch.testing.assert_close(giou(square, boxes), torch.tensor([1.0, 1 / 3, -1 / 3]))


def test_boxes_without_area_give_finite_values_and_gradients():
    point, line, box = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5], [0.1, 0.1, 0.9, 0.9]
    a = torch.tensor([point, line, point, line, point]).requires_grad_()
    b = torch.tensor([point, line, line, box, box])
    values = giou(a, b)
    values.sum().backward()
    # Every overlap is empty. The ratio of the hull is 0 because the hull is empty or is one of the boxes.
    torch.testing.assert_close(values, torch.zeros(5))
    assert a.grad is not None and a.grad.isfinite().all()


def test_no_boxes_give_no_values():
    assert pairwise_giou(torch.zeros(4, 4), torch.zeros(0, 4)).shape == (4, 0)
    assert giou(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
