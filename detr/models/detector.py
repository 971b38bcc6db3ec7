"""DETR: object queries attend to an image's features, and each predicts one object or none.

Carion et al. 2020, "End-to-End Object Detection with Transformers", arXiv 2005.12872, section 3.2 and figure 2.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.nn.blocks import BlockOptions, Memory, Stack
from common.nn.linear import Linear
from common.nn.positions import Learned2d, sine_2d
from common.nn.resnet import BackboneOptions, FeatureMap, PyramidBackbone
from common.types import Fraction, Layers, Positive, PositiveFloat
from detr.models.mask_head import MaskHead, MaskInput
from detr.models.query_detector import Image, Outputs, Queries, QueryDetector, refuse_hints


@dataclass(frozen=True, kw_only=True)
class PositionOptions:
    """The position encodings of the feature map.

    Every encoder layer adds them to its queries and keys, and every decoder layer to the keys of its cross-attention.

    kind: "sine" for fixed sines and cosines; "learned" for a learned vector for each row and each column.
    temperature: temperature of the sines, 10,000 in the paper. With 20, the encodings of neighbours are less similar,
        which suits small feature maps (Liu et al. 2022, DAB-DETR, arXiv 2201.12329).
    at_input: whether the encodings are also added to the encoder's input, so that attention values contain positions
        ("sine at input" in table 3). A shallow backbone needs this. A deep ResNet does not: it infers positions from
        the image's border, so its features already contain them.
    """

    kind: Literal["sine", "learned"]
    temperature: PositiveFloat
    at_input: bool


class FeatureExtractor(Protocol):
    """A backbone, such as `common.nn.resnet.PyramidBackbone`."""

    channels: int  # of the last feature map

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the last feature map of images with this height and width in pixels."""

    def __call__(self, images: Tensor, sizes: Tensor | None) -> list[FeatureMap]:
        """Compute the feature maps of images, as `PyramidBackbone.forward` does; only a mask head reads all of them."""


class EncoderDecoder(QueryDetector):
    """DETR without its heads: a backbone, an encoder, a decoder, and learned queries.

    A subclass adds heads, calls `_initialise` at the end of its constructor, and defines `read`.
    """

    mask_head: MaskHead | None

    def __init__(
        self,
        backbone: FeatureExtractor,
        *,
        width: int,
        heads: int,
        encoder_layers: int,
        decoder_layers: int,
        feedforward: int,
        dropout: float,
        pre_norm: bool,
        queries: int,
        positions: PositionOptions,
        auxiliary: bool,
    ):
        super().__init__()
        if width % heads or width % 4:
            raise UserError(f"model.width={width} must be divisible by model.heads={heads} and by 4.")
        self.width, self.auxiliary, self.position_options = width, auxiliary, positions
        self.backbone = backbone
        self.project = nn.Conv2d(self.backbone.channels, width, 1)
        self.positions = Learned2d(width) if positions.kind == "learned" else None
        blocks = BlockOptions(
            width=width,
            heads=heads,
            feedforward=feedforward,
            pre_norm=pre_norm,
            dropout=dropout,
            attention_dropout=dropout,  # like hidden_dropout, in the official code but not in the paper
            hidden_dropout=dropout,
        )
        self.encoder = Stack(blocks, layers=encoder_layers, final_norm=pre_norm)
        self.decoder = Stack(blocks, layers=decoder_layers, final_norm=True, cross=True)
        self.queries = nn.Embedding(queries, width)
        self.mask_head = None

    def _initialise(self) -> None:
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        """Encode images (B, 3, H, W) to the memory (B, M, C) of M = H' W' positions.

        H' and W' are the height and width of the backbone's last feature map. `sizes` (B, 2) holds the images' heights
        and widths without padding; None = no padding.
        """
        *finer_maps, (features, real, stride) = self.backbone(images, sizes)
        features = self.project(features)  # (B, C, H', W')
        positions = self._positions(features, real).flatten(1, 2)  # (B, H', W', C) -> (B, M, C)
        memory = features.flatten(2).transpose(1, 2)  # (B, C, H', W') -> (B, M, C)
        may_look = None if real is None else real.flatten(1)[:, None, None]  # (B, 1, 1, M)
        if self.position_options.at_input:
            memory = memory + positions
        memory = self.encoder(memory, positions=positions, may_look=may_look)
        image = Image(Memory(memory + positions, memory, may_look))
        if self.mask_head is None:
            return image
        projected = FeatureMap(features, real, stride)
        return image._replace(mask_input=MaskInput(finer_maps, projected, memory.mT.unflatten(-1, features.shape[-2:])))

    def memory_grid(self, height: int, width: int) -> tuple[int, int]:
        """Return H' and W' of the memory of images with this height and width in pixels."""
        return self.backbone.grid(height, width)

    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        """Create queries with x = 0 and learned query positions as `guide`, both (B, Q, C); `hints` must be None."""
        refuse_hints(self, hints)
        values = image.memory.values
        assert values is not None
        queries = self.queries.weight.to(values.dtype).expand(values.shape[0], -1, -1)  # (B, Q, C)
        return Queries(torch.zeros_like(queries), queries)

    def _positions(self, features: Tensor, real: Tensor | None) -> Tensor:
        """Compute position encodings (1 or B, H', W', C) for features (B, C, H', W'), in the dtype of the features.

        `real` (B, H', W') is False for padding; None = no padding.
        """
        if real is None:
            height, width = features.shape[-2:]
            real = torch.ones(1, height, width, dtype=torch.bool, device=features.device)
        learned: Tensor | None = None if self.positions is None else self.positions(real)
        positions = sine_2d(real, self.width, self.position_options.temperature) if learned is None else learned
        return positions.to(features.dtype)


class Detector(EncoderDecoder):
    """DETR: a backbone, an encoder, a decoder, and a class and a box head that all decoder layers share."""

    decided_by_data = ("class_head",)  # not loaded from a checkpoint with other classes, even if their number is equal

    def __init__(
        self,
        *,
        classes: int,
        backbone: BackboneOptions,
        width: Positive,
        heads: Positive,
        encoder_layers: Layers,
        decoder_layers: Layers,
        feedforward: Positive,
        dropout: Fraction,
        pre_norm: bool,
        queries: Positive,
        positions: PositionOptions,
        auxiliary: bool,
        official_padding: bool,
        logits: int | None = None,
        masks: bool = False,
        frozen: bool = False,
    ):
        """Build the network.

        official_padding: whether padding affects an image's features, as in the official code (common/nn/resnet.py).
        logits: the number K' of logits of each query; None = one for each class and one for "no object".
        masks: whether the queries also predict masks (section 4.4).
        frozen: whether only the mask head is trained.
        """
        maps = PyramidBackbone(backbone, official_padding=official_padding, count=None if masks else 1)
        super().__init__(
            maps,
            width=width,
            heads=heads,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            feedforward=feedforward,
            dropout=dropout,
            pre_norm=pre_norm,
            queries=queries,
            positions=positions,
            auxiliary=auxiliary,
        )
        self.class_head = Linear(width, classes + 1 if logits is None else logits)
        self.box_head = BoxHead(width)
        self._initialise()
        if masks:
            self.mask_head = MaskHead(width, heads, maps.map_channels[:-1], official_padding)
        if frozen:
            self.freeze()

    def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        """Apply the heads: x (L, B, Q, C) -> logits (L, B, Q, K') and boxes_cxcywh (L, B, Q, 4).

        K' is the number of logits of a query. Boxes are relative to the width and height of the image.
        """
        return {"logits": self.class_head(x), "boxes_cxcywh": self.box_head(x).sigmoid()}


class BoxHead(nn.Sequential):
    """Three linear layers that predict a box; the sigmoid of their outputs is the box in cxcywh (section 3.2, FFN)."""

    def __init__(self, width: int):
        super().__init__(Linear(width, width), nn.ReLU(), Linear(width, width), nn.ReLU(), Linear(width, 4))
