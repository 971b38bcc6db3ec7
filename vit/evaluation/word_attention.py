"""Attention of words inside one patch of a TNT (Han et al. 2021, arXiv 2103.00112, section 3.1), and its picture.

The inner Transformer of a TNT attends within each patch. The picture shows this for the patch to which the outer
Transformer's pooled query attends most in the same layer: for each word of the patch as the query, the attention to all
words of the patch, averaged over heads.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.report.tiles import add_caption, enlarged, fitted, overlay, sheet_of
from vit.evaluation.attention_maps import attention_map, attention_up_to_layer

TILE_SIDE = 96  # pixels; the least side of the tile of a query word
FRAME = torch.tensor([60, 255, 120], dtype=torch.uint8)[:, None, None]  # the colour of frames, absent from heat maps


class PatchPlace(NamedTuple):
    """The place of a patch in the grid of an image's patches."""

    row: int
    column: int
    rows: int  # of the grid
    columns: int

    def box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the patch's top, left, bottom and right in pixels of an image of `height` by `width` pixels."""
        rows = [height * edge // self.rows for edge in (self.row, self.row + 1)]
        columns = [width * edge // self.columns for edge in (self.column, self.column + 1)]
        return rows[0], columns[0], rows[1], columns[1]


class WordAttention(NamedTuple):
    """The attention of words inside one patch of each of B images."""

    maps: Tensor  # (B, W, side, side) in fp32, on the CPU: from each of the W words to the words of the patch
    places: list[PatchPlace]  # of the patches


def attention_inside_patches(model: Any, images: Tensor, layer: int) -> WordAttention:
    """Compute the attention of words in the layer `layer` of a TNT: images (B, channels, H, W), the model's input.

    Layers are numbered as in `attention_up_to_layer`, which raises UserError for a missing one.
    """
    grid = model.patches.grid(images.shape[-2], images.shape[-1])
    outer = attention_up_to_layer(model, images, layer)[-1]  # (B, h, 1 + N, 1 + N)
    looks = attention_map(outer, model.before_patches, model.pooling == "token", grid).mean(1)  # (B, h, w)
    chosen = looks.flatten(1).argmax(1)  # (B,)
    inner = attention_up_to_layer(model, images, layer, "inner")[-1]  # (B N, heads, W, W)
    inner = inner.float().mean(1).unflatten(0, (len(images), -1))  # (B N, heads, W, W) -> (B, N, W, W)
    inner = inner[torch.arange(len(images), device=inner.device), chosen]  # (B, N, W, W) -> (B, W, W)
    maps = inner.unflatten(-1, model.words).cpu()  # (B, W, W) -> (B, W, side, side)
    return WordAttention(maps, [PatchPlace(*divmod(patch, grid[1]), *grid) for patch in chosen.tolist()])


def draw_word_attention(image: Tensor, maps: Tensor, place: PatchPlace) -> Tensor:
    """Draw an image with a frame around a patch, and the patch once for each word as the query.

    `image` is uint8 (3, H, W), and `maps` (W, side, side) are the attention from each word of the patch at `place`. The
    tiles of the words are in the order of the words, each with a frame around its own word, and over each lie the
    colours of its map, which is divided by its own maximum. Returns uint8 (3, H', W').
    """
    top, left, bottom, right = place.box(*image.shape[-2:])
    patch = image[:, top:bottom, left:right]
    patch = enlarged(patch, math.ceil(TILE_SIDE / max(1, min(patch.shape[-2:]))))
    rows, columns = maps.shape[-2:]
    tiles = [
        _framed(overlay(patch, map), PatchPlace(*divmod(word, columns), rows, columns)) for word, map in enumerate(maps)
    ]
    large = _framed(fitted(image), place)
    caption = f"attention from each word of patch {place.row + 1}, {place.column + 1}"
    return sheet_of([add_caption(large, "image", None), add_caption(sheet_of(tiles), caption, None)])


def _framed(image: Tensor, place: PatchPlace) -> Tensor:
    """Draw a frame of about a hundredth of the image's side around the cell at `place`."""
    height, width = image.shape[-2:]
    top, left, bottom, right = place.box(height, width)
    line = max(1, round(max(height, width) / 100))
    framed = image.cpu().clone()
    for rows, columns in (
        (slice(top, top + line), slice(left, right)),
        (slice(bottom - line, bottom), slice(left, right)),
        (slice(top, bottom), slice(left, left + line)),
        (slice(top, bottom), slice(right - line, right)),
    ):
        framed[:, rows, columns] = FRAME
    return framed
