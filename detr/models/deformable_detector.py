"""Deformable DETR: encoder and decoder sample a few points of several feature maps, in place of attending to all.

Zhu et al. 2021, "Deformable DETR: Deformable Transformers for End-to-End Object Detection", arXiv 2010.04159: section
4.2, and appendix A.4 for iterative box refinement and two-stage detection.

Differs: The features, the positions and the proposals of an image do not depend on its padding. In two-stage detection,
queries are never built from tokens in padding or at the image's border. With `official_padding`, padding affects
features and masks as in the official code.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.device import full_precision
from common.nn.blocks import BlockOptions, Memory, Stack
from common.nn.linear import Linear
from common.nn.resnet import ARCHITECTURES, BackboneOptions, FeatureMap, PyramidBackbone
from common.types import Fraction, Layers, Positive
from detr.models import levels
from detr.models.deformable_attention import DeformableAttention, References
from detr.models.detector import BoxHead
from detr.models.levels import SamplingOptions, SinePositionOptions
from detr.models.mask_head import MaskHead, MaskInput
from detr.models.proposals import ProposalHead, Proposals, select_best
from detr.models.query_detector import Image, Outputs, Queries, QueryDetector, refuse_hints
from detr.models.reference_boxes import boxes_from, encode_boxes

PRIOR = 0.01  # initial probability of each class (Lin et al. 2017, arXiv 1708.02002, section 4.1)
INITIAL_SIDE = -2.0  # bias of width and height, so that the first boxes have sides of sigmoid(-2) = 0.12


class Guide(NamedTuple):
    """What guides a decoder layer."""

    positions: Tensor  # (B, Q, C), added to queries and keys
    references: Tensor  # (B, Q, 2) points or (B, Q, 4) boxes cxcywh, relative to the image


class DeformableDetector(QueryDetector):
    """Deformable DETR, optionally with box refinement and with two stages."""

    # Not loaded from a checkpoint with other classes, even if their number is equal.
    decided_by_data: ClassVar[tuple[str, ...]] = ("class_head",)

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
        refine: bool,
        two_stage: bool,
        auxiliary: bool,
        official_padding: bool,
        logits: int | None = None,
        masks: bool = False,
        frozen: bool = False,
    ):
        """Build the network.

        refine: whether each decoder layer refines the boxes of the layer before, with heads of its own; needs
            `auxiliary`, because no gradients pass through the boxes from layer to layer.
        two_stage: whether the queries are the memory tokens that most probably contain an object; needs `refine`.
        official_padding: whether padding affects an image's features, as in the official code.
        logits: the number K' of logits of each query; None = one for each class and one for "no object".
        masks: whether the queries also predict masks, from the backbone's last map and those before it.
        frozen: whether only the mask head is trained.
        """
        super().__init__()
        self.logits = classes + 1 if logits is None else logits
        if width % heads or width % 4:
            raise UserError(f"model.width={width} must be divisible by model.heads={heads} and by 4.")
        if sampling.maps > (stages := len(ARCHITECTURES[backbone.name][1])):
            raise UserError(
                f"model.sampling.maps={sampling.maps}, but {backbone.name} has {stages} stages; give at most that."
            )
        if two_stage and not refine:
            raise UserError("model.two_stage=true needs model.refine=true, because queries start from proposed boxes.")
        self.width, self.auxiliary, self.guided = width, auxiliary, refine
        self.sampling, self.position_options = sampling, positions
        self.query_count, self.official_padding = queries, official_padding
        count = None if masks else sampling.maps
        self.backbone = PyramidBackbone(backbone, official_padding=official_padding, count=count)
        self.project = levels.Projections(self.backbone, sampling, width)
        self.level_embedding = nn.Parameter(torch.randn(sampling.levels, width))
        blocks = BlockOptions(
            width=width,
            heads=heads,
            feedforward=feedforward,
            pre_norm=pre_norm,
            dropout=dropout,
            attention_dropout=dropout,
            hidden_dropout=dropout,
        )

        def attention(_: int) -> nn.Module:
            return DeformableAttention(width=width, heads=heads, levels=sampling.levels, points=sampling.points)

        self.encoder = Stack(blocks, layers=encoder_layers, final_norm=pre_norm, attention=attention)
        self.decoder = Stack(blocks, layers=decoder_layers, final_norm=pre_norm, cross=True, cross_attention=attention)
        self._add_queries(queries, two_stage)
        self._add_heads(self.logits, decoder_layers, two_stage)
        self._initialise()
        channels = self.backbone.map_channels[:-1]
        self.mask_head = MaskHead(width, heads, channels, official_padding) if masks else None
        if frozen:
            self.freeze()

    def _add_queries(self, queries: int, two_stage: bool) -> None:
        width = self.width
        self.proposals = ProposalHead(width) if two_stage else None
        if two_stage:
            self.box_embedding = nn.Sequential(Linear(2 * width, 2 * width), nn.LayerNorm(2 * width))
        else:
            self.queries = nn.Embedding(queries, 2 * width)
            self.reference_points = Linear(width, 2)

    def _add_heads(self, logits: int, layers: int, two_stage: bool) -> None:
        """Add the heads: one for all layers, or with `refine` one for each layer and one for the proposals."""
        width = self.width
        if not self.guided:
            self.class_head: nn.Module = Linear(width, logits)
            self.box_head: nn.Module = BoxHead(width)
            return
        if not self.auxiliary:
            raise UserError(
                "model.auxiliary=false trains the heads of the last layer only, but model.refine=true has heads for "
                "each layer; use model.auxiliary=true, or model.refine=false."
            )
        self.class_head = nn.ModuleList(Linear(width, logits) for _ in range(layers + two_stage))
        self.box_head = nn.ModuleList(BoxHead(width) for _ in range(layers + two_stage))

    @torch.no_grad()
    def _initialise(self) -> None:
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        for class_head, box_head in self._head_pairs():
            nn.init.constant_(class_head.bias, -math.log((1 - PRIOR) / PRIOR))
            nn.init.zeros_(box_head[-1].weight)
            nn.init.zeros_(box_head[-1].bias)
        self._initialise_queries()

    def _head_pairs(self) -> list[tuple[Any, Any]]:
        """Return the class and box heads."""
        if not self.guided:
            return [(self.class_head, self.box_head)]
        return list(zip(self.class_head, self.box_head, strict=True))  # type: ignore[call-overload]

    def _initialise_queries(self) -> None:
        if self.proposals is not None:
            nn.init.xavier_uniform_(self.box_embedding[0].weight)  # type: ignore[arg-type]
            return
        nn.init.xavier_uniform_(self.reference_points.weight)
        nn.init.zeros_(self.reference_points.bias)
        self._head_pairs()[0][1][-1].bias[2:] = INITIAL_SIDE  # proposals have sides of their own

    def look(self, images: Tensor, sizes: Tensor | None) -> Image:
        """Encode images (B, 3, H, W) to the memory (B, M, C) of the M tokens of all levels.

        `sizes` (B, 2) holds the images' heights and widths without padding; None = no padding.
        """
        backbone_maps = self.backbone(images, sizes)
        maps = self.project(backbone_maps[-self.sampling.maps :], self.backbone, images.shape[-2:], sizes)
        memory, real = levels.concatenate(maps)  # (B, M, C), (B, M) or None
        dtype = torch.promote_types(self.level_embedding.dtype, torch.float32)
        geometry = levels.geometry(maps, dtype)
        encodings = levels.positions(maps, self.width, self.position_options, dtype)
        positions = torch.cat([x + level for x, level in zip(encodings, self.level_embedding, strict=True)], 1)
        positions = positions.to(memory.dtype)  # (B or 1, M, C)
        if self.position_options.at_input:
            memory = memory + positions
        may_look = None if real is None else real[:, None, None]  # (B, 1, 1, M)
        guide = References(geometry.scaled(geometry.centres), geometry.shapes)
        memory = self.encoder(memory, positions=positions, may_look=may_look, guide=guide)
        maps_of_levels = [features for features, _, _ in maps]
        mask_input = None if self.mask_head is None else self._mask_input(backbone_maps, maps, memory)
        return Image(Memory(memory, memory, may_look), maps_of_levels, geometry.centres, geometry, mask_input)

    def _mask_input(self, backbone_maps: list[FeatureMap], maps: list[FeatureMap], memory: Tensor) -> MaskInput:
        """Select what the mask head reads: the backbone's last map is the level that was projected from it."""
        last = self.sampling.maps - 1
        shapes = [each.features.shape[-2:] for each in maps]
        tokens = memory.split([height * width for height, width in shapes], 1)[last]  # (B, H' W', C)
        return MaskInput(backbone_maps[:-1], maps[last], tokens.mT.unflatten(-1, shapes[last]))

    def ask(self, image: Image, hints: dict[str, Tensor] | None) -> Queries:
        """Create queries (B, Q, C) from learned embeddings or, in two stages, from proposals; `hints` must be None."""
        refuse_hints(self, hints)
        memory = image.memory.values
        assert memory is not None
        with full_precision(memory.device):
            if self.proposals is not None:
                return self._ask_proposals(image, self.proposals)
            positions, x = self.queries.weight.expand(memory.shape[0], -1, -1).chunk(2, -1)  # (B, Q, C) each
            return Queries(x.to(memory.dtype), Guide(positions, self.reference_points(positions).sigmoid()))

    def _ask_proposals(self, image: Image, head: ProposalHead) -> Queries:
        """Create queries from the Q proposals with the highest logits.

        The proposals are class-agnostic: only the first logit counts, and every object has the label 0 in their loss.
        """
        proposals: Proposals = head(image, self.class_head[-1], self.box_head[-1])  # type: ignore[index]
        best, _ = select_best(proposals.logits[..., 0], proposals.valid, self.query_count)  # (B, Q)
        boxes = proposals.boxes_cxcywh.detach().gather(1, best[..., None].expand(-1, -1, 4))  # (B, Q, 4)
        positions, x = self.box_embedding(encode_boxes(boxes, self.width // 2)).chunk(2, -1)  # (B, Q, C) each
        outputs: Outputs = {"logits": proposals.logits, "boxes_cxcywh": proposals.boxes_cxcywh}
        if not self.official_padding:  # the official loss also counts tokens in padding
            outputs["real"] = proposals.valid
        return Queries(x, Guide(positions, boxes), proposals=outputs)

    def decode(self, block: nn.Module, x: Tensor, guide: Guide, queries: Queries, image: Image) -> Tensor:
        """Apply one decoder layer, which samples the memory around the references: x (B, Q, C) -> (B, Q, C)."""
        assert image.geometry is not None
        references = References(image.geometry.scaled(guide.references), image.geometry.shapes)
        decoded: Tensor = block(
            x, positions=guide.positions, may_look=queries.may_look, memory=image.memory, guide=references
        )
        return decoded

    def read(self, layer: int | None, x: Tensor, guide: Guide, image: Image) -> Outputs:
        """Apply the heads: x (B, Q, C) -> logits (B, Q, K') and boxes_cxcywh (B, Q, 4), relative to the image.

        Without refinement, x and the results have a further first dimension, of the decoder layers.
        """
        class_head, box_head = self.class_head, self.box_head
        if layer is not None:
            class_head, box_head = class_head[layer], box_head[layer]  # type: ignore[index]
        return {"logits": class_head(x), "boxes_cxcywh": boxes_from(box_head(x), guide.references)}

    def follow(self, guide: Guide, outputs: Outputs) -> Guide:
        """Let the next layer refine this layer's boxes (B, Q, 4), without gradients through them."""
        return guide._replace(references=outputs["boxes_cxcywh"].detach())
