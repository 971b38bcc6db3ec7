"""Compare our ResNet with torchvision's, on weights from a file of torchvision, or of timm with the same names."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from common.task import Adopted
from scripts.verify.images import NORMALISATION, ForeignFile, Kind, Outputs, Peer, Size
from scripts.verify.peers import torchvision_outputs
from vit.importing import resnet as importing

MODEL = "vit.models.resnet.ResNet"
IMAGE_SIZE = (96, 64)  # a ResNet takes images of any size
NOTE = (
    "timm has variants with the same names and shapes but another network, such as resnetblur50, which are not noticed"
)


def _adopt(content: dict[str, Any], folder: Path, size: Size | None) -> Adopted:
    return importing.adopt(content, None)


def required_options(file: ForeignFile) -> dict[str, Any]:
    """See Kind."""
    weights = file.weights
    stages = sorted({match[1] for name in weights if (match := re.match(r"layer(\d+)\.", name))}, key=int)
    return {
        "stem": "large" if weights["conv1.weight"].shape[-1] == 7 else "small",
        "block": "bottleneck" if "layer1.0.conv3.weight" in weights else "basic",
        "blocks": [
            sum(name.startswith(f"layer{s}.") and name.endswith("conv1.weight") for name in weights) for s in stages
        ],
        "widths": [len(weights[f"layer{s}.0.conv1.weight"]) for s in stages],
        "norm": "batch",
    }


def _torchvision(file: ForeignFile, size: Size, images: Tensor) -> Outputs:
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    options = file.options
    block = Bottleneck if options["block"] == "bottleneck" else BasicBlock
    model = ResNet(block, options["blocks"], num_classes=file.classes or 1)
    return torchvision_outputs(model, file, images, "fc")


KIND = Kind(
    adopt=_adopt,
    recognise=lambda tensors: "torchvision" if importing.recognises(tensors) else None,
    peers={"torchvision": Peer("torchvision", _torchvision)},
    required_options=required_options,
    undecided=(),
    image_size=lambda file: IMAGE_SIZE,
    notes=lambda file: [NOTE, NORMALISATION],
)
