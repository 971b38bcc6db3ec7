"""Load another program's ViT file into a model of torchvision, timm or transformers, to compare it with our model."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scripts.verify.images import ForeignFile, Outputs, Peer, Size
from scripts.verify.peers import from_pretrained, torchvision_outputs
from vit.importing import adopt as importing
from vit.importing import google


def _torchvision(file: ForeignFile, size: Size, images: Tensor) -> Outputs:
    from torchvision.models import VisionTransformer

    options = file.options
    model = VisionTransformer(
        *(size[0], options["patch_size"], options["layers"], options["heads"]),
        *(options["width"], options["feedforward"]),
        num_classes=file.classes or 1,
        representation_size=options["representation"] if file.classes else None,
        norm_layer=partial(nn.LayerNorm, eps=options["blocks"]["norm_eps"]),
    )
    return torchvision_outputs(model, file, images, "heads")


def _timm(file: ForeignFile, size: Size, images: Tensor) -> Outputs:
    """Compute with timm's model, built from the config's options and the names and shapes of the file's tensors.

    The outputs have no logits if the file has no head, or if the config has a representation layer, which timm's model
    does not have.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    options, tensors = file.options, file.tensors
    google_file = file.layout == importing.GOOGLE
    prefix = google.find_prefix(tensors) if google_file else ""
    token = f"{prefix}cls" in tensors if google_file else "cls_token" in tensors
    registers = next((tensors[name].shape[1] for name in ("reg_token", "register_tokens") if name in tensors), 0)
    height, width = size
    positions = next((t.shape[-2] for name, t in tensors.items() if name.endswith(("pos_embed", "pos_embedding"))), 0)
    patches = height * width // options["patch_size"] ** 2
    classes = file.classes if options["representation"] is None else 0
    distilled = "dist_token" in tensors
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=(height, width),
        patch_size=options["patch_size"],
        in_chans=file.channels,
        num_classes=classes,
        global_pool="token" if options["pooling"] == "token" else "avg",
        fc_norm=options["pooling"] == "mean_then_norm",
        class_token=token,
        reg_tokens=registers,
        # True if the position table of timm's model has a row for each patch and no row for the class token. This is so
        # if the file has such a table or no positions, and for DINOv2's files with registers. While loading the latter,
        # timm adds the class token's position to the class token.
        no_embed_class="register_tokens" in tensors or positions in (0, patches),
        embed_dim=options["width"],
        depth=options["layers"],
        num_heads=options["heads"],
        mlp_ratio=(options["feedforward"] + 0.5) / options["width"],  # timm computes int(width * ratio)
        qkv_bias=google_file or "blocks.0.attn.qkv.bias" in tensors,
        qk_norm=options["blocks"]["qk_norm"],
        init_values=options["blocks"]["layer_scale"],
        act_layer=options["blocks"]["activation"],
        norm_layer=partial(nn.LayerNorm, eps=options["blocks"]["norm_eps"]),
    ).eval()
    if google_file:
        _load_npz(model, file, prefix)
    else:
        state = checkpoint_filter_fn({name: t.float() for name, t in tensors.items()}, model, adapt_layer_scale=True)
        unused = ("head.", "head_dist.") if not classes else ()
        state = {name: t for name, t in state.items() if name not in file.left_out and not name.startswith(unused)}
        model.load_state_dict(state)

    tokens = model.forward_features(images)
    features = tokens[:, 0] if distilled else model.forward_head(tokens, pre_logits=True)
    return {"features": features, **({"logits": model.forward_head(tokens)} if classes else {})}


def _load_npz(model: Any, file: ForeignFile, prefix: str) -> None:
    """Load the .npz file into timm's model.

    timm's loader needs fp32 and a table of positions. If the file is in bfloat16, or has no positions because they are
    fixed sines, the loader gets an fp32 copy of the file with positions. `prefix` is that of the file's tensor names.
    """
    has_positions = any(name.endswith("pos_embedding") for name in file.tensors)
    if has_positions and not any(tensor.dtype == torch.bfloat16 for tensor in file.tensors.values()):
        model.load_pretrained(str(file.path))
        return
    arrays: dict[str, Any] = {name: tensor.float().numpy() for name, tensor in file.tensors.items()}
    if not has_positions:
        arrays[f"{prefix}pos_embedding"] = file.weights["positions.grid"].flatten(0, 1)[None].numpy()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy.npz"
        np.savez(copy, **arrays)
        model.load_pretrained(str(copy))


def _transformers(file: ForeignFile, size: Size, images: Tensor) -> Outputs:
    import transformers

    options, tensors = file.options, file.tensors
    blocks = options["blocks"]
    arguments = {
        "hidden_size": options["width"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": options["heads"],
        "image_size": size[0],
        "patch_size": options["patch_size"],
        "num_channels": file.channels,
        "num_labels": file.classes,
        "layer_norm_eps": blocks["norm_eps"],
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[blocks["activation"]],
        "qkv_bias": any(name.endswith(("query.bias", "q_proj.bias")) for name in tensors),
    }
    if blocks["layer_scale"] is None:
        kind = "DeiT" if options["distillation_token"] else "ViT"
        head = "ForImageClassificationWithTeacher" if options["distillation_token"] else "ForImageClassification"
        config = getattr(transformers, f"{kind}Config")(**arguments, intermediate_size=options["feedforward"])
        name = f"{kind}{head if file.classes else 'Model'}"
        more: dict[str, Any] = {} if file.classes else {"add_pooling_layer": False}
    else:
        kind = "Dinov2WithRegisters" if options["registers"] else "Dinov2"
        ratio = options["feedforward"] // options["width"]
        registers = {"num_register_tokens": options["registers"]} if options["registers"] else {}
        config = getattr(transformers, f"{kind}Config")(**arguments, **registers, mlp_ratio=ratio)
        name, more = f"{kind}Model", {}
    model = from_pretrained(name, config, tensors, **more)
    features = model.base_model(pixel_values=images).last_hidden_state[:, 0]
    return {"features": features, **({"logits": model(pixel_values=images).logits} if file.classes else {})}


PEERS = {
    "torchvision": Peer("torchvision", _torchvision),
    "timm": Peer("timm", _timm),
    "transformers": Peer("transformers", _transformers),
    importing.GOOGLE: Peer("timm", _timm),
}
