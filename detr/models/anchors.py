"""Anchors: boxes of fixed sizes and shapes at each position of each feature map, from which boxes are predicted."""

from dataclasses import dataclass

from torchvision.models.detection.anchor_utils import AnchorGenerator

from common.errors import UserError
from common.types import Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class AnchorOptions:
    """The anchors at each position.

    sizes: for each feature map, the finest first, a list of square roots of areas in pixels.
    ratios: heights divided by widths; every size is combined with every ratio.
    """

    sizes: list[list[Positive]]
    ratios: list[PositiveFloat]


def anchor_generator(options: AnchorOptions, levels: int) -> AnchorGenerator:
    """Make torchvision's generator of anchors; raises UserError unless there are equally many sizes for each map."""
    counts = {len(sizes) for sizes in options.sizes}
    if len(options.sizes) != levels or len(counts) != 1 or 0 in counts or not options.ratios:
        raise UserError(
            f"model.anchors={options}: expected {levels} lists of sizes of equal length, one for each feature map of "
            "the backbone, and at least one ratio."
        )
    return AnchorGenerator(tuple(map(tuple, options.sizes)), (tuple(options.ratios),) * levels)
