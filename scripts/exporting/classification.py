"""A classifier for export: images to logits."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from scripts.exporting.plan import Call, Graph, Plan, Row, Size
from scripts.verify.comparison import relative
from vit.models.classifier import Classifier
from vit.tasks.classification import Classification

SEED = 0
BATCHES = (1, 2, 3)


class Logits(nn.Module):
    """A classifier whose answer has a name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Normalised images (B, channels, H, W) -> logits (B, K)."""
        return (self.model(images),)


def plan(model: nn.Module, task: Classification) -> Plan:
    """How a classifier is exported: any batch, and any height and width that its patches fill where it takes them.

    A model of another class, or whose patches make but one row or column, takes images of its own size alone.
    """
    data = task.data
    height, width = data.image_size
    sizes = {"batch": Size(Dim("batch", min=1), "1 or more")}
    shape: list[str | int] = ["batch", data.channels, height, width]
    others = [(height, width)]
    if isinstance(model, Classifier) and min(model.patches.grid(height, width)) > 1:
        p = model.patches.size
        for name, count in (("height", "rows"), ("width", "columns")):
            # 1 is a special case to tracing; and a product with a symbol needs an end.
            sizes[name] = Size(p * Dim(count, min=2, max=4096), f"multiples of {p} pixels, {2 * p} or more")
        shape = ["batch", data.channels, "height", "width"]
        others += [(2 * p, 3 * p), (height + p, width), (height, 2 * width), (5 * p, 2 * p)]
    example = (height, width) if len(others) == 1 else (height + 2 * p, width + 3 * p)
    graph = Graph(
        "model",
        Logits(model),
        {"images": _images(3, data.channels, example)},
        {"images": shape},
        {"logits": "(batch, classes): softmax makes them probabilities"},
    )
    about = {"kind": "classification", "classes": task.classes, "preprocessing": preprocessing(data)}

    @torch.no_grad()
    def compare(calls: Mapping[str, Call]) -> list[Row]:
        rows = []
        for i, size in enumerate(others):
            images = _images(BATCHES[i % len(BATCHES)], data.channels, size)
            what = " x ".join(map(str, images.shape))
            rows.append(Row(what, "logits", relative(calls["model"](images)["logits"], model(images))))
        return rows

    return Plan([graph], sizes, about, {}, [], compare)


def preprocessing(data: Any) -> dict[str, Any]:
    """What happens to an image before the graph, for those who write it anew."""
    return {
        "colours": "RGB" if data.channels == 3 else "grey",
        "image_size": list(data.image_size),
        "crop_ratio": getattr(data, "crop_ratio", 1.0),
        "resize": f"{getattr(data, 'interpolation', 'bilinear')} with antialiasing, to cover image_size / crop_ratio "
        "with its proportions kept; then the centre of image_size",
        "mean": [float(value) for value in getattr(data, "mean", ())],
        "std": [float(value) for value in getattr(data, "std", ())],
        "of": "values in 0 to 1: (value / 255 - mean) / std",
    }


def _images(count: int, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(SEED))
