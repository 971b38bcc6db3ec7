"""Plan the export of a masked autoencoder as two graphs.

The graph "encoder" maps images to features of all their patches. The graph "model" predicts pixels from the visible
patches, of which the caller chooses the number. Positions are those of one image size, so the graphs accept no other.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.export import Dim

from scripts.exporting.classification import preprocessing
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.verify.comparison import relative_difference
from vit.models.masked_autoencoder import MaskedAutoencoder
from vit.tasks.masked_autoencoding import MaskedAutoencoding

SEED = 0
BATCH_SIZES = (1, 2, 5)
_PIXELS = {  # by task.mask.normalise: what the output means
    False: "normalised as the images are",
    True: "minus the mean of their patch, divided by its standard deviation",
}


class Encoder(nn.Module):
    """The encoder of a masked autoencoder, which receives all patches of an image."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Normalised images (B, channels, H, W) -> features (B, 1 + N, C), the class token's first."""
        rows, columns = self.model.patches.grid(images.shape[-2], images.shape[-1])
        everything = torch.arange(rows * columns, device=images.device).expand(images.shape[0], -1)
        return (self.model.encode(images, everything),)


class Autoencoder(nn.Module):
    """A masked autoencoder, whose output is returned as a tuple for `Graph.outputs`."""

    def __init__(self, model: MaskedAutoencoder):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, visible: Tensor) -> tuple[Tensor]:
        """Normalised images (B, channels, H, W), int64 (B, V) -> pixels of all N patches (B, N, p * p * channels)."""
        return (self.model(images, visible),)


def plan(model: MaskedAutoencoder, task: MaskedAutoencoding) -> Plan:
    """Plan the export for any batch size, any number of visible patches but all, and images of the data's size."""
    data, (height, width) = task.data, task.data.image_size
    rows, columns = model.patches.grid(height, width)
    patches = rows * columns
    shapes: dict[str, list[str | int]] = {"images": ["batch", data.channels, height, width]}
    shapes["visible"] = ["batch", "visible"]
    # torch.export treats a length of 1 as a constant, so the example has at least 2 visible patches.
    inputs = _sample_inputs(task, patches, 3, max(2, patches // 4))
    features = {"features": "(batch, 1 + patches, width): of the class token, and of all patches row by row"}
    pixels = {"pixels": "(batch, patches, pixels): values of each patch, by row, column and channel"}
    graphs = [
        Graph("encoder", Encoder(model), {"images": inputs["images"]}, {"images": shapes["images"]}, features),
        Graph("model", Autoencoder(model), inputs, shapes, pixels),
    ]
    dimensions = {
        "batch": Dimension(Dim("batch", min=1), "1 or more"),
        "visible": Dimension(Dim("visible", min=1, max=patches - 1), f"1 to {patches - 1}"),
    }
    metadata = {
        "kind": "masked autoencoding",
        "patch_size": model.patches.size,
        "patches": [rows, columns],
        "visible": "indices of different patches of an image, numbered from 0 row by row; "
        f"{task.mask.visible_count(patches)} of them in training",
        "pixels": _PIXELS[task.mask.normalise],
        "preprocessing": preprocessing(data),
    }

    @torch.no_grad()
    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        comparisons = []
        for count, visible in zip(BATCH_SIZES, (patches - 1, task.mask.visible_count(patches), 1), strict=True):
            sample = _sample_inputs(task, patches, count, visible)
            size = f"{count} x {data.channels} x {height} x {width}"
            for graph, what in zip(graphs, (size, f"{size}, {visible} visible"), strict=True):
                arguments = [sample[name] for name in graph.inputs]
                (expected,), (name,) = graph.module(*arguments), graph.outputs
                difference = relative_difference(functions[graph.name](*arguments)[name], expected)
                comparisons.append(Comparison(what, name, difference))
        return comparisons

    return Plan(graphs, dimensions, metadata, {}, [], compare)


def _sample_inputs(task: MaskedAutoencoding, patches: int, count: int, visible: int) -> dict[str, Tensor]:
    """Sample `count` images, and `visible` of the patches of each in a random order."""
    random = torch.Generator().manual_seed(SEED + count)
    images = torch.randn(count, task.data.channels, *task.data.image_size, generator=random)
    return {"images": images, "visible": torch.rand(count, patches, generator=random).argsort(dim=1)[:, :visible]}
