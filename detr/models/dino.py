"""DINO: queries are boxes that each decoder layer refines, and noisy copies of the objects in training.

Zhang et al. 2022, "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection", arXiv 2203.03605,
on the decoder of Deformable DETR. Dynamic boxes are from Liu et al. 2022, "DAB-DETR", arXiv 2201.12329, and denoising
is from Li et al. 2022, "DN-DETR", arXiv 2203.01305. detr/criterion/denoising.py adds the noise.

Differs: In the official code, the position of a query is computed from its box relative to the padded map of highest
resolution, so detections depend on padding; here, the box is relative to the image (unless `official_padding`). In
self-attention, the denoising queries of an image are masked by their own number, not by the batch's largest.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from common.machine.device import full_precision
from common.nn.linear import Linear
from common.nn.resnet import BackboneOptions
from common.types import Fraction, Layers, Positive
from detr.models.deformable_detector import DeformableDetector
from detr.models.detector import BoxHead
from detr.models.levels import SamplingOptions, SinePositionOptions
from detr.models.mask_head import MaskQueries
from detr.models.proposals import ProposalHead, Proposals, select_best
from detr.models.query_detector import Image, Outputs, Queries
from detr.models.reference_boxes import boxes_from, encode_boxes

EPS = 1e-3  # of the inverse sigmoid of boxes, as in the official code


class BoxGuide(NamedTuple):
    """What guides a decoder layer: the queries' boxes cxcywh (B, Q, 4), relative to the image."""

    positions: Tensor  # (B, Q, C), computed from the boxes
    references: Tensor  # boxes without gradients, which the layer samples around and refines
    tracked: Tensor  # the same boxes with gradients: "look forward twice" (section 3.5)
    scale: Tensor | None  # (B or 1, 1, 4) factors of the boxes before their positions are computed; None = 1


class Dino(DeformableDetector):
    """DINO, or with `two_stage` false DAB-DETR with deformable attention: the boxes of the queries are then learned."""

    decided_by_data: ClassVar[tuple[str, ...]] = ("class_head", "proposal_class_head", "label_embedding")

    def __init__(
        self,
        *,
        classes: int,
        backbone: BackboneOptions,
        sampling: SamplingOptions,
        width: Positive,
        heads: Positive,
        encoder_layers: Layers,
        decoder_layers: Layers,
        feedforward: Positive,
        dropout: Fraction,
        pre_norm: bool,
        queries: Positive,
        positions: SinePositionOptions,
        two_stage: bool,
        auxiliary: bool,
        official_padding: bool,
        logits: int | None = None,
        masks: bool = False,
        frozen: bool = False,
    ):
        """Build the network.

        two_stage: whether the queries' boxes are those that the encoder proposes ("mixed query selection", section
            3.4), or learned. Their contents are learned in both cases.
        official_padding: whether padding affects an image's features, as in the official code.
        logits: the number K' of logits of each query; None = one for each class and one for "no object".
        masks: whether the queries also predict masks, from the backbone's last map and those before it.
        frozen: whether only the mask head is trained.
        """
        super().__init__(
            classes=classes,
            backbone=backbone,
            sampling=sampling,
            width=width,
            heads=heads,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            feedforward=feedforward,
            dropout=dropout,
            pre_norm=pre_norm,
            queries=queries,
            positions=positions,
            refine=True,
            two_stage=two_stage,
            auxiliary=auxiliary,
            official_padding=official_padding,
            logits=logits,
            masks=masks,
        )
        self.classes, self.pre_norm = classes, pre_norm
        # The decoder's final norm, which `read` applies: official DINO refines boxes by the states before this norm.
        self.norm, self.decoder.norm = nn.LayerNorm(width), nn.Identity()
        self.position_head = nn.Sequential(Linear(2 * width, width), nn.ReLU(), Linear(width, width))
        self.label_embedding = nn.Embedding(classes + 1, width)  # as in official files; the last row is never used
        for layer in (self.position_head[0], self.position_head[2]):
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        if frozen:
            self.freeze()

    def _add_queries(self, queries: int, two_stage: bool) -> None:
        self.queries = nn.Embedding(queries, self.width)
        self.proposals = ProposalHead(self.width) if two_stage else None
        if not two_stage:
            self.query_boxes = nn.Embedding(queries, 4)  # inverse sigmoid of cxcywh

    def _add_heads(self, logits: int, layers: int, two_stage: bool) -> None:
        """Add a class and a box head that all layers share, and further ones for the proposals."""
        self.class_head, self.box_head = Linear(self.width, logits), BoxHead(self.width)
        if two_stage:
            self.proposal_class_head, self.proposal_box_head = Linear(self.width, logits), BoxHead(self.width)

    def _head_pairs(self) -> list[tuple[Any, Any]]:
        pairs: list[tuple[Any, Any]] = [(self.class_head, self.box_head)]
        return pairs if self.proposals is None else [*pairs, (self.proposal_class_head, self.proposal_box_head)]

    def _initialise_queries(self) -> None:
        nn.init.xavier_uniform_(self.queries.weight)

    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        """Create queries with learned contents (B, Q, C) and with boxes that are proposed or learned.

        With `hints`, D denoising queries come first: their boxes are hints["boxes"] (B, D, 4) cxcywh, and their
        contents are embeddings of hints["labels"] (B, D). hints["real"] (B, D) is False in padding, and
        hints["groups"] (B, D) numbers the groups of an image.
        """
        memory = image.memory.values
        assert memory is not None and image.geometry is not None
        with full_precision(memory.device):
            x, (boxes, proposals) = self.queries.weight.expand(memory.shape[0], -1, -1), self._boxes(image)
            may_look, count, real = None, 0, None
            if hints is not None:
                count, real = hints["boxes"].shape[1], hints["real"]
                x = torch.cat((self.label_embedding(hints["labels"]), x), 1)  # (B, D + Q, C)
                boxes = torch.cat((hints["boxes"].to(boxes.dtype), boxes), 1)  # (B, D + Q, 4)
                may_look = denoising_mask(hints["groups"], real, self.query_count)
            scale = image.geometry.ratios[:, :1].repeat(1, 1, 2) if self.official_padding else None  # (B or 1, 1, 4)
            guide = BoxGuide(self._positions(boxes, scale), boxes, boxes, scale)
        return Queries(x, guide, may_look=may_look, hints=count, real=real, proposals=proposals)

    def _boxes(self, image: Image) -> tuple[Tensor, Outputs | None]:
        """Return the boxes (B, Q, 4) of the ordinary queries, and the outputs of the proposals that they come from.

        The proposals are those with the highest probability of any class.
        """
        if self.proposals is None:
            assert image.memory.values is not None
            return self.query_boxes.weight.sigmoid().expand(image.memory.values.shape[0], -1, -1), None
        proposals: Proposals = self.proposals(image, self.proposal_class_head, self.proposal_box_head)
        scores = proposals.logits[..., : self.classes].max(-1).values  # (B, M)
        best, distinct = select_best(scores, proposals.valid, self.query_count)  # (B, Q) each
        boxes, logits = (
            values.gather(1, best[..., None].expand(-1, -1, values.shape[-1]))
            for values in (proposals.boxes_cxcywh, proposals.logits)
        )
        outputs: Outputs = {"set": "selected", "logits": logits, "boxes_cxcywh": boxes}
        return boxes.detach(), outputs if self.official_padding else outputs | {"real": distinct}

    def _positions(self, boxes: Tensor, scale: Tensor | None) -> Tensor:
        """Compute query positions from boxes: (B, Q, 4) -> (B, Q, C)."""
        y_x_w_h = (boxes if scale is None else boxes * scale)[..., [1, 0, 2, 3]]
        positions: Tensor = self.position_head(encode_boxes(y_x_w_h, self.width // 2))
        return positions

    def read(self, layer: int | None, x: Tensor, guide: BoxGuide, image: Image) -> Outputs:  # type: ignore[override]
        """Apply the heads: x (B, Q, C) -> logits (B, Q, K') and boxes_cxcywh (B, Q, 4), relative to the image.

        The entry "references" holds the boxes that `follow` hands to the next layer.
        """
        normalised = self.norm(x)
        deltas = self.box_head(normalised)
        boxes = boxes_from(deltas, guide.tracked, EPS)
        references = boxes_from(deltas if self.pre_norm else self.box_head(x), guide.references, EPS)
        return {"logits": self.class_head(normalised), "boxes_cxcywh": boxes, "references": references}

    def read_masks(self, queries: MaskQueries, rows: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """See QueryDetector; `decoder.norm` is the identity."""
        return super().read_masks(queries._replace(x=self.norm(queries.x)), rows)

    def follow(self, guide: BoxGuide, outputs: Outputs) -> BoxGuide:  # type: ignore[override]
        """Let the next layer refine this layer's boxes (B, Q, 4), without gradients through them."""
        tracked = outputs.pop("references")
        boxes = tracked.detach()
        with full_precision(boxes.device):
            return BoxGuide(self._positions(boxes, guide.scale), boxes, tracked, guide.scale)


def denoising_mask(groups: Tensor, real: Tensor, queries: int) -> Tensor:
    """Return the mask of self-attention (B, 1, D + Q, D + Q): True where a query may attend to another.

    A denoising query attends to those of its group and to the ordinary queries, which attend only to each other.
    `groups` (B, D) numbers the groups of an image, and `real` (B, D) is False in padding, to which nothing attends.
    """
    batch, count = groups.shape
    within = (groups[:, :, None] == groups[:, None, :]) & real[:, None, :]  # (B, D, D)
    may_look = real.new_ones(batch, count + queries, count + queries)
    may_look[:, count:, :count] = False
    may_look[:, :count, :count] = within
    return may_look[:, None]
