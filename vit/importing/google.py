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

from vit.importing.layouts import Parts

# What a file with more than the weights puts before them: an optimizer's state, or a second tower for texts.
PREFIXES = ("opt/target/", "params/img/", "params/", "")

# (theirs, ours): regular expressions of what a name begins with.
OUTSIDE = (
    (r"embedding/", "patches."),
    (r"cls", "class_token"),
    (r"(Transformer/(posembed_input/)?)?pos_embedding", "positions"),
    (r"Transformer/encoder_norm/", "encoder.norm."),
    (r"pre_logits/", "representation."),
    (r"head/", "head."),
)
INSIDE = (  # after a block's number
    (r"LayerNorm_0/", "residuals.0.norm."),
    (r"LayerNorm_[12]/", "residuals.1.norm."),
    (r"MultiHeadDotProductAttention_[01]/query/", "attention.q."),
    (r"MultiHeadDotProductAttention_[01]/key/", "attention.k."),
    (r"MultiHeadDotProductAttention_[01]/value/", "attention.v."),
    (r"MultiHeadDotProductAttention_[01]/out/", "attention.out_proj."),
    (r"MlpBlock_[03]/Dense_0/", "feed_forward.expand."),
    (r"MlpBlock_[03]/Dense_1/", "feed_forward.contract."),
)
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "": ""}
BLOCK = r"Transformer/encoderblock(_(\d+))?/"


def parts(content: dict[str, Any]) -> Parts:
    """Names and axes of an .npz in ours: channels last to channels first, (in, out) to (out, in), heads side by side.

    `params/img/` is the image tower of two; its head maps to the space of texts and not to classes, so it is left out.
    """
    found = Parts({}, {}, [], [])
    prefix = prefix_of(content)
    for whole, tensor in content.items():
        name = whole.removeprefix(prefix)
        outside = not whole.startswith(prefix) or (prefix == "params/img/" and name.startswith("head/"))
        if outside or not isinstance(tensor, Tensor):
            found.left_out.append(whole)
            continue
        block = re.match(BLOCK, name)
        ours = _renamed(INSIDE if block else OUTSIDE, name[block.end() :] if block else name)
        stacked = block is not None and block[1] is None
        if ours is None or tensor.ndim != _dimensions(ours, name) + stacked:
            found.unknown.append(whole)
            continue
        layers = enumerate(tensor) if stacked else [(int(block[2]) if block else 0, tensor)]
        for i, one in layers:
            place = f"encoder.blocks.{i}.{ours}" if block else ours
            found.tensors[place], found.names[place] = _turned(ours, one), whole
    return found


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


def _renamed(table: tuple[tuple[str, str], ...], name: str) -> str | None:
    for theirs, ours in table:
        match = re.fullmatch(rf"{theirs}(?P<leaf>kernel|scale|bias|)", name)
        if match and bool(match["leaf"]) == ours.endswith("."):
            return ours + LEAVES[match["leaf"]]
    return None


def _dimensions(ours: str, name: str) -> int:
    """How many axes the tensor must have."""
    joined = ours.startswith(("attention.q.", "attention.k.", "attention.v."))
    if name.endswith("kernel"):
        return 4 if ours.startswith("patches.") else 3 if joined or ours.startswith("attention.out") else 2
    return 3 if ours in ("class_token", "positions") else 2 if joined else 1


def _turned(ours: str, tensor: Tensor) -> Tensor:
    """One tensor in our axes."""
    if ours == "patches.weight":
        return tensor.permute(3, 2, 0, 1).contiguous()  # (p, p, channels, C) -> (C, channels, p, p)
    if ours.startswith(("attention.q.", "attention.k.", "attention.v.")):
        return tensor.flatten(-2).T.contiguous() if tensor.ndim == 3 else tensor.flatten()  # (C, h, C/h) -> (C, C)
    if ours == "attention.out_proj.weight":
        return tensor.flatten(0, 1).T.contiguous()  # (h, C/h, C) -> (C, C)
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor  # (in, out) -> (out, in)
