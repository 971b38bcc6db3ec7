"""What the peers of several models share: load a file into a model of another program, and compute its outputs."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from scripts.verify.images import ForeignFile, Outputs


def torchvision_outputs(model: Any, file: ForeignFile, images: Tensor, head: str) -> Outputs:
    """Compute features and, if the file has a head, logits of a classifier of torchvision with the file's tensors.

    `head` is the name of the model's attribute that maps features to logits.
    """
    state = file.used_tensors
    layer = getattr(model, head)
    if not file.classes:
        state |= {f"{head}.{name}": tensor for name, tensor in layer.state_dict().items()}
    model.eval().load_state_dict(state)
    setattr(model, head, nn.Identity())
    features = model(images)
    return {"features": features, **({"logits": layer(features)} if file.classes else {})}


def timm_outputs(model: Any, state: Mapping[str, Tensor], images: Tensor) -> Outputs:
    """Compute features and, if timm's model has a head, logits of the model with the tensors `state`."""
    model.eval().load_state_dict(state)
    tokens = model.forward_features(images)
    features = model.forward_head(tokens, pre_logits=True)
    return {"features": features, **({"logits": model.forward_head(tokens)} if model.num_classes else {})}


def from_pretrained(name: str, config: Any, tensors: Mapping[str, Tensor], **arguments: Any) -> Any:
    """Load tensors with the class `name` of transformers, from a temporary folder with the model's config.json.

    Tensors keep their names. If these are names of an older version of transformers, transformers renames them. Raises
    ValueError if a tensor is missing.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        state = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(state, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        model, report = getattr(transformers, name).from_pretrained(
            scratch, **arguments, dtype=torch.float32, output_loading_info=True
        )
    missing = [key for key in report["missing_keys"] if "mask_token" not in key]
    if missing:
        raise ValueError(f"{sorted(missing)[0]} is missing")
    return model.eval()
