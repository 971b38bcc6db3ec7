"""transformers' DeformableDetrForObjectDetection with our weights (Zhu et al. 2021, arXiv 2010.04159)."""

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from common.config.check import build
from common.config.compose import configure
from common.machine.seeds import generator
from common.weights import projections
from common.weights.layers import RESNET
from common.weights.renaming import Table, rename, with_prefixes
from detr.models.deformable_detector import DeformableDetector

CLASSES = 91  # COCO's ids 0 to 90, each with a logit

_SAMPLING = (
    ("sampling_offsets.", "sampling_offsets."),
    ("attention_weights.", "attention_weights."),
    ("value_proj.", "value_proj."),
    ("output_proj.", "out_proj."),
)
_FEED_FORWARD = (("mlp.fc1.", "feed_forward.expand."), ("mlp.fc2.", "feed_forward.contract."))
_ENCODER_LAYER = (
    *with_prefixes("self_attn.", "attention.", _SAMPLING),
    *_FEED_FORWARD,
    ("self_attn_layer_norm.", "residuals.0.norm."),
    ("final_layer_norm.", "residuals.1.norm."),
)
_DECODER_LAYER = (
    ("self_attn.{qkv}_proj.", "attention.{qkv}."),
    ("self_attn.o_proj.", "attention.out_proj."),
    *with_prefixes("encoder_attn.", "cross_attention.", _SAMPLING),
    *_FEED_FORWARD,
    ("self_attn_layer_norm.", "residuals.0.norm."),
    ("encoder_attn_layer_norm.", "residuals.1.norm."),
    ("final_layer_norm.", "residuals.2.norm."),
)
NAMES = Table(  # (transformers 5, ours)
    *with_prefixes("model.backbone.model.", "backbone.", RESNET),
    ("model.input_proj.{i}.0.", "project.{i}.conv."),
    ("model.input_proj.{i}.1.", "project.{i}.norm."),
    ("model.level_embed", "level_embedding"),
    ("model.query_position_embeddings.", "queries."),
    ("model.reference_points.", "reference_points."),
    ("class_embed.", "class_head."),
    ("bbox_embed.layers.0.", "box_head.0."),
    ("bbox_embed.layers.1.", "box_head.2."),
    ("bbox_embed.layers.2.", "box_head.4."),
    *with_prefixes("model.encoder.layers.{i}.", "encoder.blocks.{i}.", _ENCODER_LAYER),
    *with_prefixes("model.decoder.layers.{i}.", "decoder.blocks.{i}.", _DECODER_LAYER),
)


def config(*overrides: str) -> dict[str, Any]:
    """Compose the config of `train.py model=deformable_detr_r50` without pretrained weights.

    `overrides` are further config keys, key=value. The classification loss has the weight 1, as in transformers; the
    official code has 2.
    """
    keys = ["model=deformable_detr_r50", "model.backbone.weights=none", "task.loss.class_weight=1.0"]
    return configure("train", [*keys, *overrides])


@torch.no_grad()
def detector(*overrides: str) -> DeformableDetector:
    """Build our detector with random weights, also where initial values are constant.

    With initial values, sampling offsets and attention weights do not depend on the query, and no box on its query's
    state. `overrides` are further config keys, key=value.
    """
    torch.manual_seed(0)
    model: DeformableDetector = build(config(*overrides)["model"], classes=CLASSES, logits=CLASSES)
    rng = generator("benchmark")
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=rng)
        elif tensor.dim() == 1 and name.endswith("weight"):
            # Smaller in the backbone, because features grow with each residual block that is added to them.
            low = 0.3 if name.startswith("backbone.") else 0.7
            tensor.uniform_(low, low + 0.6, generator=rng)
        elif tensor.dim() == 1:
            tensor += 0.1 * torch.randn(tensor.shape, generator=rng)
        elif re.search(r"sampling_offsets|attention_weights|box_head\.4\.|reference_points", name):
            tensor.normal_(std=0.05, generator=rng)
        elif "class_head" in name:
            tensor *= 4
    return model


def to_transformers(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict to transformers' names, with one class head and one box head."""
    return rename(projections.split(ours), NAMES.to_theirs).tensors


def peer(model: DeformableDetector, *, auxiliary_loss: bool = False) -> nn.Module:
    """Build transformers' model with the weights and the frozen parameters of our model `model`.

    All dropout rates are 0.1, as in `model=deformable_detr_r50`. The model is built from a config, so nothing is
    downloaded. All decoder layers share one class head and one box head. With `auxiliary_loss`, the loss is that of all
    decoder layers.
    """
    options = DeformableDetrConfig(
        num_labels=CLASSES,
        num_queries=model.query_count,
        auxiliary_loss=auxiliary_loss,
        class_cost=2,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.1,
    )
    theirs = DeformableDetrForObjectDetection(options)
    layers = len(theirs.class_embed)
    class_head, box_head = theirs.class_embed[0], theirs.bbox_embed[0]
    theirs.class_embed, theirs.bbox_embed = class_head, box_head  # loaded once
    theirs.load_state_dict(to_transformers(model.state_dict()))
    trained = to_transformers({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trained)
    theirs.class_embed = nn.ModuleList([class_head] * layers)
    theirs.bbox_embed = nn.ModuleList([box_head] * layers)
    return cast(nn.Module, theirs)
