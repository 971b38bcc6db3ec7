"""The form that detectors with queries share: look at the images, ask, and read what each decoder layer answers."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from common.machine.device import full_precision
from common.nn.blocks import Memory

# The answers of one layer, a tensor (B, R, ...) for each head: logits (B, R, K'), boxes_cxcywh (B, R, 4) relative to
# each image, and what other heads add. Optional: real (B, R), the rows that are not padding; set, a word that names a
# set of answers of its own, with its own number of rows ("proposals", "hints"; without it "queries").
Outputs = dict[str, Any]


class Image(NamedTuple):
    """What queries and heads know of the images."""

    memory: Memory
    maps: Sequence[Tensor] = ()  # (B, C, H, W) each, finest first: for mask heads
    places: Tensor | None = None  # (1 or B, M, 2) relative x and y of each memory token's centre: for proposals


class Queries(NamedTuple):
    """What enters the first decoder layer. The `hints` come first among the queries, the ordinary ones after them."""

    x: Tensor  # (B, Q, C)
    guide: Tensor  # what tells the queries where to look: positions (B, Q, C), reference boxes (B, Q, 4), ...
    may_look: Tensor | None = None  # (B or 1, 1, Q, Q); ordinary queries never look at hints
    hints: int = 0
    real: Tensor | None = None  # (B, hints), False for hints that are padding
    proposals: Outputs | None = None


class QueryDetector(nn.Module):
    """A detector in three stages that a subclass states; the forward pass stands here, once.

    A subclass has a `decoder` and says `auxiliary`: whether all layers are trained, or the last alone. What it must
    know of the targets in training (denoising queries, prompts) is built by the task and handed in as `hints`.
    """

    guided: ClassVar[bool] = False  # whether a layer's answers guide the next; if not, all layers are read at once
    decoder: nn.Module
    auxiliary: bool

    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        """Normalised images (B, 3, H, W), zero where padded, and sizes (B, 2), None when no image is padded."""
        raise NotImplementedError

    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        """The queries; from what the image shows (proposals), and from `hints`, None in evaluation and prediction."""
        raise NotImplementedError

    def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        """The heads on the output x (B, Q, C) of a decoder layer, which `guide` led.

        Without `guided` it is called once with x (L, B, Q, C) of all layers and `layer` None; answers then are
        (L, B, Q, ...).
        """
        raise NotImplementedError

    def follow(self, guide: Tensor, outputs: Outputs) -> Tensor:
        """The guide of the next layer, from what a layer led by `guide` answers (`guided` alone)."""
        raise NotImplementedError

    def decode(self, block: nn.Module, x: Tensor, guide: Tensor, queries: Queries, image: Image) -> Tensor:
        """One decoder layer: x (B, Q, C) -> (B, Q, C). Here the guide is added to the queries, as DETR does."""
        decoded: Tensor = block(x, positions=guide, may_look=queries.may_look, memory=image.memory)
        return decoded

    def forward(self, images: Tensor, sizes: Tensor | None, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        """Normalised images (B, 3, H, W), zero where padded, and sizes (B, 2), None when no image is padded.

        Returns the answers of each decoder layer, the last layer's at the end; without `auxiliary` the last layer's
        alone. Before them come those to hints, of as many layers, and proposals.
        """
        image = self.look(images, sizes)
        queries = self.ask(image, hints)
        x, guide = queries.x, queries.guide
        states: list[Tensor] = []
        outputs: list[Outputs] = []
        for i, block in enumerate(self.decoder.blocks):  # type: ignore[arg-type]
            x = self.decode(block, x, guide, queries, image)
            states.append(self.decoder.norm(x))  # type: ignore[operator]
            if self.guided:
                outputs.append(self._read(i, states[-1], guide, image))
                guide = self.follow(guide, outputs[-1])
        if not self.guided:
            every = self._read(None, torch.stack(states if self.auxiliary else states[-1:]), guide, image)
            outputs = [dict(zip(every, layer, strict=True)) for layer in zip(*every.values(), strict=True)]
        outputs = _split_hints(queries, outputs if self.auxiliary else outputs[-1:])
        return outputs if queries.proposals is None else [{**queries.proposals, "set": "proposals"}, *outputs]

    def _read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        # The heads stay out of half precision: a coordinate with 8 bits would be off by pixels.
        with full_precision(x.device):
            return self.read(layer, x.to(next(self.parameters()).dtype), guide, image)


def _split_hints(queries: Queries, outputs: list[Outputs]) -> list[Outputs]:
    """The answers to hints as a set of their own, before those of the ordinary queries."""
    count = queries.hints
    if not count:
        return outputs
    own: Outputs = {"set": "hints"} if queries.real is None else {"set": "hints", "real": queries.real}
    hinted = [{**{name: value[:, :count] for name, value in layer.items()}, **own} for layer in outputs]
    return hinted + [{name: value[:, count:] for name, value in layer.items()} for layer in outputs]
