"""Compare our ViT with that of another program, on weights from a file of that program.

The layout of the file decides which program's model is the peer; for Google's .npz files, it is timm's. The images have
as many patches as the file has position embeddings for patches. If the file has no position embeddings, the images have
the config's size.
"""

from pathlib import Path
from typing import Any

from common.task import Adopted
from scripts.verify.classifier_peers import PEERS
from scripts.verify.comparison import option
from scripts.verify.images import NORMALISATION, ForeignFile, Kind, Size
from vit.importing import adopt as importing
from vit.importing import google

MODEL = "vit.models.classifier.Classifier"


def _adopt(content: dict[str, Any], folder: Path, size: Size | None) -> Adopted:
    return importing.adopt(content, None, size)


def patch_grid_size(file: ForeignFile) -> Size:
    """Return the size of images with the same grid of patches as the file's positions."""
    rows, columns, _ = file.weights["positions.grid"].shape
    side = file.weights["patches.weight"].shape[-1]
    return rows * side, columns * side


def required_options(file: ForeignFile) -> dict[str, Any]:
    """See Kind.

    The number of heads and the activation are known only for Google's files: their tensors have a dimension for the
    heads, and all of Google's models have the same activation.
    """
    weights, first = file.weights, "encoder.blocks.0."
    width = len(weights["patches.weight"])
    pooling = "token" if "class_token" in weights else "mean"
    required = {
        "patch_size": weights["patches.weight"].shape[-1],
        "width": width,
        "layers": sum(name.endswith("in_proj.weight") for name in weights),
        "feedforward": len(weights[f"{first}feed_forward.expand.weight"]),
        "pooling": "mean_then_norm" if "pooled_norm.weight" in weights else pooling,
        "registers": len(weights.get("registers", ())),
        "distillation_token": "distillation_token" in weights,
        "blocks.qk_norm": f"{first}attention.q_norm.weight" in weights,
    }
    if pooling == "token":
        required["positions.on_token"] = "positions.token" in weights
    if file.classes:
        required["representation"] = (
            len(weights["representation.weight"]) if "representation.weight" in weights else None
        )
    scaled = f"{first}residuals.0.scale" in weights
    if scaled != (option(file.options, "blocks.layer_scale") is not None):
        required["blocks.layer_scale"] = 1e-5 if scaled else None  # an initial value, which loading overwrites
    if file.layout == importing.GOOGLE:
        required["heads"] = google.head_count(file.tensors)
        required["blocks.activation"] = "gelu_tanh"
    return required


def notes(file: ForeignFile) -> list[str]:
    """Return sentences for the report about what the comparison does not cover."""
    lines = [NORMALISATION]
    if file.layout == importing.GOOGLE:
        lines.append("Google's models take images in [-1, 1]: data.mean and data.std must be 0.5 for each channel")
    if file.layout == "transformers":
        lines.append("transformers' default norm_eps is 1e-12; a config.json of the file holds norm_eps and activation")
    if file.layout == "timm":
        lines.append(
            "timm's models with norms after the sub-layers (rpn) have the same tensor names but are different models"
        )
    if "positions.grid" in file.weights and not any("pos" in name for name in file.tensors):
        lines.append("the file holds no positions, since they are fixed; both models have those that we compute")
    if file.options["representation"] and PEERS[file.layout].package == "timm":
        lines.append("timm no longer has a representation layer, so neither that layer nor the head was compared")
    if not file.classes:
        lines.append("the file holds no head that fits ours; a run that starts from it initialises a new head")
    return lines


KIND = Kind(
    adopt=_adopt,
    recognise=importing.recognise,
    peers=PEERS,
    required_options=required_options,
    undecided=("heads", "blocks.activation", "blocks.norm_eps"),
    image_size=patch_grid_size,
    notes=notes,
)
