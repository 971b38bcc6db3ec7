"""Swin Transformers of torchvision and timm with our model's weights (Liu et al. 2021, arXiv 2103.14030)."""

from typing import Any

from timm.models.swin_transformer import SwinTransformer as TimmTransformer
from timm.models.swin_transformer import WindowAttention
from torch import nn
from torchvision.models import SwinTransformer as TorchvisionTransformer

from common.config.check import build
from common.config.compose import configure
from scripts.benchmarks.drawing import randomise_parameters
from scripts.benchmarks.vit_peers import CLASSES
from vit.importing.swin import to_layout
from vit.models.swin import Swin

# Each contender's layout of tensors, and whether it calls PyTorch's fused attention.
PEERS = {"torchvision": ("torchvision", False), "timm": ("timm", False), "timm fused": ("timm", True)}


def config(*, tiny: bool) -> dict[str, Any]:
    """Compose the config of `train.py model=swin_t` without stochastic depth.

    With `tiny`, the model has two stages of width 32 and 64 and takes images of 32 x 32 pixels.
    """
    tiny_keys = [
        "model.width=32",
        "model.depths=[2,2]",
        "model.heads=[2,4]",
        "model.window=4",
        "data.image_size=[32,32]",
    ]
    return configure("train", ["model=swin_t", "model.blocks.drop_path=0.0", *(tiny_keys if tiny else [])])


def classifier(recipe: dict[str, Any]) -> Swin:
    """Build our classifier from the config `recipe` (see `config`), with random values in every parameter."""
    size = tuple(recipe["data"]["image_size"])
    model: Swin = build(recipe["model"], classes=CLASSES, channels=3, image_size=size)
    randomise_parameters(model)
    return model


def peer(name: str, model: Swin, recipe: dict[str, Any]) -> nn.Module:
    """Build the contender `name` (see PEERS) with the weights of our `model`; `recipe` is the config of `model`."""
    options, side = recipe["model"], recipe["data"]["image_size"][0]
    patch, window, (layout, fused) = options["patch_size"], options["window"], PEERS[name]
    shape = {"embed_dim": options["width"], "depths": options["depths"], "num_heads": options["heads"]}
    rest = {"mlp_ratio": options["mlp_ratio"], "num_classes": CLASSES}
    theirs: nn.Module
    if layout == "torchvision":
        theirs = TorchvisionTransformer(
            [patch] * 2, window_size=[window] * 2, stochastic_depth_prob=0.0, **shape, **rest
        )
    else:
        theirs = TimmTransformer(
            img_size=side, patch_size=patch, window_size=window, drop_path_rate=0.0, **shape, **rest
        )
    for module in theirs.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = fused
    constants = {key: value for key, value in theirs.state_dict().items() if key.endswith("position_index")}
    theirs.load_state_dict(to_layout(dict(model.named_parameters()), layout) | constants)
    return theirs
