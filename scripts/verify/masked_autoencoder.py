"""Compare our masked autoencoder with transformers', on weights from a file of transformers or of the authors.

The authors' tensors are renamed for transformers independently of our import.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.task import Adopted
from common.weights.renaming import Table, with_prefixes
from scripts.verify.classifier import patch_grid_size
from scripts.verify.images import IMAGES, NORMALISATION, SEED, ForeignFile, Kind, Outputs, Peer, Size, sample_images
from scripts.verify.peers import from_pretrained
from vit.importing import masked_autoencoder as importing
from vit.importing.adopt import recognise

MODEL = "vit.models.masked_autoencoder.MaskedAutoencoder"
SHARE = 0.75  # of the patches, masked
BLOCK = (
    ("norm1.", "layernorm_before."),
    ("attn.qkv.", "attention.qkv."),
    ("attn.proj.", "attention.o_proj."),
    ("norm2.", "layernorm_after."),
    ("mlp.fc1.", "mlp.fc1."),
    ("mlp.fc2.", "mlp.fc2."),
)
AUTHORS = Table(  # (the authors', transformers')
    ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    ("norm.", "vit.layernorm."),
    *with_prefixes("blocks.{i}.", "vit.layers.{i}.", BLOCK),
    ("mask_token", "decoder.mask_token"),
    *((f"decoder_{name}", f"decoder.decoder_{name}") for name in ("embed.", "pos_embed", "norm.", "pred.")),
    *with_prefixes("decoder_blocks.{i}.", "decoder.decoder_layers.{i}.", BLOCK),
)


def _adopt(content: dict[str, Any], folder: Path, size: Size | None) -> Adopted:
    return importing.adopt(content, size)


def _has_decoder(file: ForeignFile) -> bool:
    return "pixels.weight" in file.weights


def required_options(file: ForeignFile) -> dict[str, Any]:
    """See Kind."""
    weights, required = file.weights, {"patch_size": file.weights["patches.weight"].shape[-1]}
    parts = {"": ("encoder", "encoder.norm.weight")}
    if _has_decoder(file):
        parts["decoder."] = ("decoder", "decoder.norm.weight")
    for prefix, (stack, norm) in parts.items():
        maps = [name for name in weights if name.startswith(f"{stack}.") and name.endswith("expand.weight")]
        required |= {f"{prefix}width": len(weights[norm]), f"{prefix}layers": len(maps)}
        required[f"{prefix}feedforward"] = len(weights[maps[0]])
    return required


def _arguments(file: ForeignFile, size: Size) -> dict[str, Any]:
    return {"channels": file.channels, "image_size": size}


def _inputs(file: ForeignFile, size: Size) -> tuple[Tensor, ...]:
    """Sample images, and the noise (B, N) of which the smallest values select the visible patches."""
    rows, columns, _ = file.weights["positions.grid"].shape
    noise = torch.rand(IMAGES, rows * columns, generator=torch.Generator().manual_seed(SEED))
    return (*sample_images(file, size), noise)


def _outputs(model: Any, images: Tensor, noise: Tensor) -> Outputs:
    visible = noise.argsort(dim=1)[:, : int(noise.shape[1] * (1 - SHARE))]
    return {"features": model.encode(images, visible), "pixels": model(images, visible)}


def _transformers(file: ForeignFile, size: Size, images: Tensor, noise: Tensor) -> Outputs:
    from transformers import ViTMAEConfig

    options, decoder = file.options, file.options["decoder"]
    config = ViTMAEConfig(
        hidden_size=options["width"],
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        intermediate_size=options["feedforward"],
        layer_norm_eps=options["norm_eps"],
        image_size=list(size),
        patch_size=options["patch_size"],
        num_channels=file.channels,
        decoder_hidden_size=decoder["width"],
        decoder_num_hidden_layers=decoder["layers"],
        decoder_num_attention_heads=decoder["heads"],
        decoder_intermediate_size=decoder["feedforward"],
        mask_ratio=SHARE,
    )
    tensors = file.used_tensors if file.layout == "transformers" else _as_transformers(file.used_tensors)
    if not _has_decoder(file):
        model = from_pretrained("ViTMAEModel", config, tensors)
        return {"features": model(images, noise=noise).last_hidden_state}
    model = from_pretrained("ViTMAEForPreTraining", config, tensors)
    features = model.vit(images, noise=noise).last_hidden_state
    return {"features": features, "pixels": model(images, noise=noise).logits}


def _as_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the authors' tensors to transformers' names, with three matrices for queries, keys and values."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        theirs = AUTHORS.to_ours(name)
        if theirs is None:
            raise KeyError(name)
        parts = [theirs.replace("qkv", f"{part}_proj") for part in "qkv"] if ".qkv." in theirs else [theirs]
        state |= dict(zip(parts, tensor.chunk(len(parts)), strict=True))
    return state


KIND = Kind(
    adopt=_adopt,
    recognise=lambda tensors: "authors" if recognise(tensors) == "timm" else "transformers",
    peers={layout: Peer("transformers", _transformers) for layout in ("authors", "transformers")},
    required_options=required_options,
    undecided=("heads", "decoder.heads", "norm_eps"),
    image_size=patch_grid_size,
    notes=lambda file: [NORMALISATION],
    arguments=_arguments,
    inputs=_inputs,
    outputs=_outputs,
)
