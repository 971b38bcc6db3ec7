"""transformers' DetrForObjectDetection with the weights of our detector (Carion et al. 2020, arXiv 2005.12872)."""

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

CLASSES = 91  # COCO's ids 0 to 90; the model has 92 logits, one of them for "no object"

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
NAMES = Table(  # (transformers 5, ours)
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
    """Compose the config of `train.py model=detr_r50`, the paper's model and recipe, without pretrained weights.

    `overrides` are further config keys, key=value.
    """
    return configure("train", ["model=detr_r50", "model.backbone.weights=none", *overrides])


def detector(*overrides: str, fresh: str | None = None) -> Detector:
    """Build our detector with random weights, for a comparison with transformers' model.

    Random values replace initial values of zero and one, which would make tensors equal and hide a swap of two tensors.
    Tensors with a name that begins with a match of the regular expression `fresh` keep their initial values; None means
    that there are no such tensors. Some matrices are scaled up, because training enlarges them. Without this scaling,
    all queries would have nearly the same outputs. `overrides` are further config keys, key=value.
    """
    torch.manual_seed(0)
    model: Detector = build(config(*overrides)["model"], classes=CLASSES)
    rng = generator("benchmark")
    scales = {"project.weight": 30, "class_head.weight": 4, "box_head.0.weight": 4, "box_head.2.weight": 4}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if fresh and re.match(fresh, name):
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=rng)
            elif tensor.dim() == 1 and name.endswith("weight"):
                # Smaller in the backbone, because features grow with each residual block that is added to them.
                low = 0.3 if name.startswith("backbone.") else 0.7
                tensor.uniform_(low, low + 0.6, generator=rng)
            elif tensor.dim() == 1:
                tensor.normal_(std=0.1, generator=rng)
            elif name.endswith("in_proj.weight"):
                tensor[: 2 * len(tensor) // 3] *= 2  # the rows of queries and keys, for sharper attention
            else:
                tensor *= scales.get(name, 1)
        # The features of a deep random network are nearly the same at all positions; subtract their mean.
        features = model.project(model.backbone(torch.randn(1, 3, 256, 256, generator=rng), None)[-1].features)
        model.project.bias -= features.mean((0, 2, 3))
    return model


def to_transformers(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert our state dict to transformers' names, with separate query, key and value projections."""
    return rename(projections.split(ours), NAMES.to_theirs).tensors


def peer(model: Detector, *, attention: str = "sdpa", auxiliary_loss: bool = False) -> nn.Module:
    """Build transformers' model with the weights and the frozen parameters of our model `model`.

    All dropout rates are 0.1, as in `model=detr_r50`. The model is built from a config, so nothing is downloaded.
    `attention` is transformers' option attn_implementation; "sdpa" is PyTorch's fused attention. With `auxiliary_loss`,
    the loss is that of all decoder layers. Parameters are frozen here, because transformers 5.23 does not freeze the
    backbone's first stages, although its code tries to.
    """
    dropout = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    queries = model.queries.num_embeddings
    options = DetrConfig(num_labels=CLASSES, num_queries=queries, auxiliary_loss=auxiliary_loss, **dropout)
    theirs: nn.Module = AutoModelForObjectDetection.from_config(options, attn_implementation=attention)
    theirs.load_state_dict(to_transformers(model.state_dict()))
    trained = to_transformers({name: p for name, p in model.named_parameters() if p.requires_grad})
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trained)
    return theirs
