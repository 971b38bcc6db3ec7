"""Plan the export of a classifier as one graph, from images to logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from common.errors import UserError
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.verify.comparison import relative_difference
from vit.models.classifier import Classifier
from vit.models.resnet import ResNet
from vit.models.swin import Swin
from vit.models.tnt import Tnt
from vit.tasks.classification import Classification

SEED = 0
BATCH_SIZES = (1, 2, 3)


class NamedLogits(nn.Module):
    """A classifier that returns its logits as a tuple of one tensor, to which `Graph.outputs` gives a name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Normalised images (B, channels, H, W) -> logits (B, K) of K classes."""
        return (self.model(images),)


def plan(model: nn.Module, task: Classification, size: tuple[int, int] | None = None) -> Plan:
    """Plan the export of a classifier for any batch size and, if the model's class is known, for other image sizes.

    Images have 2 to 4,096 patches in each direction, with sides that are multiples of the patch size; for a Swin
    Transformer of k stages, at least 2^k + 1 patches, so that no map has a single row. For a ResNet, they have any size
    with more than one row and column in the last map. The graph accepts only the image size of the data set for a model
    of another class, or if images of this size are smaller than the smallest of the others, or if `size` states it.
    Raises UserError if `size` (H, W) is another one.
    """
    data = task.data
    height, width = data.image_size
    if size not in (None, (height, width)):
        raise UserError(
            f"--size {size[0]}x{size[1]}: the images of this classifier's data have {height} x {width} pixels; give "
            f"--size {height}x{width}, or data.image_size=[{size[0]},{size[1]}] as well, if its data has this key."
        )
    dimensions = {"batch": Dimension(Dim("batch", min=1), "1 or more")}
    shape: list[str | int] = ["batch", data.channels, height, width]
    sizes = [(height, width)] * len(BATCH_SIZES)
    p, low, sides = _free_sides(model, (height, width)) if size is None else (1, 1, {})
    if sides:
        dimensions |= sides
        shape = ["batch", data.channels, "height", "width"]
        sizes = [(height, width), (low, low + p), (height + p, width), (height, 2 * width), (low + 3 * p, low)]
        sizes += [(2 * p + 1, 4 * p - 1)] if isinstance(model, ResNet) else []
    example = (height + 2 * p, width + 3 * p) if sides else (height, width)
    graph = Graph(
        "model",
        NamedLogits(model),
        {"images": _sample_images(3, data.channels, example)},
        {"images": shape},
        {"logits": "(batch, classes): softmax makes them probabilities"},
    )
    metadata = {"kind": "classification", "classes": task.classes, "preprocessing": preprocessing(data)}

    @torch.no_grad()
    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        comparisons = []
        for i, size in enumerate(sizes):
            images = _sample_images(BATCH_SIZES[i % len(BATCH_SIZES)], data.channels, size)
            difference = relative_difference(functions["model"](images)["logits"], model(images))
            comparisons.append(Comparison(" x ".join(map(str, images.shape)), "logits", difference))
        return comparisons

    return Plan([graph], dimensions, metadata, {}, [], compare)


def _free_sides(model: nn.Module, size: tuple[int, int]) -> tuple[int, int, dict[str, Dimension]]:
    """Return a step and the smallest side of other image sizes in pixels, and the dimensions "height" and "width".

    There are no dimensions if the graph accepts only images of `size`.
    """
    if isinstance(model, Classifier | Tnt | Swin):
        # torch.export treats a length of 1 as a constant, so the last map of a model has at least 2 rows and columns.
        p, least = model.patches.size, 2 ** len(model.stages) + 1 if isinstance(model, Swin) else 2
        text, names = f"multiples of {p} pixels, {least * p} or more", (("height", "rows"), ("width", "columns"))
        if min(model.patches.grid(*size)) >= least:
            # A multiple of a symbolic length needs an upper bound.
            return p, least * p, {name: Dimension(p * Dim(n, min=least, max=4096), text) for name, n in names}
    if isinstance(model, ResNet) and min(model.grid(*size)) > 1:
        least = model.stride + 1
        text = f"{least} pixels or more"
        sides = {name: Dimension(Dim(name, min=least), text) for name in ("height", "width")}
        return model.stride, 2 * model.stride, sides
    return 1, 1, {}


def preprocessing(data: Any) -> dict[str, Any]:
    """Describe the preprocessing of images for model.json, so that a user of the graph can re-implement it."""
    return {
        "colours": "RGB" if data.channels == 3 else "grey",
        "image_size": list(data.image_size),
        "crop_ratio": getattr(data, "crop_ratio", 1.0),
        "resize": f"{getattr(data, 'interpolation', 'bilinear')} with antialiasing, to cover image_size / crop_ratio "
        "with its proportions kept; then a centre crop of image_size",
        "mean": [float(value) for value in getattr(data, "mean", ())],
        "std": [float(value) for value in getattr(data, "std", ())],
        "of": "mean and std of values in 0 to 1: (value / 255 - mean) / std",
    }


def _sample_images(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(SEED))
