"""Import Swin Transformers of the official code (microsoft/Swin-Transformer), timm and torchvision.

Liu et al. 2021, arXiv 2103.14030. A file holds the relative position biases of a window of h x w tokens as a table of
(2 h - 1)(2 w - 1) rows, without the numbers h and w. The window is assumed to be square.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights.renaming import Row, Table, rename, with_prefixes
from common.weights.unwrapping import floats
from vit.importing.adopt import unwrap
from vit.importing.classes import with_classes
from vit.importing.layouts import REQUIRED_IN_EACH_BLOCK

MAX_STAGES = 8
CONSTANTS = re.compile(r".*\.(relative_position_index|attn_mask)")  # they follow from the sizes of windows and images


def _stages(blocks: Callable[[int], str], merging: Callable[[int], str], expand: str, contract: str) -> list[Row]:
    """The rows of all stages.

    `blocks` and `merging` return their prefixes for the blocks of a stage and for the merging after it. `expand` and
    `contract` are their names of the two maps in a feed-forward.
    """
    block: tuple[Row, ...] = (
        ("norm1.", "residuals.0.norm."),
        ("attn.relative_position_bias_table", "attention.table"),
        ("attn.qkv.", "attention.in_proj."),
        ("attn.proj.", "attention.out_proj."),
        ("norm2.", "residuals.1.norm."),
        (f"mlp.{expand}.", "feed_forward.expand."),
        (f"mlp.{contract}.", "feed_forward.contract."),
    )
    rows: list[Row] = []
    for stage in range(MAX_STAGES):
        rows += with_prefixes(f"{blocks(stage)}{{i}}.", f"stages.{stage}.blocks.{{i}}.", block)
        rows += with_prefixes(
            merging(stage), f"mergings.{stage}.", (("norm.", "norm."), ("reduction.weight", "reduction.weight"))
        )
    return rows


LAYOUTS = {  # (theirs, ours)
    "official": Table(
        ("patch_embed.proj.", "patches."),
        ("patch_embed.norm.", "patch_norm."),
        *_stages(lambda s: f"layers.{s}.blocks.", lambda s: f"layers.{s}.downsample.", "fc1", "fc2"),
        ("norm.", "norm."),
        ("head.", "head."),
    ),
    "timm": Table(
        ("patch_embed.proj.", "patches."),
        ("patch_embed.norm.", "patch_norm."),
        # A stage begins with the merging that the paper puts at the end of the stage before.
        *_stages(lambda s: f"layers.{s}.blocks.", lambda s: f"layers.{s + 1}.downsample.", "fc1", "fc2"),
        ("norm.", "norm."),
        ("head.fc.", "head."),
    ),
    "torchvision": Table(
        ("features.0.0.", "patches."),
        ("features.0.2.", "patch_norm."),
        *_stages(lambda s: f"features.{2 * s + 1}.", lambda s: f"features.{2 * s + 2}.", "0", "3"),
        ("norm.", "norm."),
        ("head.", "head."),
    ),
}


def recognise(names: Mapping[str, Tensor]) -> str | None:
    """The layout of a file's unwrapped tensors: a key of `LAYOUTS`, or None if they are not a Swin Transformer's."""
    if "features.1.0.attn.relative_position_bias_table" in names:
        return "torchvision"
    if "layers.0.blocks.0.attn.relative_position_bias_table" not in names:
        return None
    official = "head.weight" in names or any(name.startswith("layers.0.downsample.") for name in names)
    return "official" if official else "timm"


def adopt(content: dict[str, Any], classes: list[str] | None) -> Adopted:
    """Convert another program's file, which `recognise` recognises, to our names and shapes.

    The arguments are those of `vit.importing.adopt.adopt`. A table of biases becomes (2 h - 1, 2 w - 1, heads). Indices
    and masks are left out, since the model computes them. Raises UserError if a tensor is missing, or if there is one
    that the model lacks.
    """
    tensors, left_out = unwrap(content)
    layout = recognise(tensors)
    assert layout is not None, "not a Swin Transformer's file"
    learnt = {name: tensor for name, tensor in floats(tensors).items() if not CONSTANTS.fullmatch(name)}
    parts = rename(learnt, LAYOUTS[layout].to_ours)
    if parts.unknown:
        name = parts.unknown[0]
        raise UserError(_refusal(f"it has {name} {tuple(learnt[name].shape)}, which a Swin Transformer lacks"))
    if missing := _missing(parts.tensors):
        raise UserError(_refusal(f"it has nothing for {missing}"))
    weights = {
        name: _with_two_axes(tensor, parts.sources[name]) if name.endswith("attention.table") else tensor
        for name, tensor in parts.tensors.items()
    }
    return with_classes(weights, classes, left_out)


def to_layout(ours: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Convert our parameters, or a dict of their gradients, to names and shapes of `layout`, a key of `LAYOUTS`."""
    flat = {name: x.flatten(0, 1) if name.endswith("attention.table") else x for name, x in ours.items()}
    return rename(flat, LAYOUTS[layout].to_theirs).tensors


def _with_two_axes(table: Tensor, name: str) -> Tensor:
    """(rows, heads) -> (side, side, heads)."""
    side = math.isqrt(len(table))
    if side * side != len(table) or side % 2 == 0:
        raise UserError(_refusal(f"{name} has {len(table)} rows, which are not those of a square window"))
    square: Tensor = table.unflatten(0, (side, side))
    return square


def _missing(parts: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that a complete Swin Transformer needs and `parts` lacks; None if there is none."""
    numbers = [
        tuple(map(int, m.groups())) for name in parts if (m := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name))
    ]
    required = [f"{part}.{leaf}" for part in ("patches", "patch_norm", "norm") for leaf in ("weight", "bias")]
    stages = max(stage for stage, _ in numbers) + 1
    for stage in range(stages):
        blocks = max((block for number, block in numbers if number == stage), default=0) + 1
        of_block = ("attention.table", *REQUIRED_IN_EACH_BLOCK)
        required += [f"stages.{stage}.blocks.{i}.{name}" for i in range(blocks) for name in of_block]
        if stage + 1 < stages:
            required += [f"mergings.{stage}.{name}" for name in ("norm.weight", "norm.bias", "reduction.weight")]
    return next((name for name in required if name not in parts), None)


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is a Swin Transformer that is not supported ({reason}); give a Swin Transformer (version 1, "
        "without absolute positions) of the official code, timm or torchvision, or a file that this program wrote."
    )
