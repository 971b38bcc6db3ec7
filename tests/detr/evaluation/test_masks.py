"""Masks of single detections from mask logits."""

import torch
import torch.nn.functional as F

from common.machine.seeds import generator
from detr.evaluation.masks import instance_masks


def test_masks_of_repeated_queries_are_those_of_single_ones() -> None:
    logits = torch.randn(20, 5, 6, generator=generator("instance"))
    queries = torch.tensor([3, 19, 3, 0])
    masks = instance_masks(logits, queries, (20, 24), (17, 21), (40, 50))
    for mask, query in zip(masks, queries, strict=True):
        resized = F.interpolate(logits[None, query : query + 1, :5, :6], size=(17, 21), mode="bilinear") > 0
        assert torch.equal(mask, F.interpolate(resized.float(), size=(40, 50))[0, 0].bool())
    assert instance_masks(logits, queries[:0], (20, 24), (17, 21), (40, 50)).shape == (0, 40, 50)
