"""Anchors assigned by IoU and FreeAnchor's bags, compared with plain loops; torchvision's anchors."""

import torch
from torch import Tensor
from torchvision.models.detection import faster_rcnn, retinanet
from torchvision.models.detection.image_list import ImageList

from common.machine.seeds import generator
from scripts.assigning import anchors

Box = list[float]


def random_boxes(count: int, seed: int, side: float = 64) -> Tensor:
    rng = generator("boxes", count, seed)
    corner = torch.rand(count, 2, generator=rng) * side * 0.7
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=rng) * side * 0.3], dim=1)


def iou(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def assigned_by_loops(places: list[Box], objects: list[Box], high: float, low: float) -> list[int]:
    owners = []
    best_of_object = [max(iou(place, box) for place in places) for box in objects]
    for place in places:
        overlaps = [iou(place, box) for box in objects]
        best = max(range(len(objects)), key=overlaps.__getitem__)
        is_weak_match = any(abs(o - top) < 1e-9 for o, top in zip(overlaps, best_of_object, strict=True))
        if overlaps[best] >= high or is_weak_match:
            owners.append(best)
        else:
            owners.append(anchors.IGNORED if overlaps[best] >= low else anchors.BACKGROUND)
    return owners


def test_anchors_are_assigned_as_by_plain_loops():
    places = torch.cat(anchors.make_anchors((48, 64), anchors.RETINA_STRIDES, anchors.RETINA_SIZES, 4)).double()
    kinds = set()
    for seed in range(3):
        boxes = random_boxes(6, seed).double()
        for thresholds in (anchors.PROPOSAL_THRESHOLDS, anchors.RETINA_THRESHOLDS):
            owners = anchors.assign_by_iou(places, boxes, *thresholds).tolist()
            assert owners == assigned_by_loops(places.tolist(), boxes.tolist(), *thresholds)
            kinds |= {*owners}
    assert kinds == {anchors.IGNORED, anchors.BACKGROUND, *range(6)}


def test_an_object_below_both_thresholds_gets_all_its_best_anchors():
    """Two anchors tie for the small object with an IoU of 1/16; the large object has one anchor that equals it."""
    places = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [20, 20, 40, 40]])
    boxes = torch.tensor([[3.0, 3, 5, 5], [20, 20, 40, 40]])
    assert anchors.assign_by_iou(places, boxes, 0.7, 0.3).tolist() == [0, 0, 1]


def test_without_objects_all_anchors_are_background():
    assert anchors.assign_by_iou(random_boxes(5, 0), torch.zeros(0, 4), 0.7, 0.3).tolist() == [-1] * 5
    assert anchors.candidate_bags(random_boxes(5, 0), torch.zeros(0, 4), 3).shape == (0, 3)


def test_a_threshold_belongs_to_the_upper_class():
    """IoU 0.5 and 0.25, which fp32 represents exactly; the third anchor is the best one."""
    places = torch.tensor([[0.0, 0, 8, 4], [0, 0, 4, 4], [0, 0, 8, 8]])
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    assert anchors.assign_by_iou(places, boxes, 0.5, 0.25).tolist() == [0, anchors.IGNORED, 0]


def test_anchors_are_those_of_torchvisions_detectors():
    size, strides = (96, 130), anchors.RETINA_STRIDES
    cases = [
        (retinanet._default_anchorgen(), strides, anchors.RETINA_SIZES),
        (faster_rcnn._default_anchorgen(), anchors.PROPOSAL_STRIDES, anchors.PROPOSAL_SIZES),
    ]
    for theirs, steps, sizes in cases:
        ours = anchors.make_anchors(size, steps, sizes, 1)
        # Their strides are the sides of the image divided by those of the maps, so the image is one of whole strides.
        for level, stride in enumerate(steps):
            height, width = (-(-side // stride) for side in size)
            images = ImageList(torch.zeros(1, 3, height * stride, width * stride), [size])
            maps = [torch.zeros(1, 1, height, width)] * len(steps)
            count = len(ours[level])
            assert torch.equal(theirs(images, maps)[0][level * count : (level + 1) * count], ours[level])


def test_bags_hold_the_anchors_of_the_highest_iou():
    places, boxes = random_boxes(60, 1).double(), random_boxes(4, 2).double()
    bags = anchors.candidate_bags(places, boxes, 10)
    for box, bag in zip(boxes.tolist(), bags.tolist(), strict=True):
        ranked = sorted(range(60), key=lambda i: -iou(places[i].tolist(), box))
        assert {*bag} == {*ranked[:10]} and bag[0] == ranked[0]
    assert anchors.candidate_bags(places[:3], boxes, 10).shape == (4, 3)
