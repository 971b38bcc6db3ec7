"""Compare our image GPT with transformers', on weights from a file of transformers or the authors' arrays.

The authors' arrays are converted to transformers' names and shapes, independently of our import.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.task import Adopted
from common.weights.renaming import identify_format
from scripts.verify.images import IMAGES, SEED, ForeignFile, Kind, Outputs, Peer, Size
from scripts.verify.peers import from_pretrained
from vit.importing import image_gpt as importing

MODEL = "vit.models.image_gpt.ImageGpt"
AUTHORS = "authors"
HEADS = {  # our name of an output -> transformers' class and the tensor without which the file has no such output
    "colours": ("ImageGPTForCausalImageModeling", "lm_head.weight"),
    "classes": ("ImageGPTForImageClassification", "score.weight"),
}


def _adopt(content: dict[str, Any], folder: Path, size: Size | None) -> Adopted:
    return importing.adopt(content, None, folder)


def image_size(file: ForeignFile) -> Size:
    """Return a size of images with as many pixels as the file has positions."""
    pixels = len(file.weights["positions.table.weight"])
    if file.configured_size and math.prod(file.configured_size) == pixels:
        return file.configured_size
    side = math.isqrt(pixels)
    return (side, side) if side * side == pixels else (1, pixels)


def required_options(file: ForeignFile) -> dict[str, Any]:
    """See Kind. Only the authors' arrays have a dimension for the heads."""
    weights = file.weights
    required = {
        "width": weights["embedding.weight"].shape[1],
        "layers": sum(name.endswith("attention.in_proj.weight") for name in weights),
        "feedforward": len(weights["decoder.blocks.0.feed_forward.expand.weight"]),
    }
    if file.layout == AUTHORS:
        required["heads"] = len(file.tensors["model/h0/attn/q_proj"])
    return required


def _arguments(file: ForeignFile, size: Size) -> dict[str, Any]:
    return {"colours": len(file.weights["embedding.weight"]) - 1, "classes": file.classes, "image_size": size}


def _sample_colours(file: ForeignFile, size: Size) -> tuple[Tensor, ...]:
    colours = len(file.weights["embedding.weight"]) - 1
    return (torch.randint(colours, (IMAGES, math.prod(size)), generator=torch.Generator().manual_seed(SEED)),)


def _outputs(model: Any, tokens: Tensor) -> Outputs:
    colours, classes = model(tokens)
    outputs = {"features": model.layer_features(tokens)[-1], "colours": colours}
    return outputs if classes is None else {**outputs, "classes": classes}


def _transformers(file: ForeignFile, size: Size, tokens: Tensor) -> Outputs:
    """Compute with transformers, whose model gets the start token and all pixels but the last."""
    from transformers import ImageGPTConfig

    tensors = _as_transformers(file.used_tensors) if file.layout == AUTHORS else file.used_tensors
    options, colours = file.options, len(file.weights["embedding.weight"]) - 1
    config = ImageGPTConfig(
        vocab_size=colours + 1,
        n_positions=tokens.shape[1],
        n_embd=options["width"],
        n_layer=options["layers"],
        n_head=options["heads"],
        n_inner=options["feedforward"],
        layer_norm_epsilon=options["norm_eps"],
        num_labels=file.classes or 1,
        use_cache=False,
    )
    begun = torch.cat([tokens.new_full((len(tokens), 1), colours), tokens[:, :-1]], dim=1)
    model = from_pretrained("ImageGPTModel", config, tensors)
    outputs: Outputs = {"features": model(input_ids=begun).last_hidden_state.mean(1)}
    for name, (kind, head) in HEADS.items():
        if head in tensors:
            outputs[name] = from_pretrained(kind, config, tensors)(input_ids=begun).logits
    return outputs


def _as_transformers(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the authors' arrays to transformers' names and shapes, with biases of zero.

    Of a file without a start token, which has a masked objective, the start token is zero.
    """
    tensors = {name.removeprefix("model/"): tensor for name, tensor in arrays.items()}
    width = tensors["wte"].shape[1]
    start = tensors.get("sos", torch.zeros(width))
    state = {
        "transformer.wte.weight": torch.cat([tensors["wte"], start.view(1, -1)]),
        "transformer.wpe.weight": tensors["wpe"],
        "transformer.ln_f.weight": tensors["ln_f/g"],
    }
    heads = {"lm_head.weight": "wtet", "score.weight": "clf/wclf"}
    state |= {theirs: tensors[name] for theirs, name in heads.items() if name in tensors}
    for i in range(sum(bool(re.fullmatch(r"h\d+/ln_1/g", name)) for name in tensors)):
        of_block, block = f"h{i}/", f"transformer.h.{i}."
        # A map of transformers is x @ weight + bias; the authors' projections are (heads, channels of a head, width).
        rows = [tensors[f"{of_block}attn/{part}_proj"].reshape(width, width) for part in "qkv"]
        maps = {
            "attn.c_attn": torch.cat(rows).T,
            "attn.c_proj": tensors[f"{of_block}attn/c_proj"].reshape(width, width),
            "mlp.c_fc": tensors[f"{of_block}mlp/c_fc/w"],
            "mlp.c_proj": tensors[f"{of_block}mlp/c_proj/w"],
        }
        state |= {f"{block}{name}.weight": weight for name, weight in maps.items()}
        state |= {f"{block}{name}.bias": torch.zeros(weight.shape[1]) for name, weight in maps.items()}
        state |= {f"{block}ln_{n}.weight": tensors[f"{of_block}ln_{n}/g"] for n in (1, 2)}
    return state


KIND = Kind(
    adopt=_adopt,
    recognise=lambda tensors: identify_format(tensors, importing.FORMAT_PATTERNS),
    peers={form: Peer("transformers", _transformers) for form in importing.FORMATS},
    required_options=required_options,
    undecided=("heads", "norm_eps"),
    image_size=image_size,
    notes=lambda file: ["both models compute the autoregressive objective, with quick GELU"],
    arguments=_arguments,
    inputs=_sample_colours,
    outputs=_outputs,
)
