"""Import TNT files of the authors (huawei-noah/Efficient-AI-Backbones) and of timm (Han et al. 2021, arXiv 2103.00112).

The two programs compute the same function under different names. Both project queries and keys by one matrix and values
by another, which are joined here. timm's `tnt_s_legacy` is another network, which embeds words before the image is
split into patches; it is refused.

Differs: the data's mean and standard deviation, the number of heads and the method of resampling positions are not in a
file. Notes name the published values.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights.renaming import Table, rename, with_prefixes
from common.weights.unwrapping import floats
from vit.importing.adopt import unwrap
from vit.importing.classes import with_classes

SUPPORTED_FILES = "a TNT of its authors or of timm as published"
NAMES = Table(  # (the authors' and timm's, ours)
    ("{patch_embed|pixel_embed}.proj.", "patches.convolution."),
    ("{proj_norm1|norm1_proj}.", "embedding.word_norm."),
    ("proj.", "embedding.projection."),
    ("{proj_norm2|norm2_proj}.", "embedding.norm."),
    ("cls_token", "class_token"),
    ("{outer_pos|patch_pos}", "positions"),
    ("{inner_pos|pixel_pos}", "word_positions"),
    ("norm.", "encoder.norm."),
    ("head.", "head."),
    *with_prefixes(
        "blocks.{i}.",
        "updates.{i}.",
        (
            ("{proj_norm1|norm1_proj}.", "word_norm."),
            ("proj.weight", "projection.weight"),  # its bias would be that of a legacy file
            ("{proj_norm2|norm2_proj}.", "norm."),
        ),
    ),
    *with_prefixes(
        "blocks.{i}.",
        "inner.blocks.{i}.",
        (
            ("{inner_norm1|norm_in}.", "residuals.0.norm."),
            ("{inner_attn|attn_in}.qk.weight", "attention.qk"),
            ("{inner_attn|attn_in}.v.weight", "attention.v"),
            ("{inner_attn|attn_in}.proj.", "attention.out_proj."),
            ("{inner_norm2|norm_mlp_in}.", "residuals.1.norm."),
            ("{inner_mlp|mlp_in}.fc1.", "feed_forward.expand."),
            ("{inner_mlp|mlp_in}.fc2.", "feed_forward.contract."),
        ),
    ),
    *with_prefixes(
        "blocks.{i}.",
        "encoder.blocks.{i}.",
        (
            ("{outer_norm1|norm_out}.", "residuals.0.norm."),
            ("{outer_attn|attn_out}.qk.weight", "attention.qk"),
            ("{outer_attn|attn_out}.v.weight", "attention.v"),
            ("{outer_attn|attn_out}.proj.", "attention.out_proj."),
            ("{outer_norm2|norm_mlp}.", "residuals.1.norm."),
            ("{outer_mlp|mlp}.fc1.", "feed_forward.expand."),
            ("{outer_mlp|mlp}.fc2.", "feed_forward.contract."),
        ),
    ),
)
LEFT_OUT = r"outer_tokens"  # the authors' code never uses it
REQUIRED = ("patches.convolution.weight", "embedding.projection.weight", "class_token", "positions", "word_positions")
NOTE = (
    "published TNT models need data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] data.crop_ratio=0.9, which the file does "
    "not say"
)


def recognises(names: Iterable[str]) -> bool:
    """Whether these are tensor names of a TNT."""
    return not {"inner_pos", "pixel_pos"}.isdisjoint(names)


def adopt(content: dict[str, Any], classes: list[str] | None, image_size: tuple[int, int]) -> Adopted:
    """Convert another program's file to our names and shapes; the arguments are those of `vit.importing.adopt.adopt`.

    Raises UserError if the file has a tensor that our TNT lacks, or lacks one that it has.
    """
    tensors, left_out = unwrap(content)
    parts = rename(floats(tensors), NAMES.to_ours, LEFT_OUT)
    if parts.unknown:
        raise UserError(_refusal(f"it has {parts.unknown[0]}"))
    if missing := next((name for name in REQUIRED if name not in parts.tensors), None):
        raise UserError(_refusal(f"it has nothing for {missing}"))
    weights = _join_projections(parts.tensors)
    weights["class_token"] = weights["class_token"].flatten()  # (1, 1, C) -> (C,)
    weights["word_positions"] = _word_positions(weights["word_positions"])
    table = weights.pop("positions").flatten(0, -2)  # (1, 1 + N, C) -> (1 + N, C)
    grid, notes = _read_grid(len(table) - 1, image_size)
    weights |= {"positions.token": table[0], "positions.grid": table[1:].unflatten(0, grid)}  # (N, C) -> (h, w, C)
    return with_classes(weights, classes, left_out + parts.left_out, [*notes, NOTE])


def _join_projections(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the rows of `attention.qk` (2 C, C) and `attention.v` (C, C) into `attention.in_proj.weight` (3 C, C).

    If one of the two is missing, the other is dropped, so that `in_proj` is later reported as missing.
    """
    joined = {name: tensor for name, tensor in tensors.items() if not re.search(r"attention\.(qk|v)$", name)}
    for name in [name for name in tensors if name.endswith("attention.qk")]:
        values = tensors.get(f"{name.removesuffix('qk')}v")
        if values is not None:
            joined[f"{name.removesuffix('qk')}in_proj.weight"] = torch.cat([tensors[name], values])
    return joined


def _word_positions(table: Tensor) -> Tensor:
    """Convert the positions of words, the authors' (1, W, c) or timm's (1, c, side, side), to (W, c)."""
    return table[0] if table.ndim == 3 else table[0].flatten(1).T.contiguous()


def _read_grid(count: int, image_size: tuple[int, int]) -> tuple[tuple[int, int], list[str]]:
    """Return the grid of `count` positions of patches, and a note if it could be read in another way.

    A file does not hold the grid or the size of a patch. If `count` square patches fill an image of `image_size`, their
    grid is read, and otherwise a square. Raises UserError if neither is possible.
    """
    height, width = image_size
    sides = [side for side in range(1, min(height, width) + 1) if height % side == 0 == width % side]
    fitting = next(((height // p, width // p) for p in sides if (height // p) * (width // p) == count), None)
    square = (math.isqrt(count), math.isqrt(count)) if math.isqrt(count) ** 2 == count else None
    grid = fitting or square
    if grid is None:
        raise UserError(
            f"The checkpoint has {count} positions of patches, which do not form a square grid; give the image size of "
            "the file as data.image_size=[HEIGHT,WIDTH]."
        )
    if square is None or grid == square:
        return grid, []
    return grid, [
        f"the {count} positions are read as {grid[0]} x {grid[1]} patches, the grid of data.image_size, and not as "
        f"{square[0]} x {square[1]}"
    ]


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is a variant of TNT that is not supported ({reason}); give {SUPPORTED_FILES} (and not "
        "timm's tnt_s_legacy), or a file that this program wrote."
    )
