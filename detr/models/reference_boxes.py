"""Reference points and boxes: their sine encodings, and boxes predicted relative to them.

Zhu et al. 2021, "Deformable DETR", arXiv 2010.04159, appendix A.3 and A.4. All places are relative to the image.
"""

import math

import torch
from torch import Tensor

from common.nn.positions import sine


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)), where x and 1 - x are at least `eps`; x is clamped to [0, 1]."""
    x = x.clamp(0, 1)
    return (x.clamp(min=eps) / (1 - x).clamp(min=eps)).log()


def boxes_from(deltas: Tensor, references: Tensor, eps: float = 1e-5) -> Tensor:
    """Predict boxes cxcywh (..., 4) from a head's outputs (..., 4) and references: points (..., 2) or boxes (..., 4).

    The inverse sigmoid of the reference is added to the outputs before the sigmoid. A point changes only the centre, so
    width and height are then predicted without a reference.
    """
    logits = inverse_sigmoid(references, eps)
    if logits.shape[-1] == 2:
        logits = torch.cat((logits, torch.zeros_like(logits)), -1)
    return (deltas + logits).sigmoid()


def encode_boxes(boxes: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Sine encodings of boxes in [0, 1]: (..., 4) -> (..., 4 width), those of each coordinate after one another."""
    return sine(2 * math.pi * boxes, width, temperature).flatten(-2)
