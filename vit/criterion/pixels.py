"""The losses of image GPT: cross-entropy of pixels, of all of them or of the masked ones (Chen et al. 2020, section 2).

The masked objective is that of BERT (Devlin et al. 2019, arXiv 1810.04805).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.machine.seeds import generator
from common.types import Fraction, NonNegativeFloat, Range


@dataclass(frozen=True, kw_only=True)
class PixelLossOptions:
    """Options of the loss, which is generation * L_pixels + classification * L_classes.

    objective: "autoregressive" (each pixel from those before it) or "masked" (masked pixels from all others).
    masked: probability that a pixel is masked, for the masked objective.
    generation: weight of the pixels' cross-entropy. It is averaged over all pixels or, with "masked", over the masked
        pixels of each image and then over images, as in the authors' code.
    classification: weight of the cross-entropy of the images' classes, averaged over images; 0 = no classifier.
    smoothing: the fraction of each class target's probability that is spread evenly over all classes.
    """

    objective: Literal["autoregressive", "masked"]
    masked: Annotated[float, Range(low=0.001, high=0.999)]
    generation: NonNegativeFloat
    classification: NonNegativeFloat
    smoothing: Fraction

    def __post_init__(self) -> None:
        """Raise UserError if both weights are 0."""
        if not self.generation + self.classification:
            raise UserError(
                "task.loss.generation=0 and task.loss.classification=0 leave no loss; give one of them a weight, "
                "such as task.loss.generation=1."
            )


def sample_masks(seeds: Sequence[int | str], pixels: int, probability: float) -> Tensor:
    """Sample which pixels of each image are masked: boolean (B, N) on the CPU, for B `seeds` and N `pixels`.

    Each image's mask depends on its own seed alone.
    """
    return torch.stack([torch.rand(pixels, generator=generator(seed, "masked")) < probability for seed in seeds])


def pixel_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """The cross-entropy of each pixel in nats, in fp32 or higher: logits (B, N, V), colours (B, N) -> (B, N)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def masked_means(nats: Tensor, masked: Tensor) -> Tensor:
    """Average the masked pixels of each image: (B, N), boolean (B, N) -> (B,); 0 for an image without masked pixels."""
    return (nats * masked).sum(1) / masked.sum(1).clamp(min=1)
