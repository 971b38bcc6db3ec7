"""Load another program's ViT file into a model of torchvision, timm or transformers, to compare it with our model."""

import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from common.errors import UserError
from vit.importing import adopt as importing
from vit.importing import google

# For each layout of a file, the package that loads the file for the comparison.
PEERS = {"torchvision": "torchvision", "timm": "timm", "transformers": "transformers", "google": "timm"}

# "features" (B, C) of the model's width C, and "logits" (B, K) for K classes if the file has a head that the package
# can apply.
Outputs = dict[str, Tensor]
Peer = Callable[[Tensor], Outputs]  # takes images (B, channels, H, W)


class ForeignFile(NamedTuple):
    """A ViT file of another program: its tensors, and the weights to which our import converts them."""

    path: Path
    layout: str  # a key of PEERS
    tensors: dict[str, Tensor]  # by the file's names
    weights: dict[str, Tensor]  # by our names
    left_out: list[str]  # names of the file's tensors and other content that the import does not use
    options: dict[str, Any]  # the section `model` of the config

    @property
    def image_size(self) -> tuple[int, int]:
        """The (height, width) in pixels of images with the same grid of patches as the positions in `weights`."""
        rows, columns, _ = self.weights["positions.grid"].shape
        side = self.weights["patches.weight"].shape[-1]
        return rows * side, columns * side

    @property
    def classes(self) -> int:
        """The number of classes of the head; 0 without a head."""
        return len(self.weights.get("head.weight", ()))


def load_peer(file: ForeignFile) -> Peer:
    """Load the file with the package for its layout, and return the model as a function from images to outputs.

    Raises UserError if the package is not installed or cannot read the file.
    """
    package = PEERS[file.layout]
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{file.path} has the layout {file.layout}, whose reader {package} is not installed; pip install {package}."
        ) from error
    try:
        return {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}[package](file)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{package} {metadata.version(package)} cannot read {file.path} ({reason}), although our code "
            "can; so nothing can be compared."
        ) from error


def _torchvision(file: ForeignFile) -> Peer:
    from torchvision.models import VisionTransformer

    options = file.options
    model = VisionTransformer(
        *(file.image_size[0], options["patch_size"], options["layers"], options["heads"]),
        *(options["width"], options["feedforward"]),
        num_classes=file.classes or 1,
        representation_size=options["representation"] if file.classes else None,
        norm_layer=partial(nn.LayerNorm, eps=options["blocks"]["norm_eps"]),
    ).eval()
    state = {name: tensor.float() for name, tensor in file.tensors.items() if name not in file.left_out}
    if not file.classes:
        state |= {f"heads.{name}": tensor for name, tensor in model.heads.state_dict().items()}
    model.load_state_dict(state)
    head, model.heads = model.heads, nn.Identity()

    def forward(images: Tensor) -> Outputs:
        features = model(images)
        return {"features": features, **({"logits": head(features)} if file.classes else {})}

    return forward


def _timm(file: ForeignFile) -> Peer:
    """Load the file into timm's model, built from the config's options and the names and shapes of the file's tensors.

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
    height, width = file.image_size
    positions = next((t.shape[-2] for name, t in tensors.items() if name.endswith(("pos_embed", "pos_embedding"))), 0)
    patches = height * width // options["patch_size"] ** 2
    classes = file.classes if options["representation"] is None else 0
    distilled = "dist_token" in tensors
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(
        img_size=(height, width),
        patch_size=options["patch_size"],
        in_chans=file.weights["patches.weight"].shape[1],
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

    def forward(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)
        features = tokens[:, 0] if distilled else model.forward_head(tokens, pre_logits=True)
        return {"features": features, **({"logits": model.forward_head(tokens)} if classes else {})}

    return forward


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


def _transformers(file: ForeignFile) -> Peer:
    """Load the file's tensors with transformers, from a temporary folder with a config.json for our options.

    Tensors keep the file's names. If these are names of an older version of transformers, transformers renames them.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options, tensors = file.options, file.tensors
    blocks = options["blocks"]
    arguments = {
        "hidden_size": options["width"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": options["heads"],
        "image_size": file.image_size[0],
        "patch_size": options["patch_size"],
        "num_channels": file.weights["patches.weight"].shape[1],
        "num_labels": file.classes,
        "layer_norm_eps": blocks["norm_eps"],
        "hidden_act": {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[blocks["activation"]],
        "qkv_bias": any(name.endswith(("query.bias", "q_proj.bias")) for name in tensors),
    }
    if blocks["layer_scale"] is None:
        kind = "DeiT" if options["distillation_token"] else "ViT"
        head = "ForImageClassificationWithTeacher" if options["distillation_token"] else "ForImageClassification"
        config = getattr(transformers, f"{kind}Config")(**arguments, intermediate_size=options["feedforward"])
        model_class: Any = getattr(transformers, f"{kind}{head if file.classes else 'Model'}")
        more: dict[str, Any] = {} if file.classes else {"add_pooling_layer": False}
    else:
        kind = "Dinov2WithRegisters" if options["registers"] else "Dinov2"
        ratio = options["feedforward"] // options["width"]
        registers = {"num_register_tokens": options["registers"]} if options["registers"] else {}
        config = getattr(transformers, f"{kind}Config")(**arguments, **registers, mlp_ratio=ratio)
        model_class, more = getattr(transformers, f"{kind}Model"), {}
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        state = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(state, Path(scratch) / "model.safetensors", metadata={"format": "pt"})
        model, report = model_class.from_pretrained(scratch, **more, dtype=torch.float32, output_loading_info=True)
    missing = [name for name in report["missing_keys"] if "mask_token" not in name]
    if missing:
        raise ValueError(f"{sorted(missing)[0]} is missing")
    model.eval()

    def forward(images: Tensor) -> Outputs:
        features = model.base_model(pixel_values=images).last_hidden_state[:, 0]
        return {"features": features, **({"logits": model(pixel_values=images).logits} if file.classes else {})}

    return forward
