"""A model of masks for prompts in the manner of SAM (Kirillov et al. 2023, arXiv 2304.02643), with any encoder."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from detr.models.mask_decoder import DecoderOptions, MaskDecoder
from detr.models.prompt_encoder import PromptEncoder, Prompts


class PromptableModel(nn.Module):
    """An image encoder, a prompt encoder and a mask decoder.

    `encode` computes an image's embedding once, and `decode` predicts masks for any prompts of encoded images. Images
    are padded with zeros at the bottom and right to `image_size` by `image_size` pixels, so an image's embedding does
    not depend on the other images of its batch. The encoder's map has a stride of `stride` pixels, and the masks' map
    has a quarter of it.
    """

    unshardable = "its encoder and its decoder are called separately"
    unquantised = ("mask_decoder",)

    def __init__(
        self,
        encoder: nn.Module,
        *,
        image_size: int,
        stride: int,
        width: int,
        mask_channels: int,
        decoder: DecoderOptions,
    ):
        super().__init__()
        if image_size % stride:
            raise UserError(f"model.image_size={image_size}: expected a multiple of the encoder's stride, {stride}.")
        # The decoder's cross-attention has half the width, and the maps of masks have an eighth of it.
        if width % (2 * decoder.heads) or width % 8:
            raise UserError(
                f"model.width={width} must be divisible by 8 and by twice model.decoder.heads={decoder.heads}."
            )
        if mask_channels % 4:
            raise UserError(f"model.mask_channels={mask_channels} must be divisible by 4.")
        self.image_size = image_size
        self.image_encoder = encoder
        self.prompt_encoder = PromptEncoder(
            width=width, image_size=image_size, side=image_size // stride, mask_channels=mask_channels
        )
        self.mask_decoder = MaskDecoder(decoder, width=width)

    def forward(self, images: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """Predict the masks of prompts; see `encode` and `decode`."""
        return self.decode(self.encode(images), prompts)

    def encode(self, images: Tensor) -> Tensor:
        """Encode normalised images (B, 3, H, W), zero in their padding: -> (B, C, h, w).

        Raises UserError if the images are larger than `image_size`.
        """
        height, width = images.shape[-2:]
        if max(height, width) > self.image_size:
            raise UserError(
                f"model.image_size={self.image_size}: the images have {width} x {height} pixels; lower "
                "data.augmentation.max_size, so that they fit."
            )
        padded = F.pad(images, (0, self.image_size - width, 0, self.image_size - height))
        features: Tensor = self.image_encoder(padded)
        return features

    def decode(self, features: Tensor, prompts: Prompts) -> dict[str, Tensor]:
        """Predict masks for N prompts of encoded images (B, C, h, w); see prompt_encoder.py for `prompts`.

        The result has two keys. "masks" (N, 4, 4h, 4w) are logits on a map of the padded image: the first mask is for
        prompts that are not ambiguous, such as several points, the others are for a single point or box. "ious" (N, 4)
        is the predicted IoU of each mask with the object.
        """
        tokens, real, maps = self.prompt_encoder(prompts)
        positions = self.prompt_encoder.map_positions()
        masks, ious = self.mask_decoder(features[prompts["image"]] + maps, positions, tokens, real)
        return {"masks": masks, "ious": ious}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the image encoder and the mask decoder, because `forward` is not what the task calls."""
        self.image_encoder.compile(*args, **kwargs)
        self.mask_decoder.compile(*args, **kwargs)
