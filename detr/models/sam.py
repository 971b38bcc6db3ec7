"""Segment Anything (Kirillov et al. 2023, arXiv 2304.02643): masks for prompts, with a ViT as image encoder."""

from common.types import Positive, Side
from detr.models.image_encoder import ImageEncoder, ViTOptions
from detr.models.mask_decoder import DecoderOptions
from detr.models.promptable import PromptableModel


class Sam(PromptableModel):
    """SAM: `PromptableModel` with a ViT."""

    def __init__(
        self,
        *,
        image_size: Side,
        patch_size: Side,
        width: Positive,
        mask_channels: Positive,
        encoder: ViTOptions,
        decoder: DecoderOptions,
    ):
        """Create the model.

        Args:
            image_size: side of the square, in pixels, to which images are padded.
            patch_size: side of the encoder's patches in pixels.
            width: channels of the image embedding and of the decoder.
            mask_channels: channels of the last but one map that is computed from a mask in a prompt.
            encoder: options of the image encoder.
            decoder: options of the mask decoder.
        """
        vit = ImageEncoder(encoder, image_size=image_size, patch_size=patch_size, width=width)
        super().__init__(
            vit, image_size=image_size, stride=patch_size, width=width, mask_channels=mask_channels, decoder=decoder
        )
        self.depth = encoder.layers

    def layers(self) -> list[tuple[str, ...]]:
        """List the name prefixes of each layer's parameters, from input to output, for layer-wise learning rates.

        The embeddings are the first layer; the neck, the prompt encoder and the decoder are the last.
        """
        stem = ("image_encoder.patches", "image_encoder.positions")
        blocks = [(f"image_encoder.encoder.blocks.{i}",) for i in range(self.depth)]
        return [stem, *blocks, ("image_encoder.neck", "prompt_encoder", "mask_decoder")]
