"""Compare our Swin Transformer with torchvision's or timm's, on weights from a file.

timm reads the files of the official code, too. The images are the smallest ones that whole windows fit in every stage,
because the other programs let tokens attend to padding.
"""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from common.errors import UserError
from common.task import Adopted
from scripts.verify.images import NORMALISATION, ForeignFile, Kind, Outputs, Peer, Size
from scripts.verify.peers import timm_outputs, torchvision_outputs
from vit.importing import swin as importing

MODEL = "vit.models.swin.Swin"


def _adopt(content: dict[str, Any], folder: Path, size: Size | None) -> Adopted:
    return importing.adopt(content, None)


def _tables(file: ForeignFile) -> list[list[Tensor]]:
    """Return the tables of relative position biases (2 h - 1, 2 w - 1, heads) of the blocks of each stage."""
    stages: dict[int, list[Tensor]] = {}
    for name, tensor in file.weights.items():
        if name.endswith("attention.table"):
            stages.setdefault(int(name.split(".")[1]), []).append(tensor)
    return [stages[number] for number in sorted(stages)]


def _windows(file: ForeignFile) -> list[int]:
    """Return the side of the windows of each stage, in tokens."""
    return [(len(tables[0]) + 1) // 2 for tables in _tables(file)]


def _maps(file: ForeignFile) -> list[int]:
    """Return the side of the map of each stage, in tokens, if the last map is one window."""
    windows = _windows(file)
    return [windows[-1] * 2 ** (len(windows) - 1 - stage) for stage in range(len(windows))]


def image_size(file: ForeignFile) -> Size:
    """Return the size of images whose last map is one window; raises UserError if earlier windows do not fit."""
    windows, maps = _windows(file), _maps(file)
    if any(side % window for side, window in zip(maps, windows, strict=True)):
        raise UserError(
            f"{file.path} has windows of {windows} tokens, which no image fits without padding, and the other programs "
            "attend to padding; so nothing can be compared."
        )
    side = maps[0] * file.weights["patches.weight"].shape[-1]
    return side, side


def required_options(file: ForeignFile) -> dict[str, Any]:
    """See Kind."""
    weights, tables, windows = file.weights, _tables(file), _windows(file)
    width = len(weights["patches.weight"])
    required: dict[str, Any] = {
        "patch_size": weights["patches.weight"].shape[-1],
        "width": width,
        "depths": [len(stage) for stage in tables],
        "heads": [stage[0].shape[-1] for stage in tables],
    }
    if [min(file.options["window"], side) for side in _maps(file)] != windows:
        required["window"] = max(windows)
    hidden = len(weights["stages.0.blocks.0.feed_forward.expand.weight"])
    if int(width * file.options["mlp_ratio"]) != hidden:
        required["mlp_ratio"] = hidden / width
    return required


def _torchvision(file: ForeignFile, size: Size, images: Tensor) -> Outputs:
    from torchvision.models.swin_transformer import SwinTransformer

    options = file.options
    model = SwinTransformer(
        *([options["patch_size"]] * 2, options["width"], options["depths"], options["heads"], [options["window"]] * 2),
        mlp_ratio=options["mlp_ratio"],
        stochastic_depth_prob=0.0,
        num_classes=file.classes or 1,
        norm_layer=partial(nn.LayerNorm, eps=options["blocks"]["norm_eps"]),
    )
    return torchvision_outputs(model, file, images, "head")


def _timm(file: ForeignFile, size: Size, images: Tensor) -> Outputs:
    from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn

    options = file.options
    model = SwinTransformer(
        img_size=size,
        patch_size=options["patch_size"],
        in_chans=file.channels,
        num_classes=file.classes,
        embed_dim=options["width"],
        depths=options["depths"],
        num_heads=options["heads"],
        window_size=options["window"],
        mlp_ratio=options["mlp_ratio"],
        drop_path_rate=0.0,
        norm_layer=partial(nn.LayerNorm, eps=options["blocks"]["norm_eps"]),
    )
    return timm_outputs(model, checkpoint_filter_fn(file.used_tensors, model), images)


KIND = Kind(
    adopt=_adopt,
    recognise=importing.recognise,
    peers={
        "official": Peer("timm", _timm),
        "timm": Peer("timm", _timm),
        "torchvision": Peer("torchvision", _torchvision),
    },
    required_options=required_options,
    undecided=("blocks.norm_eps",),
    image_size=image_size,
    notes=lambda file: [NORMALISATION],
)
