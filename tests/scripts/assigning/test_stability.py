"""The matching of a detector's last layer, and the differences between two matchings."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from scripts.assigning.hungarian import UNMATCHED, match_batch
from scripts.assigning.stability import compare


class Answers(nn.Module):
    """Two layers of random answers of 4 queries, which do not depend on the images."""

    def __init__(self, images: int, classes: int):
        super().__init__()
        rng = generator("answers")
        self.scale = nn.Parameter(torch.ones(()))
        self.logits = torch.randn(2, images, 4, classes + 1, generator=rng)
        self.boxes = torch.rand(2, images, 4, 4, generator=rng) * 0.5 + 0.2

    def forward(self, images: Tensor, sizes: Tensor | None) -> list[dict[str, Tensor]]:
        pairs = zip(self.logits, self.boxes, strict=True)
        return [{"logits": logits * self.scale, "boxes_cxcywh": boxes} for logits, boxes in pairs]


def make_task() -> Any:
    config = configure("train", ["model=detr", "model.queries=4"])
    return build(config["task"], data=build(config["data"]))


def make_batch(counts: list[int], seed: int) -> dict[str, Any]:
    rng = generator("batch", seed)
    sizes = torch.tensor([[40, 64], [64, 48], [64, 64]])[: len(counts)]
    corner = torch.rand(sum(counts), 2, generator=rng) * 20
    return {
        "images": torch.zeros(len(counts), 3, 64, 64, dtype=torch.uint8),
        "sizes": sizes,
        "padded": True,
        "counts": counts,
        "boxes": torch.cat([corner, corner + 5 + torch.rand(sum(counts), 2, generator=rng) * 15], dim=1),
        "labels": torch.randint(4, (sum(counts),), generator=rng),
    }


def cost(model: Answers, batch: dict[str, Any], image: int, boxes: Tensor, labels: Tensor) -> Tensor:
    """The costs (4, T) of equation 2 with the weights 1, 5 and 2, for the last layer."""
    height, width = batch["sizes"][image].tolist()
    truth = boxes / torch.tensor([width, height, width, height])
    predicted = model.boxes[-1, image]
    distances = (predicted[:, None] - box_convert(truth, "xyxy", "cxcywh")[None]).abs().sum(2)
    overlaps = generalized_box_iou(box_convert(predicted, "cxcywh", "xyxy"), truth)
    return 5 * distances - model.logits[-1, image].softmax(1)[:, labels] - 2 * overlaps


@pytest.mark.parametrize("counts", [[3, 1, 0], [4, 2, 2]])
def test_each_object_has_the_query_of_the_cheapest_assignment(counts):
    """The cheapest of all assignments by enumeration, in images of unequal size."""
    batch, model = make_batch(counts, len(counts) + counts[0]), Answers(3, 4)
    matchings = match_batch(make_task(), model, batch)
    parts = zip(batch["boxes"].split(counts), batch["labels"].split(counts), strict=True)
    for image, (boxes, labels) in enumerate(parts):
        costs = cost(model, batch, image, boxes, labels)
        choices = itertools.permutations(range(4), len(boxes))
        best = min(choices, key=lambda queries: sum(float(costs[q, t]) for t, q in enumerate(queries)))
        assert matchings[image].queries.tolist() == list(best)
        height, width = batch["sizes"][image].tolist()
        predicted = box_convert(model.boxes[-1, image], "cxcywh", "xyxy") * torch.tensor([width, height] * 2)
        torch.testing.assert_close(matchings[image].boxes, predicted)
        assert torch.equal(matchings[image].labels, model.logits[-1, image, :, :4].argmax(1))


def test_of_more_objects_than_queries_the_surplus_is_unmatched():
    (matching,) = match_batch(make_task(), Answers(1, 4), make_batch([6], 0))
    queries = matching.queries.tolist()
    assert queries.count(UNMATCHED) == 2 and {*queries} == {UNMATCHED, 0, 1, 2, 3}


def test_a_model_without_queries_is_refused():
    class Other(nn.Linear):
        def forward(self, images: Tensor, sizes: Tensor | None) -> list[dict[str, Tensor]]:
            return [{"masks": images}]

    with pytest.raises(UserError, match="Other has no queries with logits and boxes"):
        match_batch(make_task(), Other(1, 1), make_batch([1], 0))


def test_changes_are_counted_by_objects_and_by_queries():
    """Worked out by hand.

    In the first image nothing changes. In the second, object 0 moves from query 3 to the free query 5: one object, two
    queries. In the third, two objects swap their queries: two objects, two queries. In the fourth, object 1 loses its
    query to object 2: two objects, one query. The fifth has no objects.
    """
    before = [[0, 1], [3, 4], [0, 2], [1, 7, -1], []]
    after = [[0, 1], [5, 4], [2, 0], [1, -1, 7], []]
    tensors = [[torch.tensor(queries, dtype=torch.int64) for queries in part] for part in (before, after)]
    change = compare(*tensors)
    assert change == (5, 9, 5, (2 + 2 + 1) / 5)
    assert change.share == 5 / 9
    assert compare(tensors[0], tensors[0])[2:] == (0, 0.0)


def test_random_changes_are_those_of_vectors_over_the_queries():
    rng = generator("changes")
    pairs = [[torch.randperm(9, generator=rng)[:5] for _ in range(20)] for _ in range(2)]
    differences = 0
    for a, b in zip(*pairs, strict=True):
        vectors = [[queries.tolist().index(q) if q in queries else -1 for q in range(9)] for queries in (a, b)]
        differences += sum(x != y for x, y in zip(*vectors, strict=True))
    assert compare(*pairs).instability == differences / 20


def test_the_share_without_objects_is_not_a_number():
    none = [torch.zeros(0, dtype=torch.int64)]
    assert compare(none, none).share != compare(none, none).share
