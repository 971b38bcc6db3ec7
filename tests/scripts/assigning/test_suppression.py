"""Suppression step by step keeps what torchvision's keeps, and names the box that dropped each other one."""

import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from common.machine.seeds import generator
from scripts.assigning.suppression import KEPT, suppress


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_the_kept_boxes_are_torchvisions_and_each_dropped_one_has_a_reason(threshold):
    rng = generator("suppression")
    corner = torch.rand(80, 2, generator=rng) * 20
    boxes = torch.cat([corner, corner + 5 + torch.rand(80, 2, generator=rng) * 15], dim=1)
    scores, labels = torch.rand(80, generator=rng), torch.randint(3, (80,), generator=rng)
    result = suppress(boxes, scores, labels, threshold)
    assert result.kept == batched_nms(boxes, scores, labels, threshold).tolist()
    overlaps = box_iou(boxes, boxes)
    for index, by in enumerate(result.suppressors.tolist()):
        if by == KEPT:
            assert result.overlaps[index] == 0
            continue
        first = next(k for k in result.kept if labels[k] == labels[index] and overlaps[k, index] > threshold)
        assert by == first and scores[by] > scores[index]
        assert result.overlaps[index] == overlaps[by, index]
    assert 0 < len(result.kept) < 80
    assert sorted(i for k in result.kept for i in [k, *result.dropped_by(k)]) == [*range(80)]


def test_an_iou_equal_to_the_threshold_drops_nothing_and_a_chain_does_not_spread():
    """Boxes of width 4, each moved by 1: neighbours have IoU 3/5, second neighbours 1/3."""
    boxes = torch.tensor([[float(x), 0, x + 4, 1] for x in range(3)])
    scores, labels = torch.tensor([0.7, 0.9, 0.8]), torch.zeros(3, dtype=torch.int64)
    assert suppress(boxes, scores, labels, 0.5).suppressors.tolist() == [1, KEPT, 1]
    ordered = torch.tensor([0.9, 0.8, 0.7])
    assert suppress(boxes, ordered, labels, 0.5).suppressors.tolist() == [KEPT, 0, KEPT]
    halves = torch.tensor([[0.0, 0, 4, 1], [0, 0, 2, 1]])  # IoU exactly 1/2
    assert suppress(halves, ordered[:2], labels[:2], 0.5).suppressors.tolist() == [KEPT, KEPT]


def test_of_equal_scores_the_first_box_is_kept_and_no_boxes_give_no_steps():
    boxes = torch.tensor([[0.0, 0, 4, 4]] * 3)
    result = suppress(boxes, torch.ones(3), torch.tensor([0, 0, 1]), 0.5)
    assert result.suppressors.tolist() == [KEPT, 0, KEPT]
    assert suppress(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0.5).kept == []
