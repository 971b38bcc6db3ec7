"""Import ResNet classifiers of torchvision, and of timm where the names and the network are the same (He et al. 2015).

Our tensors have torchvision's names, except that the head is `head` instead of `fc`. Files of earlier versions of
PyTorch lack the counters of batch norms, which are then zero; nothing reads them.

Differs: timm's variants with the same names and shapes but another network, such as resnetblur50, cannot be recognised.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

from common.errors import UserError
from common.task import Adopted
from common.weights.unwrapping import floats
from vit.importing.adopt import unwrap
from vit.importing.classes import with_classes

SUPPORTED_FILES = "a ResNet of torchvision as published"
CONVOLUTION = r"(conv1|layer\d+\.\d+\.(conv\d|downsample\.0))\.weight"
NORM = r"(bn1|layer\d+\.\d+\.(bn\d|downsample\.1))\.(weight|bias|running_mean|running_var|num_batches_tracked)"
NAMES = re.compile(f"{CONVOLUTION}|{NORM}|fc\\.(weight|bias)")


def recognises(names: Iterable[str]) -> bool:
    """Whether these are tensor names of a ResNet of torchvision or timm, and not of a detector with such a backbone."""
    return "layer1.0.conv1.weight" in names


def adopt(content: dict[str, Any], classes: list[str] | None) -> Adopted:
    """Rename the tensors of another program's file to ours; the arguments are those of `vit.importing.adopt.adopt`.

    Raises UserError if the file has a tensor that a ResNet of torchvision lacks, such as those of a deep stem or of
    squeeze-and-excitation.
    """
    tensors, left_out = unwrap(content)
    tensors = floats(tensors)
    unknown = next((name for name in tensors if not NAMES.fullmatch(name)), None)
    if unknown:
        raise UserError(
            f"The checkpoint is a variant of a ResNet (it has {unknown}, which ResNet-18, 34 and 50 lack); give "
            f"{SUPPORTED_FILES}, or a file that this program wrote."
        )
    weights = {re.sub(r"^fc\.", "head.", name): tensor for name, tensor in tensors.items()}
    for name in [name for name in weights if name.endswith("running_mean")]:
        weights.setdefault(f"{name.removesuffix('running_mean')}num_batches_tracked", torch.tensor(0))
    return with_classes(weights, classes, left_out)
