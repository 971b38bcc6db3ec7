"""ViT files of other programs in our names: torchvision, timm (with DeiT, MAE and DINOv2), transformers, Google's .npz.

Every tensor keeps its meaning; what is written otherwise elsewhere is brought to our form without a change of the
function. Three matrices for queries, keys and values become one, and a missing bias of theirs becomes zeros; position
rows of registers are added to the registers; a class token that nothing but attention reads, since the mean of the
patches is pooled (MAE's fine-tuned files: `fc_norm`), becomes a register.

Differs: what a file does not say must stand in the config, and differs between the programs.
- Google's models approximate GELU by tanh (`model.blocks.activation=gelu_tanh`) and see images scaled to [-1, 1], mean
  and std 0.5 (as do most of timm's and transformers' copies of them, with exact GELU); torchvision, DeiT and DINOv2
  normalise by ImageNet's statistics.
- transformers' default config divides with eps 1e-12 in its norms, all others with 1e-6 (`model.blocks.norm_eps`).
- The number of heads. 64 channels to a head are usual, but not in H/14 (80) or in test models.
- Class token or mean (`model.pooling`), where a file has a class token and a norm; norms after the sub-layers (timm's
  `rpn` models) have the names of norms before them. `scripts/verify_import.py` compares the logits.
- The grid of positions: files hold a number of rows and not the grid's sides, so it is taken as square.
"""

import math
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import projections, unwrapping
from common.weights.renaming import identify_format, rename
from common.weights.unwrapping import floats
from vit.importing import google
from vit.importing.layouts import LAYOUTS, LEFT_OUT

GOOGLE = "google"
SIGNS = (*((rf"^{layout.sign}", name) for name, layout in LAYOUTS.items()), (r"(^|/)embedding/kernel$", GOOGLE))

# Where training programs put the weights; the first that holds any is taken, and the others are listed.
WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
TAKEN = "a ViT of torchvision, timm, transformers or Google as published"
IN_EACH_BLOCK = tuple(
    f"{part}.{leaf}"
    for part in (
        "attention.in_proj",
        "attention.out_proj",
        "feed_forward.expand",
        "feed_forward.contract",
        "residuals.0.norm",
        "residuals.1.norm",
    )
    for leaf in ("weight", "bias")
)
# Each of these is in all blocks, or in none.
IN_ALL_OR_NONE = (
    tuple(f"attention.{part}.{leaf}" for part in ("q_norm", "k_norm") for leaf in ("weight", "bias")),
    ("residuals.0.scale", "residuals.1.scale"),
)
GATED = "a ViT with gated feed-forwards (SwiGLU)"

# Patterns of names that tell what a file is instead; the first that matches decides.
OTHERS = (
    (r"dist_token|distillation_token", "a distilled DeiT, with a token and a head of its own for the teacher"),
    (r"sampling_offsets|query_embed|query_position_embeddings|^queries\.|class_labels_classifier", "a DETR"),
    (r"^(backbone\.body|rpn|roi_heads)\.", "a detector of torchvision"),
    (r"decoder_embed|decoder_blocks|decoder\.decoder_|^decoder\.0\.", "a masked autoencoder with its decoder"),
    (r"patch_embed\.backbone|patch_embeddings\.backbone|conv_root/|conv_proj\.conv_", "a hybrid of ResNet and ViT"),
    (r"^(swin\w*\.|layers\.\d+\.blocks\.|features\.\d+\.\d+\.attn|features\.\d+\.reduction)", "a Swin Transformer"),
    (r"relative_position_bias|rel_pos|attn\.[qv]_bias$", "a BEiT or another ViT with relative positions"),
    (r"attn_pool\.|MAPHead_\d/|(^|[./])probe$", "a ViT that pools by attention (MAP, as SigLIP)"),
    (r"norm_pre\.|ln_pre\.|pre_layrnorm|^visual\.|^vision_model\.", "a CLIP, with a norm before its blocks"),
    (r"mlp\.(w12|w1|w2|w3|fc1_g|gate_proj|weights_in)\.", GATED),
    (r"pixel_embed|inner_attn|attn_in\.", "a TNT"),
    (r"^layer4\.0\.|^stages\.\d|^resnet[./]|(^|/)root_block/|^stage\d|^block4/unit", "a ResNet"),
    (r"MixerBlock|mlp_tokens", "an MLP-Mixer"),
    (r"rope|periods|freqs", "a ViT with rotary positions"),
    (r"(^|\.)decoder\.|encoder_attn|cross_attention|embed_tokens|(^|[./])wte", "a language model or a translator"),
    (r"^encoder\.blocks\.\d+\.attention\.in_proj", "bare weights of this program's own, without their config"),
)


def adopt(content: dict[str, Any], classes: list[str] | None, image_size: tuple[int, int] | None = None) -> Adopted:
    """A foreign file's weights in our names, and its classes: `classes` if there are as many, else "class 0" and so on.

    Takes bare weights and those under "model", "state_dict" or "model_ema". A file without a head gives none, and names
    no classes but `classes`. `image_size` (H, W) is for the files that have fixed positions and do not hold them
    (big_vision's), which are then made for it. Raises UserError for any other file, saying what it is.
    """
    tensors, left_out = unwrap(content)
    layout = recognise(tensors)
    raised = floats(tensors)  # so that the sums below lose nothing
    parts = google.parts(raised) if layout == GOOGLE else rename(raised, LAYOUTS[layout].names.to_ours, LEFT_OUT)
    if parts.unknown:
        name = parts.unknown[0]
        raise UserError(_refusal(tensors, f"it has {name} {tuple(tensors[name].shape)}, which a plain ViT has not"))
    joined = projections.join(parts.tensors, zero_biases=True)
    if layout == GOOGLE and image_size and "positions" not in joined and "patches.weight" in joined:
        side = joined["patches.weight"].shape[-1]
        joined["positions.grid"] = google.sines(image_size[0] // side, image_size[1] // side, _width(joined))
    missing = _missing(joined)
    if missing:
        raise UserError(_refusal(tensors, f"it has {missing}"))
    first, second = (joined[f"encoder.blocks.0.feed_forward.{part}.weight"] for part in ("expand", "contract"))
    if len(first) != second.shape[1]:  # two maps packed in one, under a plain one's name
        reason = f"its feed-forwards expand to {len(first)} channels and contract from {second.shape[1]}"
        raise UserError(_refusal(tensors, reason, GATED))
    weights = _placed(joined)
    useless = _useless(weights, layout)
    weights = {name: tensor for name, tensor in weights.items() if name not in useless}
    left_out += parts.left_out + [parts.sources[name] for name in useless]
    return Adopted(weights, {"classes": _named(weights, classes)}, left_out)


def recognise(tensors: dict[str, Any]) -> str:
    """The layout of a file's weights (see `unwrap`): torchvision, timm, transformers or google."""
    layout = identify_format(tensors, SIGNS)
    if layout:
        return layout
    raise UserError(_refusal(tensors, f"it has {next(iter(tensors))}, and no patches in any of their layouts"))


def unwrap(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A file's weights under their plain names, and what was beside them; see common.weights.unwrapping."""
    return unwrapping.unwrap(content, WRAPPERS, TAKEN)


def _width(parts: dict[str, Tensor]) -> int:
    return len(parts["patches.weight"])


def _missing(parts: dict[str, Tensor]) -> str | None:
    """The first thing that a whole ViT has and these have not."""
    numbers = [int(name.split(".")[2]) for name in parts if name.startswith("encoder.blocks.")]
    blocks = [f"encoder.blocks.{i}." for i in range(max(numbers, default=0) + 1)]
    inside = [*IN_EACH_BLOCK]
    for group in IN_ALL_OR_NONE:
        if any(name.endswith(group) for name in parts):
            inside += group
    norm = "pooled_norm" if "pooled_norm.weight" in parts else "encoder.norm"
    required = ["patches.weight", "patches.bias"]
    required += [f"{block}{name}" for block in blocks for name in inside] + [f"{norm}.weight", f"{norm}.bias"]
    if not {"positions", "positions.grid"} & parts.keys():
        return "no learned positions"
    return next((f"nothing for {name}" for name in required if name not in parts), None)


def _placed(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tokens and positions in our shapes: (C,) the class token, (R, C) registers, (h, w, C) the grid."""
    weights = dict(parts)
    token = weights.pop("class_token").flatten() if "class_token" in weights else None  # (1, 1, C) -> (C,)
    registers = weights.pop("registers", torch.empty(0)).reshape(-1, _width(parts))  # (1, R, C) -> (R, C)
    if "positions" in weights:
        rows = weights.pop("positions").flatten(0, -2)  # (1, N, C) -> (N, C)
        before, side = _square(len(rows), token is not None, len(registers))
        weights["positions.grid"] = rows[before:].reshape(side, side, -1)  # (hw, C) -> (h, w, C)
        if token is not None and before:
            weights["positions.token"] = rows[0]
        if len(registers) and before == (token is not None) + len(registers):
            registers = registers + rows[before - len(registers) : before]
    if token is not None and "pooled_norm.weight" in weights:  # the mean of the patches leaves the class token out
        token = token + weights.pop("positions.token", torch.zeros(()))
        registers, token = torch.cat([token[None], registers]), None
    if token is not None:
        weights["class_token"] = token
    if len(registers):
        weights["registers"] = registers
    return weights


def _square(rows: int, token: bool, registers: int) -> tuple[int, int]:
    """How many of a table's rows belong to the tokens before the patches, and the side of the square that is left.

    None of them have a row, the class token has one, or all have; the first two cannot both leave a square.
    """
    sides = {before: math.isqrt(rows - before) for before in (0, int(token), token + registers) if rows > before}
    grids = {before: side for before, side in sides.items() if side * side == rows - before}
    if len(grids) == 1:
        return next(iter(grids.items()))
    tokens = f"{'a class token' if token else 'no class token'} and {registers} registers"
    problem = "do not leave a square grid" if not grids else "leave more than one square grid"
    raise UserError(
        f"The checkpoint has {rows} positions and {tokens}, which {problem}; files of other programs do not say their "
        "grid, so only square ones can be imported: bring the positions to a square grid there before you save."
    )


def _useless(weights: dict[str, Tensor], layout: str) -> list[str]:
    """Tensors that have a name of ours and no part in our function.

    Beside a classifier, transformers' pooler is not used. A head on something else than the summary that we pool (such
    as DINOv2's, on the class token and the mean side by side) has another width.
    """
    names = []
    if layout == "transformers" and "head.weight" in weights:
        names += [name for name in weights if name.startswith("representation.")]
    hidden = weights.get("representation.weight") if not names else None
    width = _width(weights) if hidden is None else len(hidden)
    if "head.weight" in weights and weights["head.weight"].shape[1] != width:
        names += [name for name in weights if name.startswith("head.")]
    return names


def _named(weights: dict[str, Tensor], classes: list[str] | None) -> list[str]:
    if "head.weight" not in weights:
        return [*classes] if classes else []
    count = len(weights["head.weight"])
    return [*classes] if classes and len(classes) == count else [f"class {i}" for i in range(count)]


def _refusal(tensors: dict[str, Any], reason: str, what: str | None = None) -> str:
    what = what or identify_format(tensors, OTHERS) or "something else"
    return f"The checkpoint is {what} and not a plain ViT ({reason}); give {TAKEN}, or a file that this program wrote."
