"""The forward pass of all detectors with queries: encode images, make queries, decode them layer by layer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from common.machine.device import full_precision
from common.nn.blocks import Memory

# The outputs of one layer: a tensor for each head, with R rows for each image. They are logits (B, R, K'), boxes_cxcywh
# (B, R, 4) relative to each image, and the outputs of further heads. Optional entries: "real" (B, R), False for padding
# rows; "set", the name of the answer set, the group of rows that the loss compares with the objects separately:
# "queries" (the default), "hints" or "proposals". R may differ between sets.
Outputs = dict[str, Any]


class Image(NamedTuple):
    """The encoded images: what the decoder and the heads read."""

    memory: Memory
    maps: Sequence[Tensor] = ()  # feature maps (B, C, H, W), highest resolution first; for mask heads
    places: Tensor | None = None  # (1 or B, M, 2) relative x, y of each memory token's centre; for proposals


class Queries(NamedTuple):
    """The input of the first decoder layer: Q queries. The first ones may be built from hints; see `QueryDetector`."""

    x: Tensor  # (B, Q, C)
    guide: Tensor  # where the queries look: positions (B, Q, C), reference boxes (B, Q, 4), ...
    may_look: Tensor | None = None  # mask of self-attention (B or 1, 1, Q, Q); False from an ordinary query to a hint
    hints: int = 0  # number of queries built from hints
    real: Tensor | None = None  # (B, hints), False for padding; None without padding
    proposals: Outputs | None = None  # outputs of proposals made from the memory; None without proposals


class QueryDetector(nn.Module, ABC):
    """A detector with queries. A subclass defines the stages `look`, `ask` and `read`; `forward` runs them.

    A subclass defines a `decoder`, a stack of blocks with a final norm, and `auxiliary`: True if `forward` returns the
    outputs of all decoder layers, False if only those of the last. In training, the task may pass `hints`: inputs built
    from the targets, for denoising queries or prompts.
    """

    guided: ClassVar[bool] = False  # True: each layer's outputs give the next guide; False: one guide for all layers
    decoder: nn.Module
    auxiliary: bool

    @abstractmethod
    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        """Encode normalised images (B, 3, H, W), zero where padded; `sizes` (B, 2), or None without padding."""

    @abstractmethod
    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        """Make the queries from the images and, in training, from `hints`; evaluation and prediction pass None."""

    @abstractmethod
    def read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        """Apply the heads to the output x (B, Q, C) of decoder layer `layer`, computed with `guide`.

        If `guided` is False, `read` is instead called once for all L layers, with `layer` None and x (L, B, Q, C), and
        returns tensors (L, B, Q, ...).
        """

    def follow(self, guide: Tensor, outputs: Outputs) -> Tensor:
        """Compute the next layer's guide from this layer's guide and outputs; called only if `guided` is True."""
        raise NotImplementedError(f"{type(self).__name__} is guided, so it must define follow")

    def decode(self, block: nn.Module, x: Tensor, guide: Tensor, queries: Queries, image: Image) -> Tensor:
        """Apply one decoder layer: x (B, Q, C) -> (B, Q, C). By default `guide` serves as query positions."""
        decoded: Tensor = block(x, positions=guide, may_look=queries.may_look, memory=image.memory)
        return decoded

    def forward(self, images: Tensor, sizes: Tensor | None, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        """Detect objects in normalised images (B, 3, H, W), zero where padded; sizes (B, 2), or None without padding.

        Returns a list in this order: the outputs of the proposals, if any; the outputs of the hints, if any, one entry
        per decoder layer; the outputs of the ordinary queries, one entry per decoder layer. If `auxiliary` is False,
        the entries of the earlier decoder layers are left out.
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
            stacked = self._read(None, torch.stack(states if self.auxiliary else states[-1:]), guide, image)
            outputs = [dict(zip(stacked, layer, strict=True)) for layer in zip(*stacked.values(), strict=True)]
        outputs = _split_hints(queries, outputs if self.auxiliary else outputs[-1:])
        return outputs if queries.proposals is None else [{**queries.proposals, "set": "proposals"}, *outputs]

    def _read(self, layer: int | None, x: Tensor, guide: Tensor, image: Image) -> Outputs:
        # In bf16, coordinates would have 8 significant bits, and be wrong by pixels.
        with full_precision(x.device):
            return self.read(layer, x.to(next(self.parameters()).dtype), guide, image)


def _split_hints(queries: Queries, outputs: list[Outputs]) -> list[Outputs]:
    """Split the outputs of each layer into those of hints and those of ordinary queries.

    The outputs of hints come first in the list and form the answer set "hints".
    """
    count = queries.hints
    if not count:
        return outputs
    extra: Outputs = {"set": "hints"} if queries.real is None else {"set": "hints", "real": queries.real}
    hinted = [{**{name: value[:, :count] for name, value in layer.items()}, **extra} for layer in outputs]
    return hinted + [{name: value[:, count:] for name, value in layer.items()} for layer in outputs]
