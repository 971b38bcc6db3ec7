"""transformers' DetrForObjectDetection with the weights of ours (Carion et al. 2020, arXiv 2005.12872)."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection, DetrConfig

from common.config.check import build
from common.config.compose import configure
from common.machine.seeds import generator
from common.weights import projections
from common.weights.layers import RESNET
from common.weights.renaming import Table, rename, with_prefixes
from detr.models.detector import Detector

CLASSES = 91  # COCO's; with "no object" 92 logits

_LAYER = (
    ("self_attn.{qkv}_proj.", "attention.{qkv}."),
    ("self_attn.o_proj.", "attention.out_proj."),
    ("mlp.fc1.", "feed_forward.expand."),
    ("mlp.fc2.", "feed_forward.contract."),
    ("self_attn_layer_norm.", "residuals.0.norm."),
)
_ENCODER_LAYER = (*_LAYER, ("final_layer_norm.", "residuals.1.norm."))
_DECODER_LAYER = (
    *_LAYER,
    ("encoder_attn.{qkv}_proj.", "cross_attention.{qkv}."),
    ("encoder_attn.o_proj.", "cross_attention.out_proj."),
    ("encoder_attn_layer_norm.", "residuals.1.norm."),
    ("final_layer_norm.", "residuals.2.norm."),
)
NAMES = Table(  # (transformers' of version 5, ours)
    *with_prefixes("model.backbone.model.", "backbone.", RESNET),
    ("model.input_projection.", "project."),
    ("model.query_position_embeddings.", "queries."),
    ("class_labels_classifier.", "class_head."),
    ("bbox_predictor.layers.0.", "box_head.0."),
    ("bbox_predictor.layers.1.", "box_head.2."),
    ("bbox_predictor.layers.2.", "box_head.4."),
    ("model.decoder.layernorm.", "decoder.norm."),
    *with_prefixes("model.encoder.layers.{i}.", "encoder.blocks.{i}.", _ENCODER_LAYER),
    *with_prefixes("model.decoder.layers.{i}.", "decoder.blocks.{i}.", _DECODER_LAYER),
)


def config(*overrides: str) -> dict[str, Any]:
    """The paper's model and recipe, as `train.py model=detr_r50` takes them, but for pretrained weights."""
    return configure("train", ["model=detr_r50", "model.backbone.weights=none", *overrides])


def detector(*overrides: str, fresh: str | None = None) -> Detector:
    """Ours, with all that a new one has at zeros and ones drawn at random: those would hide a swapped name.

    Names that match the pattern `fresh` stay as they are. Some matrices grow as training would make them, or all
    queries would give nearly the same answer.
    """
    torch.manual_seed(0)
    model: Detector = build(config(*overrides)["model"], classes=CLASSES)
    draw = generator("benchmark")
    growth = {"project.weight": 30, "class_head.weight": 4, "box_head.0.weight": 4, "box_head.2.weight": 4}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if fresh and re.match(fresh, name):
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=draw)
            elif tensor.dim() == 1 and name.endswith("weight"):
                low = 0.3 if name.startswith("backbone.") else 0.7  # residuals' sums grow from block to block
                tensor.uniform_(low, low + 0.6, generator=draw)
            elif tensor.dim() == 1:
                tensor.normal_(std=0.1, generator=draw)
            elif name.endswith("in_proj.weight"):
                tensor[: 2 * len(tensor) // 3] *= 2  # queries and keys: sharper attention
            else:
                tensor *= growth.get(name, 1)
        # A deep random network gives all positions nearly the same features; what they share is taken off.
        features = model.project(model.backbone(torch.randn(1, 3, 256, 256, generator=draw), None)[0])
        model.project.bias -= features.mean((0, 2, 3))
    return model


def in_transformers(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under transformers' names."""
    return rename(projections.split(ours), NAMES.to_theirs).tensors


def peer(model: Detector, *, attention: str = "sdpa", auxiliary_loss: bool = False) -> nn.Module:
    """Theirs, built offline from a config, with our weights, as much dropout, and the same parts frozen.

    Its own freezing of the first parts has no effect in 5.23.
    """
    dropout = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    queries = model.queries.num_embeddings
    options = DetrConfig(num_labels=CLASSES, num_queries=queries, auxiliary_loss=auxiliary_loss, **dropout)
    theirs = AutoModelForObjectDetection.from_config(options, attn_implementation=attention)
    theirs.load_state_dict(in_transformers(model.state_dict()))
    trained = in_transformers({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trained)
    return theirs
