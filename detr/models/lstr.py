"""LSTR: each query predicts a lane as a curve, whose form all lanes of an image share (Liu et al. 2021).

"End-to-end Lane Shape Prediction with Transformers", arXiv 2011.04233, section 3. A lane on a road whose curvature
changes linearly, seen by a camera above it, is the curve

    x(y) = k / (y - f)^2 + m / (y - f) + n + b'' y - b'''

of the image (equation 5). k, f, m and n depend on the road and the camera, so an image has one value of each: the mean
over all queries of a head's outputs. b'' and b''' are a lane's own, and so are its upper and lower end.

Differs: the logit of "no lane" is the last one, as in DETR; in the official code it is the first.
"""

import torch
from torch import Tensor, nn

from common.nn.linear import Linear
from common.types import Fraction, Layers, Positive
from detr.models.detector import EncoderDecoder, PositionOptions
from detr.models.query_detector import Image, Outputs
from detr.models.slim_resnet import SlimOptions, SlimResNet


class Lstr(EncoderDecoder):
    """A slim ResNet, DETR's encoder and decoder, and heads for the presence, the ends and the curve of a lane."""

    def __init__(
        self,
        *,
        backbone: SlimOptions,
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
    ):
        super().__init__(
            SlimResNet(backbone),
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
        self.class_head = Linear(width, 2)  # lane, no lane
        self.lane_head = CurveHead(width)  # upper and lower end, b'', b'''
        self.road_head = CurveHead(width)  # k, f, m, n
        self._initialise()

    def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        """Apply the heads: x (L, B, Q, C) -> logits (L, B, Q, 2) and curves (L, B, Q, 8).

        A curve is (upper, lower, k, f, m, n, b'', b'''), for x and y relative to the width and height of the image;
        `upper` and `lower` are the y of its ends.
        """
        lane = self.lane_head(x)  # (L, B, Q, 4)
        road = self.road_head(x).mean(-2, keepdim=True).expand_as(lane)
        return {"logits": self.class_head(x), "curves": torch.cat([lane[..., :2], road, lane[..., 2:]], -1)}


class CurveHead(nn.Sequential):
    """Three linear layers that predict four parameters, which are not bounded."""

    def __init__(self, width: int):
        super().__init__(Linear(width, width), nn.ReLU(), Linear(width, width), nn.ReLU(), Linear(width, 4))
