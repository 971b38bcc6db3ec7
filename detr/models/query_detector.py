"""The forward pass of all detectors with queries: encode images, create queries, decode them layer by layer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn.blocks import Memory
from common.nn.resnet import Backbone
from common.weights.backbones import load_weights
from detr.models.levels import Geometry
from detr.models.mask_head import MaskInput, MaskQueries

# The outputs of one layer: a tensor for each head, with R rows for each image. They are logits (B, R, K') with K'
# logits per row, boxes_cxcywh (B, R, 4) relative to each image, and the outputs of further heads. There are two
# optional entries. "real" (B, R) is False for padding rows. "set" is the name of the rows' answer set: "queries" (the
# default), "hints" or "proposals". An answer set is a group of rows that has its own matching and loss. R may differ
# between sets.
Outputs = dict[str, Any]


class Image(NamedTuple):
    """The encoded images: what the decoder and the heads read."""

    memory: Memory
    maps: Sequence[Tensor] = ()  # feature maps (B, C, H, W), highest resolution first; for mask heads
    places: Tensor | None = None  # (1 or B, M, 2) relative x, y of each memory token's centre; for proposals
    geometry: Geometry | None = None  # where the tokens of a multi-scale memory lie in the image
    mask_input: MaskInput | None = None  # what `mask_head` reads; None = the detector has none


class Queries(NamedTuple):
    """The input of the first decoder layer: Q queries.

    The first `hints` queries are built from hints (see `QueryDetector`); the others are ordinary queries.
    """

    x: Tensor  # (B, Q, C)
    guide: (
        Any  # the queries' positions in any form: embeddings (B, Q, C), reference boxes (B, Q, 4), or several tensors
    )
    # Mask of self-attention (B or 1, 1, Q, Q): the entry [..., i, j] is True if query i may attend to query j. None =
    # every query may attend to every query. An ordinary query must not attend to a query built from hints.
    may_look: Tensor | None = None
    hints: int = 0  # number of queries built from hints
    real: Tensor | None = None  # (B, hints), False for padding among the queries built from hints; None = no padding
    proposals: Outputs | None = None  # outputs predicted from the memory tokens, without queries; None = no proposals


class QueryDetector(nn.Module, ABC):
    """A detector with queries. A subclass defines the stages `look`, `ask` and `read`; `forward` runs them.

    A subclass also sets `decoder`, a stack of blocks with a final norm, and `auxiliary`, which is True if `forward`
    returns the outputs of all decoder layers, and False if it returns only those of the last layer. In training, the
    task may pass `hints`: inputs built from the targets, for denoising queries or prompts.

    If `look` returns a `mask_input`, `mask_head` (detr/models/mask_head.py) computes from it the entry "masks" of the
    last layer's outputs: mask logits (B, Q, H, W) of the ordinary queries. In training mode, the entry is
    "mask_queries" instead, and the loss calls `read_masks` for the matched queries, which are a few of all.
    """

    # True: the guide of a layer is computed from the outputs of the layer before. False: all layers get the same guide.
    guided: bool = False
    # True: all weights but those of the mask head are fixed, and dropout is off.
    frozen: bool = False
    # In int8, the small differences between queries would be lost.
    unquantised: Sequence[str] = ("decoder", "mask_head")
    decoder: nn.Module
    auxiliary: bool

    @abstractmethod
    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        """Encode normalised images (B, 3, H, W), which are zero in the padding.

        `sizes` (B, 2) holds the images' heights and widths without padding; None = no padding.
        """

    @abstractmethod
    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        """Create the queries for the encoded images and, in training, for `hints`.

        `hints` is None in evaluation and prediction, and in training without hints.
        """

    @abstractmethod
    def read(self, layer: int | None, x: Tensor, guide: Any, image: Image) -> Outputs:
        """Apply the heads to x (B, Q, C), the output of decoder layer `layer` after the final norm.

        `guide` is the guide that was passed to this layer.

        If `guided` is False, `read` is instead called once for all L layers. Then `layer` is None, x is (L, B, Q, C),
        and the returned tensors are (L, B, Q, ...). If `auxiliary` is also False, L is 1: only the last layer is read.
        """

    def follow(self, guide: Any, outputs: Outputs) -> Any:
        """Compute the next layer's guide from this layer's guide and outputs; called only if `guided` is True."""
        raise NotImplementedError(f"{type(self).__name__} is guided, so it must define follow")

    def decode(self, block: nn.Module, x: Tensor, guide: Any, queries: Queries, image: Image) -> Tensor:
        """Apply one decoder layer: x (B, Q, C) -> (B, Q, C). By default `guide` serves as query positions."""
        decoded: Tensor = block(x, positions=guide, may_look=queries.may_look, memory=image.memory)
        return decoded

    def forward(self, images: Tensor, sizes: Tensor | None, hints: dict[str, Tensor] | None = None) -> list[Outputs]:
        """Detect objects in normalised images (B, 3, H, W), which are zero in the padding.

        `sizes` (B, 2) holds the images' heights and widths without padding; None = no padding. Returns a list in this
        order: the outputs of the proposals, if any (one entry); the outputs of the queries built from hints, if any
        (one entry per decoder layer); the outputs of the ordinary queries (one entry per decoder layer). If `auxiliary`
        is False, the list has no entries for decoder layers before the last.
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
        if image.mask_input is not None:
            asked = MaskQueries(states[-1][:, queries.hints :], image.mask_input)
            outputs[-1] |= {"mask_queries": asked} if self.training else {"masks": self.read_masks(asked)}
        return outputs if queries.proposals is None else [{"set": "proposals", **queries.proposals}, *outputs]

    def read_masks(self, queries: MaskQueries, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Compute the mask logits (B, Q, H, W) of all queries, or (N, H, W) of `rows`, the N pairs that are asked for.

        `rows` holds the indices (N,) of an image and of one of its queries for each pair.
        """
        masks: Tensor = self.mask_head(*queries, rows)  # type: ignore[operator]
        return masks

    def freeze(self) -> None:
        """Fix all weights but those of the mask head; raises UserError if there is none."""
        if getattr(self, "mask_head", None) is None:
            raise UserError("model.frozen=true trains the mask head alone, so it needs model.masks=true.")
        self.frozen = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith("mask_head."))

    def train(self, mode: bool = True) -> Self:
        """Set the training mode; the frozen part of a detector stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            for name, part in self.named_children():
                part.train(mode and name == "mask_head")
        return self

    def fetch_weights(self) -> str | None:
        """Load the backbone's weights that `model.backbone.weights` names; returns lines for the log.

        Returns None, and loads nothing, if `model.backbone.weights` is "none" or the detector has no `backbone`. This
        method is called only for a new run that does not start from a checkpoint.

        Raises UserError if the detector is frozen, because its weights must then come from a checkpoint.
        """
        if self.frozen:
            raise UserError(
                "model.frozen=true trains the mask head of a trained detector, and no detector is given; add "
                "checkpoint=FILE, or give model.frozen=false to train both."
            )
        backbone = getattr(self, "backbone", None)
        if not isinstance(backbone, Backbone) or backbone.options.weights == "none":
            return None
        options = backbone.options
        warnings = load_weights(backbone, options)
        line = f"weights   initialised at random, except the backbone: {options.weights}"
        return "\n".join([line, *(f"warning   {warning}" for warning in warnings)])

    def _read(self, layer: int | None, x: Tensor, guide: Any, image: Image) -> Outputs:
        # The heads compute in full precision: with the 8 significant bits of bf16, boxes would be wrong by pixels.
        with full_precision(x.device):
            return self.read(layer, x.to(next(self.parameters()).dtype), guide, image)


def refuse_hints(model: nn.Module, hints: dict[str, Tensor] | None) -> None:
    """Raise UserError if `hints` is not None, for a model that builds no queries from hints."""
    if hints is not None:
        raise UserError(
            f"{type(model).__name__} has no denoising queries; give a model that has (model=dino), or "
            "task._target_=detr.tasks.detection.Detection."
        )


def _split_hints(queries: Queries, outputs: list[Outputs]) -> list[Outputs]:
    """Split the outputs of each layer into those of queries built from hints and those of ordinary queries.

    The outputs of the former come first in the list and form the answer set "hints".
    """
    count = queries.hints
    if not count:
        return outputs
    extra: Outputs = {"set": "hints"} if queries.real is None else {"set": "hints", "real": queries.real}
    hinted = [{**{name: value[:, :count] for name, value in layer.items()}, **extra} for layer in outputs]
    return hinted + [{name: value[:, count:] for name, value in layer.items()} for layer in outputs]
