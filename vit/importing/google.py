"""Convert names and axes of Google's .npz files (vit_jax and big_vision; Dosovitskiy et al. 2021, arXiv 2010.11929).

Both programs store the parameters of the same Flax modules, but some names differ. The levels of a name are separated
by "/". The table of positions is under Transformer/posembed_input (vit_jax), under Transformer (big_vision until 2022)
or at the top level (big_vision since then). Older versions of Flax number the modules of a block consecutively
(LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3). Newer versions number each class of modules
separately (LayerNorm_1, MlpBlock_0). If a model of big_vision scans over its blocks, each tensor under
Transformer/encoderblock holds the parameters of all blocks, stacked along axis 0.
"""

import re
from typing import Any

import torch
from torch import Tensor

from common.weights.renaming import RenameResult, Row, Table, rename, with_prefixes

# Prefixes of the image model's tensors. A file may also hold an optimizer's state, or a second model for text.
PREFIXES = ("opt/target/", "params/img/", "params/", "")


def _module_rows(leaf: str, *rows: Row) -> list[Row]:
    """Return rows of a rename table for modules with two tensors, `leaf` and bias.

    `leaf` is "kernel" for linear maps and convolutions, and "scale" for norms. `rows` are the modules' prefixes
    (theirs, ours).
    """
    pairs = (with_prefixes(theirs, ours, ((leaf, "weight"), ("bias", "bias"))) for theirs, ours in rows)
    return [row for pair in pairs for row in pair]


NAMES = Table(
    ("cls", "class_token"),
    ("{Transformer/posembed_input/|Transformer/|}pos_embedding", "positions"),
    *_module_rows("scale", ("Transformer/encoder_norm/", "encoder.norm.")),
    *_module_rows("kernel", ("embedding/", "patches."), ("pre_logits/", "representation."), ("head/", "head.")),
    *with_prefixes(
        "Transformer/encoderblock_{i}/",
        "encoder.blocks.{i}.",
        [
            *_module_rows("scale", ("LayerNorm_0/", "residuals.0.norm."), ("LayerNorm_{1|2}/", "residuals.1.norm.")),
            *_module_rows(
                "kernel",
                ("MultiHeadDotProductAttention_{0|1}/query/", "attention.q."),
                ("MultiHeadDotProductAttention_{0|1}/key/", "attention.k."),
                ("MultiHeadDotProductAttention_{0|1}/value/", "attention.v."),
                ("MultiHeadDotProductAttention_{0|1}/out/", "attention.out_proj."),
                ("MlpBlock_{0|3}/Dense_0/", "feed_forward.expand."),
                ("MlpBlock_{0|3}/Dense_1/", "feed_forward.contract."),
            ),
        ],
    ),
)
SCANNED_BLOCKS = "Transformer/encoderblock/"
# A pattern for the end of a tensor's name in our model, and the tensor's number of axes in a file. The first match
# decides.
AXIS_COUNTS = (
    (r"patches\.weight", 4),
    (r"class_token|positions|attention\.(q|k|v|out_proj)\.weight", 3),
    (r"attention\.[qkv]\.bias", 2),
    (r"bias|norm\.weight", 1),
    (r"weight", 2),
)


def rename_tensors(content: dict[str, Tensor]) -> RenameResult:
    """Convert the tensors of an .npz file to this project's names and axes.

    The converted patch embedding is (C, channels, p, p). Other matrices are (out, in), where the axes of heads and of
    channels in a head are joined into one. The head of a model of images and texts (`params/img/`) is left out, since
    it maps to a space shared with texts and not to classes.
    """
    parts = RenameResult({}, {}, [], [])
    prefix = find_prefix(content)
    for source, tensor in content.items():
        name = source.removeprefix(prefix)
        if not source.startswith(prefix) or (prefix == "params/img/" and name.startswith("head/")):
            parts.left_out.append(source)
            continue
        renamed = rename(_unstacked(name, tensor), NAMES.to_ours)
        if renamed.unknown or any(tensor.ndim != _axis_count(ours) for ours, tensor in renamed.tensors.items()):
            parts.unknown.append(source)
            continue
        for ours, block_tensor in renamed.tensors.items():
            parts.tensors[ours], parts.sources[ours] = _with_our_axes(ours, block_tensor), source
    return parts


def _unstacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Split a tensor of scanned blocks into one tensor for each block; any other tensor is returned unchanged."""
    if not name.startswith(SCANNED_BLOCKS) or not tensor.ndim:
        return {name: tensor}
    return {name.replace(SCANNED_BLOCKS, f"Transformer/encoderblock_{i}/"): block for i, block in enumerate(tensor)}


def find_prefix(content: dict[str, Any]) -> str:
    """Return the one of `PREFIXES` with which the names of the image model's tensors begin; "" if there is none."""
    return next((prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in content), "")


def head_count(content: dict[str, Any]) -> int | None:
    """Read the number of heads from the shape (C, heads, C/heads) of a query kernel; None if there is none."""
    kernels = (t for name, t in content.items() if name.endswith("query/kernel") and "Transformer/" in name)
    return next((int(kernel.shape[-2]) for kernel in kernels), None)


def sine_positions(height: int, width: int, channels: int) -> Tensor:
    """Compute the fixed positions of big_vision's models without learned positions: (height, width, channels).

    `channels` is a multiple of four. The four quarters of the channels hold sin x, cos x, sin y and cos y in this
    order, as in MoCo v3 (Chen et al. 2021, arXiv 2104.02057). The frequencies are a geometric sequence from 1 to
    1/10000, both included. `sine_2d` in common/nn/positions.py differs: its frequencies do not reach 1/10000, and its
    sines and cosines alternate.
    """
    quarter = channels // 4
    frequencies = 10000.0 ** -torch.linspace(0, 1, quarter, dtype=torch.float64)  # (C/4,)
    x = (torch.arange(width)[:, None] * frequencies).expand(height, -1, -1)  # (w, C/4) -> (h, w, C/4)
    y = (torch.arange(height)[:, None, None] * frequencies).expand(-1, width, -1)  # (h, 1, C/4) -> (h, w, C/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).float()


def _axis_count(ours: str) -> int:
    return next(count for pattern, count in AXIS_COUNTS if re.search(f"({pattern})$", ours))


def _with_our_axes(ours: str, tensor: Tensor) -> Tensor:
    if ours == "patches.weight":
        return tensor.permute(3, 2, 0, 1).contiguous()  # (p, p, channels, C) -> (C, channels, p, p)
    if re.search(r"attention\.[qkv]\.", ours):
        return tensor.flatten(-2).T.contiguous() if tensor.ndim == 3 else tensor.flatten()  # (C, h, C/h) -> (C, C)
    if ours.endswith("attention.out_proj.weight"):
        return tensor.flatten(0, 1).T.contiguous()  # (h, C/h, C) -> (C, C)
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor  # (in, out) -> (out, in)
