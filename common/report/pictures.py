"""Stack pictures into a batch for the log, and write pictures to files."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import to_pil_image


def pad_and_stack(pictures: Sequence[Tensor]) -> Tensor:
    """Stack pictures uint8 (3, H, W) of any size into (B, 3, Hmax, Wmax), with black padding at bottom and right."""
    height = max(picture.shape[-2] for picture in pictures)
    width = max(picture.shape[-1] for picture in pictures)
    return torch.stack([pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2])) for p in pictures])


def write_picture(picture: Tensor, file: Path) -> None:
    """Write a picture uint8 (3, H, W) in the format that the suffix of `file` names; creates the folder of `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(picture).save(file, quality=95)
