"""Plan the export of a detector as one graph, from images and their sizes to scores, labels and boxes."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from common.data.images import MEAN, STD
from common.errors import UserError
from common.nn.positions import Learned2d
from detr.criterion.answers import Classification, detections, probabilities, unstack_layers
from detr.criterion.boxes import to_xyxy
from detr.models.deformable_detector import DeformableDetector
from detr.tasks.detection import Detection
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.verify.comparison import absolute_difference

# The largest stride of the backbones. An image side of up to 32 pixels gives a feature map of one row or column. Such
# images are not supported, because torch.export treats a length of 1 as a constant.
STRIDE = 32
SEED = 0
MASKS_NOTE = (
    "the graph computes scores, labels and boxes, but not the masks that the model also predicts; for masks, use "
    "predict.py or task.predict"
)
# The batches on which outputs are compared, as the (height, width) of each image. Each batch is padded to its largest
# height and width.
BATCHES = ([(64, 64)], [(97, 70), (60, 41)], [(50, 129), (33, 100), (50, 40)], [(33, 33), (33, 33)])


class Detections(nn.Module):
    """A detector that returns scores, labels and boxes instead of logits."""

    def __init__(self, model: nn.Module, classification: Classification, limit: int | None):
        super().__init__()
        self.model, self.classification, self.limit = model, classification, limit

    def forward(self, images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, H, W), sizes (B, 2) -> scores (B, D), labels (B, D), boxes (B, D, 4).

        The D detections are those of `detr.criterion.answers.detections`: one for each query, or with `limit` the
        pairs of a query and a class with the highest scores. `sizes` are the height and width of each image without
        padding; None means that no image is padded. Boxes are xyxy, relative to the width and height of their image
        without padding.
        """
        return detections(self.classification, unstack_layers(self.model(images, sizes))[-1], self.limit)


def plan(model: nn.Module, task: Detection, size: tuple[int, int] | None = None) -> Plan:
    """Plan the export of a detector for any batch size, and for the image sizes that `_image_dimensions` returns.

    If `size` is not None, the graph accepts only batches that are padded to this height and width. Raises UserError if
    the model does not accept them.
    """
    sides = _image_dimensions(model)
    if size is not None:
        _check_size(size, model)
        sides = {}
    dimensions = {"batch": Dimension(Dim("batch", min=1), "1 or more"), **sides}
    images, sizes = _sample_batch(_scaled([(70, 60), (64, 61), (50, 33)], model) if size is None else _padded_to(size))
    height, width = size or ("height", "width")
    batches = [_scaled(shapes, model) for shapes in BATCHES] if size is None else [[size], _padded_to(size)]
    limited = task.options.detections_per_image is not None
    label = "the class of one of the best pairs of a query and a class" if limited else "the query's likeliest class"
    graph = Graph(
        "model",
        Detections(model, task.classification, task.options.detections_per_image),
        {"images": images, "sizes": sizes},
        {"images": ["batch", 3, height, width], "sizes": ["batch", 2]},
        {
            "scores": "(batch, detections): the probability of the label",
            "labels": f"(batch, detections): {label}, an index into classes",
            "boxes": "(batch, detections, 4): left, top, right, bottom as shares of the image's own width and height",
        },
    )
    metadata = {
        "kind": "detection",
        "classes": task.categories,
        "threshold": task.options.threshold,
        "preprocessing": preprocessing(task.data),
    }

    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        function = functions["model"]
        return [row for shapes in batches for row in _compare(model, task, function, shapes)]

    notes = (MASKS_NOTE,) if getattr(model, "mask_head", None) is not None else ()
    return Plan([graph], dimensions, metadata, {}, [], compare, notes)


def preprocessing(data: Any) -> dict[str, Any]:
    """Describe the preprocessing of images for model.json, so that a user of the graph can re-implement it."""
    augmentation = getattr(data, "augmentation", None)
    return {
        "colours": "RGB",
        "shorter_side": getattr(augmentation, "eval_size", None),
        "longer_side_at_most": getattr(augmentation, "max_size", None),
        "resize": "bilinear with antialiasing",
        "mean": list(MEAN),
        "std": list(STD),
        "of": "mean and std of values in 0 to 1: (value / 255 - mean) / std",
        "padding": "zeros after normalising, right of the image and below it; sizes are without padding",
    }


def _check_size(size: tuple[int, int], model: nn.Module) -> None:
    shortest, longest = _shortest_side(model), _longest_side(model)
    if min(size) < shortest or (longest is not None and max(size) > longest):
        raise UserError(
            f"--size {size[0]}x{size[1]}: the sides of this detector's images must have "
            f"{_describe_sides(shortest, longest)}; give others."
        )


def _padded_to(size: tuple[int, int]) -> list[tuple[int, int]]:
    """The (height, width) of three images that are padded to `size` in one batch."""
    height, width = size
    return [size, (height, max(1, width * 3 // 4)), (max(1, height // 2), width)]


def _image_dimensions(model: nn.Module) -> dict[str, Dimension]:
    """Return the free dimensions "height" and "width" of an exported detector's images.

    Both are at least `_shortest_side` pixels. For a model with learned position embeddings, they also have a maximum.
    """
    shortest, longest = _shortest_side(model), _longest_side(model)
    description = _describe_sides(shortest, longest)
    return {name: Dimension(Dim(name, min=shortest, max=longest), description) for name in ("height", "width")}


def _describe_sides(shortest: int, longest: int | None) -> str:
    return f"{shortest} pixels or more" if longest is None else f"{shortest} to {longest} pixels"


def _longest_side(model: nn.Module) -> int | None:
    """Return the largest side of an image, in pixels, that a detector with learned positions accepts; None: any."""
    positions, stages = getattr(model, "positions", None), getattr(getattr(model, "backbone", None), "stages", None)
    if isinstance(positions, Learned2d) and stages:
        longest: int = stages[-1][2] * positions.rows.num_embeddings
        return longest
    return None


def _shortest_side(model: nn.Module) -> int:
    """Return the smallest side of an image, in pixels, that an exported detector accepts.

    The map of the largest stride needs two rows and columns. In a two-stage detector, the map of highest resolution
    needs a token for each query, because graphs do not repeat proposals.
    """
    if not isinstance(model, DeformableDetector):
        return STRIDE + 1
    extra = len(model.project) - model.backbone.count
    stride = model.backbone.stages[-model.backbone.count][2]
    tokens = math.ceil(math.sqrt(model.query_count)) if model.proposals is not None else 0
    side: int = max(STRIDE * 2**extra + 1, stride * tokens)
    return side


def _sample_batch(shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Sample images with the (height, width) in `shapes`, zero-padded to (B, 3, H, W); also returns sizes (B, 2)."""
    sizes = torch.tensor(shapes)
    height, width = sizes.amax(0).tolist()
    images = torch.randn(len(shapes), 3, height, width, generator=torch.Generator().manual_seed(SEED))
    for image, (h, w) in zip(images, shapes, strict=True):
        image[:, h:], image[:, :, w:] = 0.0, 0.0
    return images, sizes


def _scaled(shapes: list[tuple[int, int]], model: nn.Module) -> list[tuple[int, int]]:
    """Multiply heights and widths so that sides of STRIDE + 1 pixels become at least `_shortest_side`."""
    factor = math.ceil(_shortest_side(model) / (STRIDE + 1))
    return [(height * factor, width * factor) for height, width in shapes]


@torch.no_grad()
def _compare(
    model: nn.Module, task: Detection, function: GraphFunction, shapes: list[tuple[int, int]]
) -> list[Comparison]:
    """Compare the outputs of the exported graph `function` with the model's on one batch of images.

    `shapes` holds the (height, width) of each image. For labels, the difference of a query is the model's highest class
    probability minus the model's probability of the exported label. With `detections_per_image`, the order of nearly
    equal scores may differ, so an exported detection is compared with the model's nearest query: see `_distance`.
    """
    images, sizes = _sample_batch(shapes)
    padded = any(shape != following for shape, following in pairwise(shapes))
    outputs = unstack_layers(model(images, sizes if padded else None))[-1]
    exported, class_probabilities = function(images, sizes), probabilities(task.classification, outputs["logits"])
    scores, _, boxes = detections(task.classification, outputs, task.options.detections_per_image)
    inputs = f"{len(shapes)} x 3 x {images.shape[2]} x {images.shape[3]}{', padded' if padded else ''}"
    if task.options.detections_per_image is not None:
        distance = _distance(exported, class_probabilities, to_xyxy(outputs["boxes_cxcywh"]))
        return [
            Comparison(inputs, "scores", absolute_difference(exported["scores"], scores)),
            Comparison(inputs, "scores and boxes by label", distance),
        ]
    label_scores = class_probabilities.gather(-1, exported["labels"][..., None])[..., 0]  # (B, Q, K) -> (B, Q)
    return [
        Comparison(inputs, "scores", absolute_difference(exported["scores"], scores)),
        Comparison(inputs, "labels", absolute_difference(label_scores, scores)),
        Comparison(inputs, "boxes", absolute_difference(exported["boxes"], boxes)),
    ]


def _distance(exported: Mapping[str, Tensor], class_probabilities: Tensor, boxes: Tensor) -> float:
    """Return the largest distance of an exported detection to the model's nearest query.

    The distance of a query is the largest difference of its probability of the exported label to the exported score,
    and of its box to the exported one. The result is infinite if a box is not finite. `class_probabilities` are (B, Q,
    K), and `boxes` (B, Q, 4) xyxy.
    """
    if not exported["boxes"].isfinite().all():
        return float("inf")
    labels = exported["labels"][:, None].expand(-1, boxes.shape[1], -1)  # (B, Q, D)
    of_scores = (class_probabilities.gather(-1, labels) - exported["scores"][:, None]).abs()  # (B, Q, D)
    of_boxes = (boxes[:, :, None] - exported["boxes"][:, None]).abs().amax(-1)  # (B, Q, D)
    return float(torch.maximum(of_scores, of_boxes).amin(1).max())
