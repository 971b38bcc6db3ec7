"""A detector for export: images and their sizes to scores, labels and boxes."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from common.data.images import MEAN, STD
from common.nn.positions import Learned2d
from detr.criterion.answers import Classification, detections, probabilities, unstack_layers
from detr.tasks.detection import Detection
from scripts.exporting.plan import Call, Graph, Plan, Row, Size
from scripts.verify.comparison import absolute

STRIDE = 32  # the greatest of the backbones; tracing takes a map of one row for a special case
SEED = 0
# (height, width) of each image of a batch, which is padded to the greatest.
BATCHES = ([(64, 64)], [(97, 70), (60, 41)], [(50, 129), (33, 100), (50, 40)], [(33, 33), (33, 33)])


class Answers(nn.Module):
    """A detector's last layer as answers that need nothing more."""

    def __init__(self, model: nn.Module, classification: Classification):
        super().__init__()
        self.model, self.classification = model, classification

    def forward(self, images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, H, W), sizes (B, 2) -> scores (B, Q), labels (B, Q), boxes (B, Q, 4).

        Boxes are xyxy in shares of each image's own width and height; see `detections` for scores.
        """
        return detections(self.classification, unstack_layers(self.model(images, sizes))[-1])


def plan(model: nn.Module, task: Detection) -> Plan:
    """How a detector is exported: any batch, height and width."""
    sizes = {"batch": Size(Dim("batch", min=1), "1 or more"), **_sides(model)}
    images, lengths = _batch([(70, 60), (64, 61), (50, 33)])
    graph = Graph(
        "model",
        Answers(model, task.classification),
        {"images": images, "sizes": lengths},
        {"images": ["batch", 3, "height", "width"], "sizes": ["batch", 2]},
        {
            "scores": "(batch, queries): the probability of the label",
            "labels": "(batch, queries): the likeliest class, an index into classes",
            "boxes": "(batch, queries, 4): left, top, right, bottom as shares of the image's own width and height",
        },
    )
    about = {
        "kind": "detection",
        "classes": task.categories,
        "threshold": task.options.threshold,
        "preprocessing": preprocessing(task.data),
    }

    def compare(calls: Mapping[str, Call]) -> list[Row]:
        return [row for batch in BATCHES for row in _compare(model, task.classification, calls["model"], batch)]

    return Plan([graph], sizes, about, {}, [], compare)


def preprocessing(data: Any) -> dict[str, Any]:
    """What happens to an image before the graph, for those who write it anew."""
    augmentation = getattr(data, "augmentation", None)
    return {
        "colours": "RGB",
        "shorter_side": getattr(augmentation, "eval_size", None),
        "longer_side_at_most": getattr(augmentation, "max_size", None),
        "resize": "bilinear with antialiasing",
        "mean": list(MEAN),
        "std": list(STD),
        "of": "values in 0 to 1: (value / 255 - mean) / std",
        "padding": "zeros after normalising, right of the image and below it; sizes are (height, width) without it",
    }


def _sides(model: nn.Module) -> dict[str, Size]:
    """What heights and widths a detector takes."""
    least, most, words = STRIDE + 1, None, f"{STRIDE + 1} pixels or more"
    positions, stages = getattr(model, "positions", None), getattr(getattr(model, "backbone", None), "stages", None)
    if isinstance(positions, Learned2d) and stages:
        most = stages[-1][2] * positions.rows.num_embeddings
        words = f"{least} to {most} pixels"
    return {name: Size(Dim(name, min=least, max=most), words) for name in ("height", "width")}


def _batch(sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Random images of these sizes in one batch, zero where padded, and the sizes as a tensor."""
    lengths = torch.tensor(sizes)
    height, width = lengths.amax(0).tolist()
    images = torch.randn(len(sizes), 3, height, width, generator=torch.Generator().manual_seed(SEED))
    for image, (h, w) in zip(images, sizes, strict=True):
        image[:, h:], image[:, :, w:] = 0.0, 0.0
    return images, lengths


@torch.no_grad()
def _compare(model: nn.Module, classification: Classification, call: Call, batch: list[tuple[int, int]]) -> list[Row]:
    """Differences of one batch; of a label, how much less likely the model holds it than the likeliest."""
    images, lengths = _batch(batch)
    padded = any(one != other for one, other in pairwise(batch))
    outputs = unstack_layers(model(images, lengths if padded else None))[-1]
    found, shares = call(images, lengths), probabilities(classification, outputs["logits"])
    best, _, boxes = detections(classification, outputs)
    chosen = shares.gather(-1, found["labels"][..., None])[..., 0]  # (B, Q)
    what = f"{len(batch)} x 3 x {images.shape[2]} x {images.shape[3]}{', padded' if padded else ''}"
    return [
        Row(what, "scores", absolute(found["scores"], best)),
        Row(what, "labels", absolute(chosen, best)),
        Row(what, "boxes", absolute(found["boxes"], boxes)),
    ]
