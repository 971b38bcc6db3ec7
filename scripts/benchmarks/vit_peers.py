"""ViT in torchvision, timm and transformers, with our model's weights (Dosovitskiy et al. 2021, arXiv 2010.11929).

The models are built with the hyperparameters of our config. The libraries' presets (`vit_b_16`, `vit_base_patch16_224`)
are not needed, because they only set hyperparameters.
"""

from typing import Any

import torch
from timm.layers import use_fused_attn
from timm.models import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionTransformer
from transformers import AutoModelForImageClassification, ViTConfig

from common.config.check import build
from common.config.compose import configure
from common.weights import projections
from common.weights.renaming import rename
from scripts.benchmarks.drawing import randomise_parameters
from vit.importing.layouts import LAYOUTS
from vit.models.classifier import Classifier

CLASSES = 1000  # ImageNet's

PEERS = tuple(LAYOUTS)  # "torchvision", "timm" and "transformers"


def config(model: str, *, tiny: bool, side: int | None = None) -> dict[str, Any]:
    """Compose the config of `train.py model=MODEL`, where MODEL is `model`.

    With `tiny`, the model has two layers of width 64 and takes images of 32 x 32 pixels. With `side`, it takes images
    of `side` x `side` pixels, with or without `tiny`.
    """
    tiny_keys = [
        "model.width=64",
        "model.heads=4",
        "model.layers=2",
        "model.feedforward=128",
        "data.image_size=[32,32]",
    ]
    side_keys = [f"data.image_size=[{side},{side}]"] if side else []
    return configure("train", [f"model={model}", *(tiny_keys if tiny else []), *side_keys])


def classifier(recipe: dict[str, Any]) -> Classifier:
    """Build our classifier from the config `recipe` (see `config`), with random values in every parameter."""
    size = tuple(recipe["data"]["image_size"])
    model: Classifier = build(recipe["model"], classes=CLASSES, channels=3, image_size=size)
    randomise_parameters(model)
    return model


def to_layout(ours: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Convert our parameters, or a dict of their gradients, to names and shapes of the library `layout` (see PEERS)."""
    token, grid = ours["positions.token"], ours["positions.grid"]
    tensors = {name: tensor for name, tensor in ours.items() if not name.startswith("positions.")}
    tensors["positions"] = torch.cat((token[None], grid.flatten(0, 1)))[None]  # (C,), (h, w, C) -> (1, 1 + hw, C)
    tensors["class_token"] = tensors["class_token"][None, None]  # (C,) -> (1, 1, C)
    tensors = projections.split(tensors) if layout == "transformers" else tensors
    return rename(tensors, LAYOUTS[layout].names.to_theirs).tensors


def peer(layout: str, model: Classifier, recipe: dict[str, Any]) -> nn.Module:
    """Build the model of the library `layout` with the weights of our `model` and PyTorch's fused attention.

    `layout` is one of PEERS, and `recipe` is the config of `model`.
    """
    options, side = recipe["model"], recipe["data"]["image_size"][0]
    width, depth, heads, hidden = (options[key] for key in ("width", "layers", "heads", "feedforward"))
    theirs: nn.Module
    if layout == "torchvision":
        theirs = TorchvisionTransformer(side, options["patch_size"], depth, heads, width, hidden, num_classes=CLASSES)
    elif layout == "timm":
        theirs = TimmTransformer(
            img_size=side,
            patch_size=options["patch_size"],
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=hidden / width,
            num_classes=CLASSES,
        )
        assert use_fused_attn(), "the environment variable TIMM_FUSED_ATTN disables timm's fused attention"
    else:
        config = ViTConfig(
            image_size=side,
            patch_size=options["patch_size"],
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=hidden,
            layer_norm_eps=options["blocks"]["norm_eps"],  # transformers' default differs
            num_labels=CLASSES,
        )
        theirs = AutoModelForImageClassification.from_config(config, attn_implementation="sdpa")
    theirs.load_state_dict(to_layout(dict(model.named_parameters()), layout))
    return theirs
