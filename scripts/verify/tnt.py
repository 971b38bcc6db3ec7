"""Compare our TNT with timm's, on weights from a file of timm or of the authors, which timm reads, too."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.task import Adopted
from scripts.verify.images import NORMALISATION, ForeignFile, Kind, Outputs, Peer, Size
from scripts.verify.peers import timm_outputs
from vit.importing import tnt as importing

MODEL = "vit.models.tnt.Tnt"


def _adopt(content: dict[str, Any], folder: Path, size: Size | None) -> Adopted:
    return importing.adopt(content, None, size or (224, 224))  # the size of the published files


def _recognise(tensors: dict[str, Tensor]) -> str | None:
    if not importing.recognises(tensors):
        return None
    return "official" if "inner_pos" in tensors else "timm"


def image_size(file: ForeignFile) -> Size:
    """Return the size of images with the same grid of patches as the file's positions."""
    rows, columns, _ = file.weights["positions.grid"].shape
    return rows * file.options["patch_size"], columns * file.options["patch_size"]


def required_options(file: ForeignFile) -> dict[str, Any]:
    """See Kind. timm's model has the exact GELU, and neither a layer scale nor norms of queries and keys."""
    weights, options = file.weights, file.options
    words, inner_width = weights["word_positions"].shape
    required = {
        "width": len(weights["class_token"]),
        "layers": sum(name.startswith("updates.") and name.endswith(".projection.weight") for name in weights),
        "feedforward": len(weights["encoder.blocks.0.feed_forward.expand.weight"]),
        "inner.width": inner_width,
        "inner.feedforward": len(weights["inner.blocks.0.feed_forward.expand.weight"]),
        "pooling": "token",
        "positions.on_token": True,
        "blocks.activation": "gelu",
        "blocks.layer_scale": None,
        "blocks.qk_norm": False,
    }
    side = math.isqrt(words)
    if math.ceil(options["patch_size"] / options["word_stride"]) != side:
        required["word_stride"] = math.ceil(options["patch_size"] / side)
    return required


def _timm(file: ForeignFile, size: Size, images: Tensor) -> Outputs:
    from timm.models.tnt import TNT, checkpoint_filter_fn

    options, inner = file.options, file.options["inner"]
    model = TNT(
        img_size=size,
        patch_size=options["patch_size"],
        in_chans=file.channels,
        num_classes=file.classes,
        embed_dim=options["width"],
        inner_dim=inner["width"],
        depth=options["layers"],
        num_heads_inner=inner["heads"],
        num_heads_outer=options["heads"],
        mlp_ratio=options["feedforward"] / options["width"],
        first_stride=options["word_stride"],
        norm_layer=partial(nn.LayerNorm, eps=options["blocks"]["norm_eps"]),
    )
    return timm_outputs(model, checkpoint_filter_fn(file.used_tensors, model), images)


KIND = Kind(
    adopt=_adopt,
    recognise=_recognise,
    peers={"official": Peer("timm", _timm), "timm": Peer("timm", _timm)},
    required_options=required_options,
    undecided=("patch_size", "word_stride", "heads", "inner.heads", "blocks.norm_eps"),
    image_size=image_size,
    notes=lambda file: [NORMALISATION],
)
