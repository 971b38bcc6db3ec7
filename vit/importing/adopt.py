"""Import ViT checkpoints of torchvision, timm (with DeiT, MAE and DINOv2), transformers and Google (.npz).

Tensors get this project's names and shapes, and the model computes the same function. The projections of queries, keys
and values are joined into one matrix, with zeros for missing biases. If a file has position embeddings for registers,
they are added to the registers. MAE's fine-tuned models, which are recognised by `fc_norm`, have a class token but pool
the mean of the patches without it. In the imported model, the class token becomes a register.

Differs: the programs differ in the following points, which the import does not read from a file. The first six must be
set in the config. For the last three, the import makes an assumption.
- GELU: Google's models approximate it by tanh (`model.blocks.activation=gelu_tanh`). Most copies of them in timm and
  transformers compute it exactly.
- Normalisation (`data.mean`, `data.std`): Google's models and their copies take images scaled to [-1, 1], that is, with
  mean and std 0.5. torchvision, DeiT and DINOv2 normalise by ImageNet's statistics.
- Epsilon of the norms (`model.blocks.norm_eps`): 1e-12 by default in transformers, and 1e-6 in the other programs.
- The number of heads (`model.heads`): a head usually has 64 channels, but 80 in H/14, and any number in small models
  made for tests.
- Pooling by class token or by mean (`model.pooling`), if the file has a class token and a final norm.
- The method of resampling positions to another grid (`model.positions.resample`): a note tells which method the other
  program uses.
- The height and width of the grid of positions: a file holds a table with a row per position, but not these two
  numbers. If the grid of the config's image size has as many positions as the table, this grid is assumed, and
  otherwise a square grid. If both are possible, a note tells which was assumed.
- The place of the norms: a file does not tell whether norms are before or after the sub-layers. They are assumed to be
  before the sub-layers, which is wrong for timm's `rpn` models.
- The order of the classes: it is assumed to be that of the data, and a note says so.

`scripts/verify_import.py` compares the logits of an imported model with those of the other program.
"""

from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import projections, unwrapping
from common.weights.renaming import identify_format, rename
from common.weights.unwrapping import floats
from vit.importing import google, positions
from vit.importing.classes import with_classes
from vit.importing.layouts import LAYOUTS, LEFT_OUT, REQUIRED_IN_EACH_BLOCK

GOOGLE = "google"
LAYOUT_PATTERNS = (
    *((rf"^{layout.pattern}", name) for name, layout in LAYOUTS.items()),
    (r"(^|/)embedding/kernel$", GOOGLE),
)

# Keys under which training programs store weights. The first key that holds weights is used; the others are left out.
WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
SUPPORTED_FILES = "a ViT of torchvision, timm, transformers or Google as published"
IN_ALL_BLOCKS_OR_NONE = (
    tuple(f"attention.{part}.{leaf}" for part in ("q_norm", "k_norm") for leaf in ("weight", "bias")),
    ("residuals.0.scale", "residuals.1.scale"),
)
GOOGLE_NOTE = (
    "Google's models need model.blocks.activation=gelu_tanh data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5], which the "
    "file does not say"
)
GATED_VIT = "a ViT with gated feed-forwards (SwiGLU)"

# Patterns of tensor names, each with the unsupported model that it identifies; the first pattern that matches decides.
UNSUPPORTED_PATTERNS = (
    (r"dist_token|distillation_token", "a distilled DeiT without the head of its distillation token"),
    (r"sampling_offsets|query_embed|query_position_embeddings|^queries\.|class_labels_classifier", "a DETR"),
    (r"^(backbone\.body|rpn|roi_heads)\.", "a detector of torchvision"),
    (r"^decoder\.0\.", "a masked autoencoder with another decoder (SimMIM)"),
    (r"patch_embed\.backbone|patch_embeddings\.backbone|conv_root/|conv_proj\.conv_", "a hybrid of ResNet and ViT"),
    (r"cpb_mlp\.", "a Swin Transformer V2"),
    (r"^swin\w*\.", "a Swin Transformer in transformers' layout"),
    (r"^(layers\.\d+\.blocks\.|features\.\d+\.\d+\.attn|features\.\d+\.reduction)", "a Swin Transformer"),
    (r"relative_position_bias|rel_pos|attn\.[qv]_bias$", "a BEiT or another ViT with relative positions"),
    (r"attn_pool\.|MAPHead_\d/|(^|[./])probe$", "a ViT that pools by attention (MAP, as SigLIP)"),
    (r"norm_pre\.|ln_pre\.|pre_layrnorm|^visual\.|^vision_model\.", "a CLIP, with a norm before its blocks"),
    (r"mlp\.(w12|w1|w2|w3|fc1_g|gate_proj|weights_in)\.", GATED_VIT),
    (r"pixel_embed|inner_attn|attn_in\.", "a TNT"),
    (r"^layer4\.0\.|^stages\.\d|^resnet[./]|(^|/)root_block/|^stage\d|^block4/unit", "a ResNet"),
    (r"MixerBlock|mlp_tokens", "an MLP-Mixer"),
    (r"rope|periods|freqs", "a ViT with rotary positions"),
    (r"(^|\.)decoder\.|encoder_attn|cross_attention|embed_tokens|(^|[./])wte", "a language model or a translator"),
    (r"^encoder\.blocks\.\d+\.attention\.in_proj", "bare weights of this program's own, without their config"),
)


def adopt(content: dict[str, Any], classes: list[str] | None, image_size: tuple[int, int] | None = None) -> Adopted:
    """Convert the content of another program's file to the weights and class names of our model.

    Files of other networks are recognised by `vit.importing.formats.adopt`.

    Args:
        content: the file's tensors by name, or a dict that holds them under a key such as those in `WRAPPERS`.
        classes: names of the data's classes; None if unknown. If the file's head has as many outputs as there are
            names, or if the file has no head, these names become the model's classes. The classes of any other head are
            named "class 0", "class 1", ... Without a head and without names, the list of classes is empty.
        image_size: (H, W) of the config in pixels; None if unknown. If an image of this size has as many patches as the
            file has positions, its grid of patches is assumed to be the file's grid. For big_vision's files without
            positions, fixed positions are computed for this grid.

    Raises UserError for an unsupported file; the message names the format if it is recognised.
    """
    tensors, left_out = unwrap(content)
    layout = recognise(tensors)
    in_fp32 = floats(tensors)  # before positions are added to tokens, since fp16 and bf16 would round the sums
    parts = (
        google.rename_tensors(in_fp32) if layout == GOOGLE else rename(in_fp32, LAYOUTS[layout].names.to_ours, LEFT_OUT)
    )
    if parts.unknown:
        name = parts.unknown[0]
        raise UserError(_refusal(tensors, f"it has {name} {tuple(tensors[name].shape)}, which a plain ViT lacks"))
    joined = projections.join(parts.tensors, zero_biases=True)
    grid = _configured_grid(joined, image_size)
    if layout == GOOGLE and grid and "positions" not in joined:
        joined["positions.grid"] = google.sine_positions(*grid, _width(joined))
    missing = _missing(joined)
    if missing:
        raise UserError(_refusal(tensors, f"it has {missing}"))
    first, second = (joined[f"encoder.blocks.0.feed_forward.{part}.weight"] for part in ("expand", "contract"))
    if len(first) != second.shape[1]:  # the first matrix also holds a gate, although it has the name of a plain ViT's
        reason = f"its feed-forwards expand to {len(first)} channels and contract from {second.shape[1]}"
        raise UserError(_refusal(tensors, reason, GATED_VIT))
    weights, notes = _with_our_shapes(joined, grid)
    if layout == GOOGLE:
        notes.append(GOOGLE_NOTE)
    if grid and weights["positions.grid"].shape[:2] != grid:
        notes.append(positions.method_note(tensors, layout))
    unused = _unused_tensors(weights, layout)
    weights = {name: tensor for name, tensor in weights.items() if name not in unused}
    left_out += parts.left_out + [parts.sources[name] for name in unused]
    return with_classes(weights, classes, left_out, notes)


def recognise(tensors: dict[str, Any]) -> str:
    """Return the layout of a file's unwrapped tensors: "torchvision", "timm", "transformers" or "google".

    Raises UserError for any other layout.
    """
    layout = identify_format(tensors, LAYOUT_PATTERNS)
    if layout:
        return layout
    raise UserError(_refusal(tensors, f"it has {next(iter(tensors))}, and no patch embedding of a supported layout"))


def unwrap(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a file's tensors without wrappers and prefixes, and the keys of the content that is left out.

    See `common.weights.unwrapping.unwrap`.
    """
    return unwrapping.unwrap(content, WRAPPERS, SUPPORTED_FILES)


def _width(parts: dict[str, Tensor]) -> int:
    return len(parts["patches.weight"])


def _missing(parts: dict[str, Tensor]) -> str | None:
    """Describe the first tensor that a complete ViT needs and `parts` lacks; returns None if none is missing."""
    numbers = [int(name.split(".")[2]) for name in parts if name.startswith("encoder.blocks.")]
    blocks = [f"encoder.blocks.{i}." for i in range(max(numbers, default=0) + 1)]
    in_block = [*REQUIRED_IN_EACH_BLOCK]
    for group in IN_ALL_BLOCKS_OR_NONE:
        if any(name.endswith(group) for name in parts):
            in_block += group
    norm = "pooled_norm" if "pooled_norm.weight" in parts else "encoder.norm"
    required = ["patches.weight", "patches.bias"]
    required += [f"{block}{name}" for block in blocks for name in in_block] + [f"{norm}.weight", f"{norm}.bias"]
    if "distillation_token" in parts and "head.weight" in parts:
        required += ["distillation_head.weight", "distillation_head.bias"]
    if not {"positions", "positions.grid"} & parts.keys():
        return "no learned positions"
    return next((f"nothing for {name}" for name in required if name not in parts), None)


def _configured_grid(parts: dict[str, Tensor], image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the rows and columns of patches in an image of the config's size.

    Returns None if `image_size` is None or `parts` has no patch embedding.
    """
    if image_size is None or "patches.weight" not in parts:
        return None
    side = parts["patches.weight"].shape[-1]
    return image_size[0] // side, image_size[1] // side


def _with_our_shapes(
    parts: dict[str, Tensor], configured: tuple[int, int] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Convert tokens and positions to this project's shapes; returns all weights, and notes on the positions.

    The shapes are (C,) for the class token, the distillation token and their positions, (R, C) for registers, and
    (h, w, C) for the positions of patches. `configured` is the grid of patches for the config's image size, or None if
    unknown. The notes tell how an ambiguous table of positions was read.
    """
    weights, notes = dict(parts), list[str]()
    token = weights.pop("class_token").flatten() if "class_token" in weights else None  # (1, 1, C) -> (C,)
    distillation = weights.pop("distillation_token").flatten() if "distillation_token" in weights else None
    tokens = (token is not None) + (distillation is not None)
    registers = weights.pop("registers", torch.empty(0)).reshape(-1, _width(parts))  # (1, R, C) -> (R, C)
    if "positions" in weights:
        rows = weights.pop("positions").flatten(0, -2)  # (1, N, C) -> (N, C)
        before, grid, notes = positions.read_grid(len(rows), tokens, len(registers), configured)
        weights["positions.grid"] = rows[before:].reshape(*grid, -1)  # (hw, C) -> (h, w, C)
        if token is not None and before:
            weights["positions.token"] = rows[0]
        if distillation is not None and before:
            weights["distillation_position"] = rows[1]
        if len(registers) and before == tokens + len(registers):
            registers = registers + rows[before - len(registers) : before]
    if token is not None and "pooled_norm.weight" in weights:  # the model pools the mean of the patches
        token = token + weights.pop("positions.token", torch.zeros(()))
        registers, token = torch.cat([token[None], registers]), None
    if token is not None:
        weights["class_token"] = token
    if distillation is not None:
        weights["distillation_token"] = distillation
    if len(registers):
        weights["registers"] = registers
    return weights, notes


def _unused_tensors(weights: dict[str, Tensor], layout: str) -> list[str]:
    """Return the names in `weights` of the tensors that the model does not use.

    transformers' classifiers do not use the pooler ("representation"). A head cannot be used if its input width differs
    from the width of the features that our model passes to it. DINOv2's head, for example, takes the concatenation of
    class token and mean.
    """
    names = []
    if layout == "transformers" and "head.weight" in weights:
        names += [name for name in weights if name.startswith("representation.")]
    hidden = weights.get("representation.weight") if not names else None
    width = _width(weights) if hidden is None else len(hidden)
    if "head.weight" in weights and weights["head.weight"].shape[1] != width:
        names += [name for name in weights if name.startswith("head.")]
    return names


def _refusal(tensors: dict[str, Any], reason: str, what: str | None = None) -> str:
    what = what or identify_format(tensors, UNSUPPORTED_PATTERNS) or "something else"
    supported = f"{SUPPORTED_FILES}, or a file that this program wrote"
    return f"The checkpoint is {what} and not a plain ViT ({reason}); give {supported}."
