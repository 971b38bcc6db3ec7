"""How stable the matching is from one checkpoint to the next (Li et al. 2022, DN-DETR, arXiv 2203.01305, section 3.1).

A query keeps its index from one checkpoint to the next, so the matchings of two checkpoints can be compared.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.data.batching import split_by_cost
from common.data.loading import Loader
from common.types import Split
from detr.data.protocol import DetectionData
from detr.tasks.detection import Detection
from scripts.assigning.hungarian import UNMATCHED, match_batch


class Change(NamedTuple):
    """The differences between the matchings of two checkpoints, over a number of images."""

    images: int
    objects: int
    changed: int  # objects whose query differs
    instability: float  # the mean over the images of the number of queries whose object differs

    @property
    def share(self) -> float:
        """The share of objects whose query differs; NaN without objects."""
        return self.changed / self.objects if self.objects else float("nan")


def match_split(task: Detection, model: nn.Module, data: DetectionData, split: Split, count: int) -> Iterator[Tensor]:
    """Yield the query of each object (T,) of the first `count` images of a split, image by image."""
    batches = split_by_cost(range(count), data.cost(split), data.batch_size)
    loader = Loader(data, split, seed=None, workers=0, pin=False)
    for batch in loader((0, tuple(indices)) for indices in batches):
        yield from (matching.queries for matching in match_batch(task, model, batch))


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> Change:
    """Compare the queries of the objects of the same images, from two checkpoints.

    The instability is DN-DETR's: for each image, a vector holds the object of each query, or "none". The instability of
    an image is the number of queries whose entries differ, and that of a set of images is the mean. If one object
    moves to a query that had none, two entries differ.
    """
    objects = sum(map(len, before))
    changed = sum(int((a != b).sum()) for a, b in zip(before, after, strict=True))
    differences = [_different_queries(a, b) for a, b in zip(before, after, strict=True)]
    return Change(len(before), objects, changed, sum(differences) / len(before))


def _different_queries(before: Tensor, after: Tensor) -> int:
    """Return the number of queries whose object, or "none", differs."""
    length = 1 + max([UNMATCHED, *before.tolist(), *after.tolist()])
    vectors = []
    for queries in (before, after):
        objects = torch.full((length,), -1)
        matched = queries != UNMATCHED
        objects[queries[matched]] = torch.arange(len(queries))[matched]
        vectors.append(objects)
    return int((vectors[0] != vectors[1]).sum())
