"""What a detection loss compares: the outputs of a detector's layers, the objects of a batch, and the matched pairs.

In shapes, L is the number of layers, B of images, R of output rows of an image (Q if the rows are queries), K of
classes, and T of objects in the batch. An output row is one prediction of a layer: logits and a box. If the images of a
batch have different numbers of rows, padding rows make these numbers equal.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr.criterion.boxes import to_xyxy

Classification = Literal["softmax", "sigmoid"]  # softmax over classes and "no object", or a sigmoid for each class
# Answer sets whose rows predict only whether there is an object: in their loss, all objects have the label 0.
CLASS_AGNOSTIC = ("proposals",)
Outputs = dict[str, Any]  # one layer's outputs, or those of L layers stacked; see detr/models/query_detector.py


class Targets(NamedTuple):
    """The T objects of a batch, image after image; what the task does not have is None."""

    counts: list[int]  # number of objects in each image
    labels: Tensor  # (T,) class indices
    boxes: Tensor  # (T, 4) cxcywh, relative to the width and height of the object's image; (T, 0) for lanes
    masks: Tensor | None = None  # (T, H, W), padded to the size of the batch
    curves: Tensor | None = None  # (T, P, 3) x and y of P points, relative to the image, and their weights in the loss
    ends: Tensor | None = None  # (T, 2) y of the upper and of the lower end of a curve, relative to the image
    logits: Tensor | None = None  # (T, K') of a teacher, whose predictions are the objects (distillation.py)
    sizes: Tensor | None = None  # (B, 2) height and width of each image without padding, in pixels; for masks

    def padded(self) -> "Targets":
        """Convert the tensors (T, ...) to zero-padded (B, N, ...); N is the largest number of objects in an image."""
        image = np.repeat(np.arange(len(self.counts)), self.counts)
        position = np.concatenate([np.arange(count) for count in self.counts])
        indices = torch.from_numpy(np.stack((image, position))).to(self.labels.device, non_blocking=True)
        shape = (len(self.counts), max(self.counts))
        tensors = [
            None if values is None else values.new_zeros(*shape, *values.shape[1:]).index_put(tuple(indices), values)
            for values in self[1:-1]
        ]
        return Targets(self.counts, *tensors, sizes=self.sizes)  # type: ignore[arg-type, misc]

    def to(self, dtype: torch.dtype) -> "Targets":
        """Convert boxes, curves and ends to `dtype`, that of the outputs with which they are compared."""
        curves = None if self.curves is None else self.curves.to(dtype)
        ends = None if self.ends is None else self.ends.to(dtype)
        return self._replace(boxes=self.boxes.to(dtype), curves=curves, ends=ends)


class Matches(NamedTuple):
    """The M matched pairs of an output row and an object, as int64 tensors (M,) on the outputs' device.

    Pairs are ordered by layer. Every layer has the same number of pairs.
    """

    layers: Tensor
    images: Tensor
    queries: Tensor  # index of the row among an image's output rows
    targets: Tensor  # index of the object among the batch's T objects

    def repeat(self, layers: int) -> "Matches":
        """Repeat the pairs for each of `layers` layers; the pairs must be those of a single layer."""
        number = torch.arange(layers, device=self.layers.device).repeat_interleave(len(self.layers))
        return Matches(number, *(part.repeat(layers) for part in self[1:]))

    def of_last_layer(self, layers: int) -> "Matches":
        """Select the pairs of the last of `layers` layers; in the result, this layer has index 0."""
        last = slice(len(self.layers) // layers * (layers - 1), None)
        return Matches(self.layers[last] - (layers - 1), *(part[last] for part in self[1:]))


def unstack_layers(outputs: Outputs | list[Outputs]) -> list[Outputs]:
    """Split a detector's outputs by layer: one dict of tensors (L, B, Q, ...) becomes L dicts of (B, Q, ...).

    A list is returned unchanged. Entries of the dict are dropped if their first three dimensions differ from those of
    `logits`.
    """
    if isinstance(outputs, list):
        return outputs
    shape = outputs["logits"].shape[:3]
    outputs = {name: value for name, value in outputs.items() if getattr(value, "shape", ())[:3] == shape}
    return [dict(zip(outputs, layer, strict=True)) for layer in zip(*outputs.values(), strict=True)]


def group_by_set(layers: Sequence[Outputs]) -> dict[str, list[Outputs]]:
    """Group the outputs of layers by the name of their answer set.

    An answer set is a group of output rows that has its own matching and loss, such as "queries" or "hints". Its name
    is the entry "set" of a layer's outputs, or "queries" if there is no such entry.
    """
    sets: dict[str, list[Outputs]] = {}
    for layer in layers:
        outputs = {name: value for name, value in layer.items() if name != "set"}
        sets.setdefault(str(layer.get("set", "queries")), []).append(outputs)
    return sets


def stack_layers(layers: Outputs | Sequence[Outputs]) -> Outputs:
    """Stack the outputs that all L layers have into tensors (L, B, R, ...), converting fp16 and bf16 to fp32.

    The mask `real` (B, R), False for padding rows, is the same for all layers, so it is not stacked. If `layers` is a
    dict, its outputs are stacked already, and only fp16 and bf16 are converted.
    """
    if isinstance(layers, dict):
        return {name: upcast_half(value) for name, value in layers.items()}
    names = [name for name in layers[-1] if all(name in layer for layer in layers)]
    stacked = {name: upcast_half(torch.stack([layer[name] for layer in layers])) for name in names if name != "real"}
    return stacked | {name: layers[-1][name] for name in names if name == "real"}


def stack_last_layer(layers: Outputs | Sequence[Outputs]) -> Outputs:
    """Return the result of `stack_layers` for the last layer alone, with L = 1."""
    if isinstance(layers, dict):
        return stack_layers({name: value if name == "real" else value[-1:] for name, value in layers.items()})
    return stack_layers(layers[-1:])


def logit_count(classification: Classification, classes: int) -> int:
    """Return the number of logits of a query: `classes` with sigmoid, one more for "no object" with softmax."""
    return classes + 1 if classification == "softmax" else classes


def probabilities(classification: Classification, logits: Tensor) -> Tensor:
    """Convert logits to the probabilities (..., K) of the K classes.

    With softmax, the logits are (..., K + 1), and the last one is that of "no object". With sigmoid, they are (..., K).
    """
    return logits.softmax(-1)[..., :-1] if classification == "softmax" else logits.sigmoid()


def detections(
    classification: Classification, outputs: Outputs, limit: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Convert one layer's outputs (B, Q, ...) to detections: scores (B, D), labels (B, D) and boxes (B, D, 4).

    If `limit` is None, every query gives one detection, so D = Q. Its label is the most probable class other than "no
    object", as in official DETR, and its score is the probability of this class. Otherwise, the detections are the D =
    min(`limit`, Q K) pairs of a query and a class with the highest probabilities, the highest first, as in official
    Deformable DETR: a query may give several. Boxes are xyxy, relative to each image's width and height.
    """
    shares, boxes = probabilities(classification, outputs["logits"].float()), to_xyxy(outputs["boxes_cxcywh"].float())
    if limit is None:
        scores, labels = shares.max(-1)
        return scores, labels, boxes
    scores, queries, labels = _best_pairs(shares, limit)
    return scores, labels, boxes.gather(1, queries[..., None].expand(-1, -1, 4))


def query_indices(classification: Classification, outputs: Outputs, limit: int | None = None) -> Tensor:
    """Return the index (B, D) of the query of each detection that `detections` returns for the same arguments."""
    shares = probabilities(classification, outputs["logits"].float())
    if limit is None:
        return torch.arange(shares.shape[1]).expand(shares.shape[0], -1)
    return _best_pairs(shares, limit)[1]


def _best_pairs(shares: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probability, query and class (B, D) of the D pairs with the highest probabilities (B, Q, K)."""
    queries, classes = shares.shape[1:]
    scores, pairs = shares.flatten(1).topk(min(limit, queries * classes), dim=1)  # (B, D)
    return scores, pairs // classes, pairs % classes


def upcast_half(x: Tensor) -> Tensor:
    """Convert fp16 and bf16 to fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
