"""Record what a detector's queries, and positions of its encoder, attend to while it predicts.

The modules are found by their names: the last one that ends in `cross_attention`, and the last one under `encoder.`. A
module of full attention (`common.nn.attention.Attention`) gives maps; a module with sampled attention gives points
(`common.nn.recording.record_samples`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.attention import Attention, record_attention
from common.nn.recording import Samples, record_samples

Size = tuple[int, int]  # height and width


class Points(NamedTuple):
    """The n = h L P sampling points, of all heads and levels, of each of D detections."""

    locations: Tensor  # (D, n, 2) as x, y relative to the image
    weights: Tensor  # (D, n), summing to 1
    references: Tensor | None  # (D, 2), the queries' reference points, relative to the image; None = unknown


class Attended(NamedTuple):
    """What is attended to in one image: points, or maps (D, h, H', W') stretched over the image.

    `queries` is the attention of the query of each of D detections. `centres` is that of the encoder's position at the
    centre of each detection's box (in the first level), None without an encoder.
    """

    queries: Tensor | Points
    centres: Tensor | Points | None


Recorded = dict[str, list[Any]]  # "queries" and perhaps "encoder" -> a (B, h, N, M) tensor, or `Samples`, per call


@contextmanager
def record(model: nn.Module) -> Iterator[Recorded]:
    """Record the attention of the last decoder layer ("queries") and, if there is one, of the last encoder layer.

    Raises UserError if the model has no cross-attention that can be recorded, or no method that tells its maps' sizes.
    """
    modules = _modules(model)
    if any(isinstance(module, Attention) for module in modules.values()) and not hasattr(model, "memory_grid"):
        raise UserError(
            f"task.predict.attention: {type(model).__name__} has no method memory_grid(height, width), which tells the "
            "size of the map that its queries attend to; use task.predict.attention=false."
        )
    holder = nn.ModuleDict(modules)
    with record_attention(holder) as maps, record_samples(holder) as samples:
        calls: Recorded = {**maps, **samples}
        yield {name: calls[name] for name in modules}


def attended(
    model: Any, recorded: Recorded, boxes: Tensor, queries: Tensor | None, size: Size, padded: Size
) -> Attended:
    """Convert what `record` recorded for a batch of one image.

    Args:
        model: the model.
        recorded: the result of `record`.
        boxes: (D, 4) xyxy relative to the image, the boxes of the detections.
        queries: (D,) the index of each detection's query; None = detection i is that of query i.
        size: height and width of the image in pixels, without padding.
        padded: height and width of the model's input in pixels.
    """
    cross = _of_image(model, recorded["queries"][-1], size, padded)
    if queries is not None:
        cross = rows(cross, queries)
    if "encoder" not in recorded:
        return Attended(cross, None)
    own = recorded["encoder"][-1]
    if isinstance(own, Samples):
        cells, row = _real_shapes(own.shapes, size, padded)[0], own.shapes[0][1]
    else:
        cells, row = model.memory_grid(*size), model.memory_grid(*padded)[1]
    tokens = _tokens((boxes[:, :2] + boxes[:, 2:]) / 2, cells, row)
    if isinstance(own, Samples):
        own = own._replace(locations=own.locations[:, tokens], weights=own.weights[:, tokens], references=None)
    else:
        own = own[:, :, tokens]
    return Attended(cross, _of_image(model, own, size, padded))


def rows(attention: Tensor | Points, indices: Tensor) -> Tensor | Points:
    """Select the detections with the given indices (n,)."""
    if isinstance(attention, Points):
        references = None if attention.references is None else attention.references[indices]
        return Points(attention.locations[indices], attention.weights[indices], references)
    return attention[indices]


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules whose attention is recorded: "queries" and, if there is one, "encoder"."""
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Attention) or hasattr(module, "recorded_samples")
    }
    cross = [module for name, module in modules.items() if name.endswith("cross_attention")]
    if not cross:
        raise UserError(
            f"task.predict.attention: {type(model).__name__} has no module named cross_attention that records what its "
            "queries attend to; use task.predict.attention=false."
        )
    encoder = [module for name, module in modules.items() if name.startswith("encoder.")]
    return {"queries": cross[-1], **({"encoder": encoder[-1]} if encoder else {})}


def _tokens(centres: Tensor, cells: Size, row: int) -> Tensor:
    """Return the indices (D,) of the positions at `centres` (D, 2), x, y relative to the image.

    The image covers `cells`, a number of rows and of columns, of a map whose rows have `row` positions.
    """
    x, y = ((centres[:, axis] * cells[1 - axis]).long().clamp(0, cells[1 - axis] - 1) for axis in (0, 1))
    return y * row + x


def _real_shapes(shapes: Sequence[Size], size: Size, padded: Size) -> list[Size]:
    """Return how many rows and columns of each padded map, of the heights and widths `shapes`, the image covers."""
    return [(_real_cells(h, size[0], padded[0]), _real_cells(w, size[1], padded[1])) for h, w in shapes]


def _real_cells(cells: int, size: int, padded: int) -> int:
    """Return how many of the `cells` of a padded side the image covers, exact if the stride is a power of two."""
    stride = 1
    while -(-padded // stride) > cells:
        stride *= 2
    return -(-size // stride) if -(-padded // stride) == cells else -(-cells * size // padded)


def _of_image(model: Any, attention: Tensor | Samples, size: Size, padded: Size) -> Tensor | Points:
    """Convert (1, h, N, M) to maps (N, h, H', W') of the image without its padding, or samples to points."""
    if isinstance(attention, Samples):
        real = torch.tensor(_real_shapes(attention.shapes, size, padded))  # (L, 2)
        to_image = (torch.tensor(attention.shapes) / real).flip(1)[:, None]  # (L, 1, 2) as x, y
        weights = attention.weights[0].float().cpu()  # (N, h, L, P)
        locations = attention.locations[0].float().cpu() * to_image
        references = None if attention.references is None else attention.references[0].float().cpu() * to_image[0]
        return Points(locations.flatten(1, 3), weights.flatten(1) / weights.shape[1], references)
    grid, (height, width) = model.memory_grid(*padded), model.memory_grid(*size)
    if grid[0] * grid[1] != attention.shape[-1]:
        raise UserError(
            f"task.predict.attention: memory_grid of {type(model).__name__} says {grid[0]} x {grid[1]} positions for "
            f"images of {padded[0]} x {padded[1]} pixels, but {attention.shape[-1]} are attended to; correct it."
        )
    maps: Tensor = attention[0].float().cpu().transpose(0, 1).unflatten(-1, grid)
    maps = maps[..., :height, :width]
    return maps
