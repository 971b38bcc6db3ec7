"""ViT in torchvision, timm and transformers, with the weights of ours (Dosovitskiy et al. 2021, arXiv 2010.11929).

The presets that users name (`vit_b_16`, `vit_base_patch16_224`, `ViTForImageClassification`) are nothing but sizes,
which are taken here from our config.
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
from scripts.benchmarks.drawing import redraw
from vit.importing.layouts import LAYOUTS
from vit.models.classifier import Classifier

CLASSES = 1000  # ImageNet's

PEERS = tuple(LAYOUTS)


def config(model: str, *, tiny: bool, side: int | None = None) -> dict[str, Any]:
    """A preset and its recipe as `train.py model=...` takes them; with `tiny` two narrow layers and images of 32.

    With `side` images have as many pixels each way.
    """
    small = ["model.width=64", "model.heads=4", "model.layers=2", "model.feedforward=128", "data.image_size=[32,32]"]
    sized = [f"data.image_size=[{side},{side}]"] if side else []
    return configure("train", [f"model={model}", *(small if tiny else []), *sized])


def classifier(recipe: dict[str, Any]) -> Classifier:
    """Ours, with every tensor drawn at random."""
    size = tuple(recipe["data"]["image_size"])
    model: Classifier = build(recipe["model"], classes=CLASSES, channels=3, image_size=size)
    redraw(model)
    return model


def in_layout(ours: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Our parameters, or what belongs to each of them (its gradient), under a peer's names and in its shapes."""
    token, grid = ours["positions.token"], ours["positions.grid"]
    rest = {name: tensor for name, tensor in ours.items() if not name.startswith("positions.")}
    rest["positions"] = torch.cat((token[None], grid.flatten(0, 1)))[None]  # (C,), (h, w, C) -> (1, 1 + hw, C)
    rest["class_token"] = rest["class_token"][None, None]  # (C,) -> (1, 1, C)
    apart = projections.split(rest) if layout == "transformers" else rest
    return rename(apart, LAYOUTS[layout].names.to_theirs).tensors


def peer(layout: str, model: Classifier, recipe: dict[str, Any]) -> nn.Module:
    """Theirs, with our weights, and attention by PyTorch's fused kernel as all three document it."""
    sizes, side = recipe["model"], recipe["data"]["image_size"][0]
    width, layers, heads, hidden = (sizes[key] for key in ("width", "layers", "heads", "feedforward"))
    theirs: nn.Module
    if layout == "torchvision":
        theirs = TorchvisionTransformer(side, sizes["patch_size"], layers, heads, width, hidden, num_classes=CLASSES)
    elif layout == "timm":
        theirs = TimmTransformer(
            img_size=side,
            patch_size=sizes["patch_size"],
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            mlp_ratio=hidden / width,
            num_classes=CLASSES,
        )
        assert use_fused_attn(), "the environment's TIMM_FUSED_ATTN switches off timm's fast kernel"
    else:
        options = ViTConfig(
            image_size=side,
            patch_size=sizes["patch_size"],
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=hidden,
            layer_norm_eps=sizes["blocks"]["norm_eps"],  # its own default differs
            num_labels=CLASSES,
        )
        theirs = AutoModelForImageClassification.from_config(options, attn_implementation="sdpa")
    theirs.load_state_dict(in_layout(dict(model.named_parameters()), layout))
    return theirs
