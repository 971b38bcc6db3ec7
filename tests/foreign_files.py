"""Files of other programs with random tensors, for tests of imports: small models of these programs, and their layouts.

A function named after a program returns a model of it, and `as_...` converts a state dict to another program's names.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from parity import by_fan_in, randomised
from torch import Tensor, nn

from common.machine.seeds import generator
from common.task import Adopted

Tensors = dict[str, Tensor]
CLASSES = 7


def replaced(state: Tensors, words: dict[str, str]) -> Tensors:
    """The tensors with all words in their names replaced, in order."""
    for old, new in words.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


def swap_in_import(monkeypatch: pytest.MonkeyPatch, importer: Any, first: str, second: str) -> None:
    """Make the function `adopt` of the module `importer` swap two of the tensors that it returns."""
    original = importer.adopt

    def swapping(*arguments: Any) -> Adopted:
        adopted: Adopted = original(*arguments)
        swapped = {first: adopted.weights[second], second: adopted.weights[first]}
        return adopted._replace(weights={**adopted.weights, **swapped})

    monkeypatch.setattr(importer, "adopt", swapping)


# Swin Transformers.

SWIN_SIDE, SWIN_WINDOW, SWIN_WIDTH = 32, 4, 24  # images of 32 pixels, windows of 4 tokens of 2 x 2 pixels
SWIN_STAGES = {"depths": [2, 2, 3], "heads": [2, 3, 4]}


def timms_swin(classes: int = CLASSES, **keys: Any) -> Any:
    module = pytest.importorskip("timm.models.swin_transformer")
    shape = {"img_size": SWIN_SIDE, "patch_size": 2, "embed_dim": SWIN_WIDTH, "window_size": SWIN_WINDOW}
    stages = {"depths": SWIN_STAGES["depths"], "num_heads": SWIN_STAGES["heads"], "drop_path_rate": 0.0}
    return randomised(module.SwinTransformer(**{**shape, **stages, **keys}, num_classes=classes), std=by_fan_in)


def torchvisions_swin() -> Any:
    shape = ([2, 2], SWIN_WIDTH, SWIN_STAGES["depths"], SWIN_STAGES["heads"], [SWIN_WINDOW] * 2)
    model = torchvision.models.SwinTransformer(*shape, stochastic_depth_prob=0.0, num_classes=CLASSES)
    return randomised(model, std=by_fan_in)


def as_official_swin(timm: Tensors) -> Tensors:
    """A file of timm with the names and the additional buffers of the official code."""
    file = {}
    for name, tensor in timm.items():
        parts = name.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        file[".".join(parts).replace("head.fc.", "head.")] = tensor
    for name in [name for name in file if name.endswith("bias_table")]:
        file[name.replace("bias_table", "index")] = torch.zeros(SWIN_WINDOW**2, SWIN_WINDOW**2, dtype=torch.int64)
    file["layers.0.blocks.1.attn_mask"] = torch.zeros(16, SWIN_WINDOW**2, SWIN_WINDOW**2)
    return file


# TNT.

TNT_SIDE, TNT_PATCH, TNT_WIDTH, TNT_LAYERS = 32, 8, 32, 2
AUTHORS_TNT = {  # timm's words -> the authors'
    "patch_pos": "outer_pos",
    "pixel_pos": "inner_pos",
    "pixel_embed": "patch_embed",
    "norm1_proj": "proj_norm1",
    "norm2_proj": "proj_norm2",
    "norm_mlp_in": "inner_norm2",
    "norm_in": "inner_norm1",
    "attn_in": "inner_attn",
    "mlp_in": "inner_mlp",
    "norm_out": "outer_norm1",
    "attn_out": "outer_attn",
    "norm_mlp": "outer_norm2",
    ".mlp.": ".outer_mlp.",
}


def timms_tnt(**keys: Any) -> Any:
    """timm's model with random parameters that give activations of about one."""
    module = pytest.importorskip("timm.models.tnt")
    shape = {"img_size": TNT_SIDE, "patch_size": TNT_PATCH, "embed_dim": TNT_WIDTH, "inner_dim": 12}
    shape |= {"depth": TNT_LAYERS, "num_heads_inner": 4, "num_heads_outer": 2, "num_classes": CLASSES}
    model = module.TNT(**{**shape, **keys})
    random = generator("tnt file")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5, generator=random)
        else:
            inputs = parameter[0].numel() if parameter.ndim > 1 and not name.endswith(("pos", "token")) else 4
            nn.init.normal_(parameter, std=inputs**-0.5, generator=random)
    return model.eval()


def as_authors_tnt(timm: Tensors) -> Tensors:
    """timm's tensors as in a file of the authors, with a tensor that their network never uses."""
    file = {"outer_tokens": torch.zeros(1, 16, TNT_WIDTH), **replaced(timm, AUTHORS_TNT)}
    return {**file, "inner_pos": file["inner_pos"].flatten(2).mT}


# ResNets.


def randomised_resnet(model: nn.Module) -> Any:
    """The model with all tensors sampled, so that activations stay of about one.

    The ones and zeros of untrained norms would hide a mistake.
    """
    random = generator("resnet")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5, generator=random)
            elif tensor.ndim == 1:
                tensor.normal_(std=0.3, generator=random)
            elif tensor.ndim > 1:
                tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5, generator=random)
    return model.eval()


# Image GPT.

COLOURS, GPT_CLASSES, GPT_SIZE, GPT_WIDTH, GPT_HEADS, GPT_LAYERS = 11, 5, (3, 4), 24, 3, 2
PIXELS = math.prod(GPT_SIZE)


def write_palette(folder: Path, count: int = COLOURS) -> np.ndarray:
    centres = np.random.default_rng(0).uniform(-1, 1, (count, 3)).astype(np.float32)
    np.save(folder / "kmeans_centers.npy", centres)
    return centres


def authors_gpt_arrays() -> dict[str, np.ndarray]:
    rng, head = np.random.default_rng(1), GPT_WIDTH // GPT_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model/wpe": (PIXELS, GPT_WIDTH),
        "model/wte": (COLOURS, GPT_WIDTH),
        "model/wtet": (COLOURS, GPT_WIDTH),
        "model/sos": (GPT_WIDTH,),
        "model/ln_f/g": (GPT_WIDTH,),
        "model/clf/wclf": (GPT_CLASSES, GPT_WIDTH),
    }
    for i in range(GPT_LAYERS):
        shapes |= {f"model/h{i}/attn/{part}_proj": (GPT_HEADS, head, GPT_WIDTH) for part in "qkvc"}
        shapes |= {f"model/h{i}/ln_{n}/g": (GPT_WIDTH,) for n in (1, 2)}
        shapes |= {f"model/h{i}/mlp/c_fc/w": (GPT_WIDTH, 4 * GPT_WIDTH)}
        shapes |= {f"model/h{i}/mlp/c_proj/w": (4 * GPT_WIDTH, GPT_WIDTH)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def transformers_gpt(kind: str) -> nn.Module:
    """transformers' model with random weights, and with biases of zero, as in the published files."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": COLOURS + 1, "n_positions": PIXELS, "n_embd": GPT_WIDTH}
    shape |= {"n_layer": GPT_LAYERS, "n_head": GPT_HEADS, "num_labels": GPT_CLASSES}
    model: nn.Module = getattr(transformers, f"ImageGPT{kind}")(transformers.ImageGPTConfig(**shape, use_cache=False))
    rng = generator("peer", kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if name.endswith("bias") else parameter.normal_(std=0.3, generator=rng)
            if "ln_" in name:
                parameter.uniform_(0.5, 1.5, generator=rng)
    return model.eval()


# Masked autoencoders.

MAE_WIDTH, MAE_HEADS, MAE_LAYERS, MAE_PATCH, MAE_SIDE = 24, 3, 2, 4, 16
MAE_DECODER = {"width": 16, "heads": 2, "layers": 2, "feedforward": 64}
HUB_VIT = {  # version 5 of transformers -> the names in published files
    "vit.layers.": "vit.encoder.layer.",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
AUTHORS_MAE = {
    "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "vit.embeddings.cls_token": "cls_token",
    "vit.embeddings.position_embeddings": "pos_embed",
    "vit.layernorm.": "norm.",
    "vit.layers.": "blocks.",
    "decoder.mask_token": "mask_token",
    "decoder.decoder_pos_embed": "decoder_pos_embed",
    "decoder.decoder_layers.": "decoder_blocks.",
    "decoder.decoder_": "decoder_",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
}


def transformers_mae() -> Any:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": MAE_WIDTH, "num_hidden_layers": MAE_LAYERS, "num_attention_heads": MAE_HEADS}
    shape |= {"intermediate_size": 4 * MAE_WIDTH, "patch_size": MAE_PATCH, "image_size": MAE_SIDE}
    shape |= {"decoder_hidden_size": MAE_DECODER["width"], "decoder_num_attention_heads": MAE_DECODER["heads"]}
    shape |= {"decoder_num_hidden_layers": MAE_DECODER["layers"]}
    shape |= {"decoder_intermediate_size": MAE_DECODER["feedforward"], "layer_norm_eps": 1e-6, "mask_ratio": 0.75}
    return randomised(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**shape)), std=0.2)


def as_authors_mae(state: Tensors) -> Tensors:
    """The tensors in the layout of facebookresearch/mae: q, k and v are one matrix."""
    renamed, file = replaced(state, AUTHORS_MAE), {}
    for name, tensor in renamed.items():
        if "q_proj" in name:
            parts = [tensor, *(renamed[name.replace("q_proj", f"{part}_proj")] for part in "kv")]
            file[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            file[name] = tensor
    return file
