"""Google's .npz files (vit_jax and big_vision; Dosovitskiy et al. 2021, arXiv 2010.11929) with our names and axes.

Both write the trees of the same Flax modules with "/" between the levels, but not under the same names. Positions lie
in Transformer/posembed_input (vit_jax), in Transformer (big_vision until 2022) or at the top. What Flax once numbered
per block (LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3) it numbers per kind today (LayerNorm_1,
MlpBlock_0). A big_vision model that scans over its blocks stacks them along axis 0 under Transformer/encoderblock.
"""

import re
from typing import Any

import torch
from torch import Tensor

from common.weights.renaming import RenameResult, Row, Table, rename, with_prefixes

# What a file with more than the weights puts before them: an optimizer's state, or a second tower for texts.
PREFIXES = ("opt/target/", "params/img/", "params/", "")


def _with(leaf: str, *rows: Row) -> list[Row]:
    """Rows of modules as rows of their matrix (a Dense's kernel, a norm's scale) and their bias."""
    pairs = (with_prefixes(theirs, ours, ((leaf, "weight"), ("bias", "bias"))) for theirs, ours in rows)
    return [row for pair in pairs for row in pair]


NAMES = Table(
    ("cls", "class_token"),
    ("{Transformer/posembed_input/|Transformer/|}pos_embedding", "positions"),
    *_with("scale", ("Transformer/encoder_norm/", "encoder.norm.")),
    *_with("kernel", ("embedding/", "patches."), ("pre_logits/", "representation."), ("head/", "head.")),
    *with_prefixes(
        "Transformer/encoderblock_{i}/",
        "encoder.blocks.{i}.",
        [
            *_with("scale", ("LayerNorm_0/", "residuals.0.norm."), ("LayerNorm_{1|2}/", "residuals.1.norm.")),
            *_with(
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
SCANNED = "Transformer/encoderblock/"
# How many axes a tensor has, by the end of our name; the first pattern decides.
AXES = (
    (r"patches\.weight", 4),
    (r"class_token|positions|attention\.(q|k|v|out_proj)\.weight", 3),
    (r"attention\.[qkv]\.bias", 2),
    (r"bias|norm\.weight", 1),
    (r"weight", 2),
)


def parts(content: dict[str, Tensor]) -> RenameResult:
    """Names and axes of an .npz in ours: channels last to channels first, (in, out) to (out, in), heads side by side.

    `params/img/` is the image tower of two; its head maps to the space of texts and not to classes, so it is left out.
    """
    parts = RenameResult({}, {}, [], [])
    prefix = prefix_of(content)
    for source, tensor in content.items():
        name = source.removeprefix(prefix)
        if not source.startswith(prefix) or (prefix == "params/img/" and name.startswith("head/")):
            parts.left_out.append(source)
            continue
        renamed = rename(_unstacked(name, tensor), NAMES.to_ours)
        if renamed.unknown or any(tensor.ndim != _axes(ours) for ours, tensor in renamed.tensors.items()):
            parts.unknown.append(source)
            continue
        for ours, layer in renamed.tensors.items():
            parts.tensors[ours], parts.sources[ours] = _with_our_axes(ours, layer), source
    return parts


def _unstacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor of scanned blocks as one of each block; any other as it is."""
    if not name.startswith(SCANNED) or not tensor.ndim:
        return {name: tensor}
    return {name.replace(SCANNED, f"Transformer/encoderblock_{i}/"): layer for i, layer in enumerate(tensor)}


def prefix_of(content: dict[str, Any]) -> str:
    """What the names of the image model's tensors begin with."""
    return next((prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in content), "")


def heads(content: dict[str, Any]) -> int | None:
    """The number of heads, which the shape (C, heads, C/heads) of a kernel tells; None without such a kernel."""
    kernels = (t for name, t in content.items() if name.endswith("query/kernel") and "Transformer/" in name)
    return next((int(kernel.shape[-2]) for kernel in kernels), None)


def sines(height: int, width: int, channels: int) -> Tensor:
    """The fixed positions of big_vision's models without learned ones: (height, width, channels), a multiple of four.

    A quarter of the channels each: sin x, cos x, sin y, cos y at frequencies from 1 down to 1/10000, the last included
    (as MoCo v3: Chen et al. 2021, arXiv 2104.02057; that of common/nn/positions.py leaves it out and mixes the four).
    """
    quarter = channels // 4
    frequencies = 10000.0 ** -torch.linspace(0, 1, quarter, dtype=torch.float64)  # (C/4,)
    x = (torch.arange(width)[:, None] * frequencies).expand(height, -1, -1)  # (w, C/4) -> (h, w, C/4)
    y = (torch.arange(height)[:, None, None] * frequencies).expand(-1, width, -1)  # (h, 1, C/4) -> (h, w, C/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).float()


def _axes(ours: str) -> int:
    return next(count for pattern, count in AXES if re.search(f"({pattern})$", ours))


def _with_our_axes(ours: str, tensor: Tensor) -> Tensor:
    if ours == "patches.weight":
        return tensor.permute(3, 2, 0, 1).contiguous()  # (p, p, channels, C) -> (C, channels, p, p)
    if re.search(r"attention\.[qkv]\.", ours):
        return tensor.flatten(-2).T.contiguous() if tensor.ndim == 3 else tensor.flatten()  # (C, h, C/h) -> (C, C)
    if ours.endswith("attention.out_proj.weight"):
        return tensor.flatten(0, 1).T.contiguous()  # (h, C/h, C) -> (C, C)
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor  # (in, out) -> (out, in)
