"""Import of ViT files of torchvision, timm (with DeiT, MAE and DINOv2), transformers and Google (.npz).

Tensors get this project's names and shapes; the model computes the same function. The projections of queries, keys and
values are joined into one matrix, with zeros for missing biases. The positions of registers are added to the registers.
A model with a class token and mean pooling (MAE's fine-tuned files, by their `fc_norm`) pools without the class token,
so this token becomes a register.

Differs: a file does not contain the following options, in which the programs differ. They must be set in the config.
- Google's models approximate GELU by tanh (`model.blocks.activation=gelu_tanh`) and take images scaled to [-1, 1], with
  mean and std 0.5. Most copies of these models in timm and transformers take such images, too, but compute exact GELU.
  torchvision, DeiT and DINOv2 normalise by ImageNet's statistics.
- transformers' default config has eps 1e-12 in its norms, all others have 1e-6 (`model.blocks.norm_eps`).
- The number of heads: usually 64 channels to a head, but not in H/14 (80) or in test models.
- Pooling by class token or by mean (`model.pooling`), if a file has a class token and a final norm.
- Post-norm: in timm's `rpn` models, norms after the sub-layers have the same names as norms before them elsewhere.
- The height and width of the grid of positions: files hold a table of rows. If the grid of the config's image size has
  as many positions as the file, it is taken, and a square grid otherwise; if both fit, a note says which was taken.
- The method of resampling positions to another grid (`model.positions.resample`); a note names the other program's.

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
from vit.importing.layouts import LAYOUTS, LEFT_OUT

GOOGLE = "google"
LAYOUT_PATTERNS = (
    *((rf"^{layout.pattern}", name) for name, layout in LAYOUTS.items()),
    (r"(^|/)embedding/kernel$", GOOGLE),
)

# Keys under which training programs store weights. The first that holds weights is used, the others are left out.
WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema")
SUPPORTED_FILES = "a ViT of torchvision, timm, transformers or Google as published"
REQUIRED_IN_EACH_BLOCK = tuple(
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
IN_ALL_BLOCKS_OR_NONE = (
    tuple(f"attention.{part}.{leaf}" for part in ("q_norm", "k_norm") for leaf in ("weight", "bias")),
    ("residuals.0.scale", "residuals.1.scale"),
)
GOOGLE_NOTE = (
    "Google's models need model.blocks.activation=gelu_tanh data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5], which the "
    "file does not say"
)
GATED_VIT = "a ViT with gated feed-forwards (SwiGLU)"

# Patterns of tensor names, each with the unsupported model that it identifies; the first that matches decides.
UNSUPPORTED_PATTERNS = (
    (r"dist_token|distillation_token", "a distilled DeiT, with a token and a head of its own for the teacher"),
    (r"sampling_offsets|query_embed|query_position_embeddings|^queries\.|class_labels_classifier", "a DETR"),
    (r"^(backbone\.body|rpn|roi_heads)\.", "a detector of torchvision"),
    (r"decoder_embed|decoder_blocks|decoder\.decoder_|^decoder\.0\.", "a masked autoencoder with its decoder"),
    (r"patch_embed\.backbone|patch_embeddings\.backbone|conv_root/|conv_proj\.conv_", "a hybrid of ResNet and ViT"),
    (r"^(swin\w*\.|layers\.\d+\.blocks\.|features\.\d+\.\d+\.attn|features\.\d+\.reduction)", "a Swin Transformer"),
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
    """Import a file's weights, and its classes: `classes` if the head has as many, else "class 0", "class 1", ...

    Weights are bare or under one of the keys `WRAPPERS`. If a file has no head, the weights have none, and the classes
    are `classes`, or none. `image_size` is that of the config, (H, W) in pixels. It decides the grid of positions if
    their number fits, and the grid of the fixed positions that big_vision's files omit. Raises UserError for an
    unsupported file, and names its format if it is recognised.
    """
    tensors, left_out = unwrap(content)
    layout = recognise(tensors)
    in_fp32 = floats(tensors)  # before positions are added to tokens, since half types would round the sums
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
    if len(first) != second.shape[1]:  # the first matrix also holds a gate, although its name is that of a plain ViT
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
    if "head.weight" in weights:
        notes += _order_note(len(weights["head.weight"]), classes)
    return Adopted(weights, {"classes": _class_names(weights, classes)}, left_out, tuple(notes))


def recognise(tensors: dict[str, Any]) -> str:
    """The layout of a file's unwrapped tensors: torchvision, timm, transformers or google.

    Raises UserError for any other layout.
    """
    layout = identify_format(tensors, LAYOUT_PATTERNS)
    if layout:
        return layout
    raise UserError(_refusal(tensors, f"it has {next(iter(tensors))}, and no patch embedding of a supported layout"))


def unwrap(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A file's tensors without wrappers and prefixes, and the names of its other content; see common/weights."""
    return unwrapping.unwrap(content, WRAPPERS, SUPPORTED_FILES)


def _width(parts: dict[str, Tensor]) -> int:
    return len(parts["patches.weight"])


def _missing(parts: dict[str, Tensor]) -> str | None:
    """A description of the first tensor that a complete ViT needs and `parts` lacks; None when none is missing."""
    numbers = [int(name.split(".")[2]) for name in parts if name.startswith("encoder.blocks.")]
    blocks = [f"encoder.blocks.{i}." for i in range(max(numbers, default=0) + 1)]
    in_block = [*REQUIRED_IN_EACH_BLOCK]
    for group in IN_ALL_BLOCKS_OR_NONE:
        if any(name.endswith(group) for name in parts):
            in_block += group
    norm = "pooled_norm" if "pooled_norm.weight" in parts else "encoder.norm"
    required = ["patches.weight", "patches.bias"]
    required += [f"{block}{name}" for block in blocks for name in in_block] + [f"{norm}.weight", f"{norm}.bias"]
    if not {"positions", "positions.grid"} & parts.keys():
        return "no learned positions"
    return next((f"nothing for {name}" for name in required if name not in parts), None)


def _configured_grid(parts: dict[str, Tensor], image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns of patches in an image of the config's size; None without a size, or without patches."""
    if image_size is None or "patches.weight" not in parts:
        return None
    side = parts["patches.weight"].shape[-1]
    return image_size[0] // side, image_size[1] // side


def _with_our_shapes(
    parts: dict[str, Tensor], configured: tuple[int, int] | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Tokens and positions in this project's shapes, and notes on how the positions were read.

    The shapes are: class token (C,), registers (R, C), positions (h, w, C). `configured`: the config's grid of patches.
    """
    weights, notes = dict(parts), list[str]()
    token = weights.pop("class_token").flatten() if "class_token" in weights else None  # (1, 1, C) -> (C,)
    registers = weights.pop("registers", torch.empty(0)).reshape(-1, _width(parts))  # (1, R, C) -> (R, C)
    if "positions" in weights:
        rows = weights.pop("positions").flatten(0, -2)  # (1, N, C) -> (N, C)
        before, grid, notes = positions.read_grid(len(rows), token is not None, len(registers), configured)
        weights["positions.grid"] = rows[before:].reshape(*grid, -1)  # (hw, C) -> (h, w, C)
        if token is not None and before:
            weights["positions.token"] = rows[0]
        if len(registers) and before == (token is not None) + len(registers):
            registers = registers + rows[before - len(registers) : before]
    if token is not None and "pooled_norm.weight" in weights:  # mean pooling, which omits the class token
        token = token + weights.pop("positions.token", torch.zeros(()))
        registers, token = torch.cat([token[None], registers]), None
    if token is not None:
        weights["class_token"] = token
    if len(registers):
        weights["registers"] = registers
    return weights, notes


def _unused_tensors(weights: dict[str, Tensor], layout: str) -> list[str]:
    """Names of renamed tensors that the model does not use.

    A classifier of transformers does not use the pooler. A head with another width than the pooled features does not
    fit, such as DINOv2's, which reads the concatenation of class token and mean.
    """
    names = []
    if layout == "transformers" and "head.weight" in weights:
        names += [name for name in weights if name.startswith("representation.")]
    hidden = weights.get("representation.weight") if not names else None
    width = _width(weights) if hidden is None else len(hidden)
    if "head.weight" in weights and weights["head.weight"].shape[1] != width:
        names += [name for name in weights if name.startswith("head.")]
    return names


def _class_names(weights: dict[str, Tensor], classes: list[str] | None) -> list[str]:
    if "head.weight" not in weights:
        return [*classes] if classes else []
    count = len(weights["head.weight"])
    return [*classes] if classes and len(classes) == count else [f"class {i}" for i in range(count)]


def _order_note(count: int, classes: list[str] | None) -> list[str]:
    """A note on the order of classes that is assumed for a file's head; none if the data have another number."""
    if classes and len(classes) != count:
        return []
    names = (
        f": {', '.join(classes[:3])}{', ...' if count > 3 else ''}" if classes else ", as data.class_order sorts them"
    )
    return [f"the file does not name its {count} classes; they are taken to have the order of the data's{names}"]


def _refusal(tensors: dict[str, Any], reason: str, what: str | None = None) -> str:
    what = what or identify_format(tensors, UNSUPPORTED_PATTERNS) or "something else"
    supported = f"{SUPPORTED_FILES}, or a file that this program wrote"
    return f"The checkpoint is {what} and not a plain ViT ({reason}); give {supported}."
