"""The Hungarian matching of a query detector's last layer (Carion et al. 2020, arXiv 2005.12872, section 3.1)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common.data.images import normalise
from common.errors import UserError
from common.machine.device import compute_dtype
from common.task import Batch
from detr.criterion.answers import Matches, detections, group_by_set, stack_last_layer, unstack_layers
from detr.criterion.matcher import match
from detr.tasks.detection import Detection

UNMATCHED = -1


class Matching(NamedTuple):
    """The predictions of the Q queries for one image, and the query of each of its T objects."""

    boxes: Tensor  # (Q, 4) xyxy in pixels of the resized image
    scores: Tensor  # (Q,)
    labels: Tensor  # (Q,)
    queries: Tensor  # (T,) the query of each object, or UNMATCHED if there are more objects than queries


@torch.no_grad()
def match_batch(task: Detection, model: nn.Module, batch: Batch) -> list[Matching]:
    """Match the queries of the last layer with the objects of each image, by the costs of the task's criterion.

    Raises UserError if the model is not a query detector.
    """
    device = next(model.parameters()).device
    sizes = batch["sizes"].to(device)
    images = normalise(batch["images"].to(device), sizes, compute_dtype(device))
    layers = group_by_set(unstack_layers(model(images, sizes if batch["padded"] else None))).get("queries", [])
    if not layers or not {"logits", "boxes_cxcywh"} <= layers[-1].keys():
        raise UserError(f"{type(model).__name__} has no queries with logits and boxes; give a query detector.")
    last = stack_last_layer(layers)
    on_device = batch | {name: batch[name].to(device) for name in ("sizes", "boxes", "labels")}
    targets = task.targets(on_device)
    targets = targets._replace(boxes=targets.boxes.to(last["boxes_cxcywh"].dtype))
    queries = _queries_of_objects(match(task.criterion.costs, last, targets), batch["counts"])
    scores, labels, boxes = detections(task.classification, layers[-1])
    boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]  # (B, Q, 4)
    parts = zip(boxes.cpu(), scores.cpu(), labels.cpu(), queries, strict=True)
    return [Matching(*part) for part in parts]


def _queries_of_objects(matches: Matches, counts: list[int]) -> list[Tensor]:
    """Return the query of each object of each image."""
    queries = torch.full((sum(counts),), UNMATCHED)
    queries[matches.targets.cpu()] = matches.queries.cpu()
    return list(queries.split(counts))
