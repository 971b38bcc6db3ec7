"""What a loss compares: the answers of a detector's layers, the objects of a batch, and which belongs to which."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from detr.criterion.boxes import to_xyxy

Classification = Literal["softmax", "sigmoid"]  # one class or "no object", or each class by itself
Outputs = dict[str, Any]  # of one layer, or of L layers at once; see detr/models/query_detector.py


class Targets(NamedTuple):
    """The T objects of a batch, image after image; what the data lack is None."""

    counts: list[int]  # objects of each image
    labels: Tensor  # (T,) class indices
    boxes: Tensor  # (T, 4) cxcywh relative to each image
    masks: Tensor | None = None  # (T, H, W)
    curves: Tensor | None = None  # (T, P, 2) relative x and y

    def padded(self) -> "Targets":
        """The same in tensors (B, N, ...), where N is the greatest count, zero where an image has fewer."""
        image = np.repeat(np.arange(len(self.counts)), self.counts)
        place = np.concatenate([np.arange(count) for count in self.counts])
        where = torch.from_numpy(np.stack((image, place))).to(self.labels.device, non_blocking=True)
        shape = (len(self.counts), max(self.counts))
        tensors = [
            None if values is None else values.new_zeros(*shape, *values.shape[1:]).index_put(tuple(where), values)
            for values in self[1:]
        ]
        return Targets(self.counts, *tensors)  # type: ignore[arg-type]


class Matches(NamedTuple):
    """The M pairs of rows and objects of all layers and images, each an (M,) int64 tensor on the outputs' device.

    Layers follow one another and have equally many pairs.
    """

    layers: Tensor
    images: Tensor
    queries: Tensor  # rows of an image's answers
    targets: Tensor  # rows of the batch's objects

    def repeat(self, layers: int) -> "Matches":
        """The pairs of one layer for each of as many layers."""
        number = torch.arange(layers, device=self.layers.device).repeat_interleave(len(self.layers))
        return Matches(number, *(part.repeat(layers) for part in self[1:]))

    def of_last_layer(self, layers: int) -> "Matches":
        """The pairs of the last of so many layers, as those of layer 0."""
        last = slice(len(self.layers) // layers * (layers - 1), None)
        return Matches(self.layers[last] - (layers - 1), *(part[last] for part in self[1:]))


def unstack_layers(outputs: Outputs | list[Outputs]) -> list[Outputs]:
    """A detector's answers layer by layer. One may also return tensors (L, B, Q, ...) of all layers in one dict.

    What else is in that dict is no answer, and left out.
    """
    if isinstance(outputs, list):
        return outputs
    shape = outputs["logits"].shape[:3]
    outputs = {name: value for name, value in outputs.items() if getattr(value, "shape", ())[:3] == shape}
    return [dict(zip(outputs, layer, strict=True)) for layer in zip(*outputs.values(), strict=True)]


def group_by_set(layers: Sequence[Outputs]) -> dict[str, list[Outputs]]:
    """Layers by the set of answers that they belong to; a last layer answers for the model."""
    sets: dict[str, list[Outputs]] = {}
    for layer in layers:
        answers = {name: value for name, value in layer.items() if name != "set"}
        sets.setdefault(str(layer.get("set", "queries")), []).append(answers)
    return sets


def stack_layers(layers: Outputs | Sequence[Outputs]) -> Outputs:
    """The tensors that all L layers have, (L, B, R, ...), floats in fp32 at least; `real` stays (B, R)."""
    if isinstance(layers, dict):
        return {name: _upcast_half(value) for name, value in layers.items()}
    names = [name for name in layers[-1] if all(name in layer for layer in layers)]
    every = {name: _upcast_half(torch.stack([layer[name] for layer in layers])) for name in names if name != "real"}
    return every | {name: layers[-1][name] for name in names if name == "real"}


def stack_last_layer(layers: Outputs | Sequence[Outputs]) -> Outputs:
    """The last layer as `stack_layers` would give it alone."""
    if isinstance(layers, dict):
        return stack_layers({name: value if name == "real" else value[-1:] for name, value in layers.items()})
    return stack_layers(layers[-1:])


def logit_count(classification: Classification, classes: int) -> int:
    """How many logits a row answers with."""
    return classes + 1 if classification == "softmax" else classes


def probabilities(classification: Classification, logits: Tensor) -> Tensor:
    """Of each of K classes: logits (..., K + 1), "no object" last, or (..., K) -> (..., K)."""
    return logits.softmax(-1)[..., :-1] if classification == "softmax" else logits.sigmoid()


def detections(classification: Classification, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer's answers (B, Q, ...) come to: scores (B, N), labels (B, N) and boxes (B, N, 4).

    Every query answers once (N = Q), with its most probable class that is not "no object" (official post-processing).
    Boxes are xyxy in shares of each image's width and height.
    """
    scores, labels = probabilities(classification, outputs["logits"].float()).max(-1)
    return scores, labels, to_xyxy(outputs["boxes_cxcywh"].float())


def _upcast_half(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
