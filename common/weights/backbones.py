"""Load a backbone's weights from torchvision, or from a file of torchvision, of official DETR or of our detectors."""

import sys
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import checkpoint, download
from common.weights import values
from common.weights.unwrapping import unwrap

# Prefixes of a backbone's tensors in files of our CNN detectors, of torchvision's, of official DETR, and of our others.
PREFIXES = ("net.backbone.body.", "backbone.body.", "backbone.0.body.", "backbone.")
IMAGENET = {"vgg16": "IMAGENET1K_FEATURES"}  # torchvision's name of the weights; IMAGENET1K_V1 for all ResNets


class WeightsOptions(Protocol):
    """The name of a backbone in torchvision, and its weights; see `common.nn.resnet.BackboneOptions`."""

    @property
    def name(self) -> str:
        """The name of torchvision's function that builds the backbone, or "small"."""

    @property
    def weights(self) -> str:
        """The path of a file, or one of the words "none" and "imagenet_v1"."""


def load_weights(backbone: nn.Module, options: WeightsOptions) -> list[str]:
    """Load weights into `backbone`: torchvision's ImageNet weights, or a file that `options.weights` names.

    The file has the tensor names of torchvision, of official DETR or of our detectors. `options.weights` must not be
    "none". Returns a list with one warning if some values are not finite, otherwise an empty list. Raises UserError
    when the weights cannot be downloaded or read, or when a tensor is missing or has another shape or kind of numbers.
    """
    if options.weights == "imagenet_v1":
        tensors = _download(options.name)
    else:
        tensors = _read(Path(options.weights).expanduser())
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    state = backbone.state_dict()
    mismatches = [key for key, value in state.items() if key not in tensors or tensors[key].shape != value.shape]
    if mismatches:
        raise UserError(
            f"{options.weights} does not match model.backbone.name={options.name}: {len(mismatches)} tensors are"
            f" missing or of another shape, the first is {mismatches[0]}; name the backbone that the file holds."
        )
    values.refuse_other_kinds(backbone, tensors, Path(options.weights))
    backbone.load_state_dict({key: tensors[key] for key in state})
    return values.non_finite_note(backbone.state_dict())


def _read(path: Path) -> dict[str, Tensor]:
    content = checkpoint.load(path)
    try:
        return unwrap(content, ("model",), "a ResNet of torchvision or an official DETR", ("model", "net"))[0]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _download(name: str) -> dict[str, Tensor]:
    if name == "small":
        raise UserError(
            "model.backbone.weights=imagenet_v1 exists for the ResNets, not for small; give "
            "model.backbone.weights=none."
        )
    from torchvision.models import get_model_weights

    address = get_model_weights(name)[IMAGENET.get(name, "IMAGENET1K_V1")].url
    path = Path(torch.hub.get_dir(), "checkpoints", address.rpartition("/")[2])  # torchvision's own cache
    if not path.exists():
        digits = path.stem.rpartition("-")[2]  # first digits of the SHA-256: 0676ba61 in resnet50-0676ba61.pth
        try:
            download.fetch(address, path, digits, report=lambda line: print(line, file=sys.stderr))
        except download.DownloadError as error:
            raise UserError(
                f"The ImageNet weights of {name} are missing: {str(error).rstrip('.')}, give its path as "
                "model.backbone.weights=FILE, or train without it by model.backbone.weights=none."
            ) from error
    return _read(path)
