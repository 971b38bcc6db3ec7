"""Import GPT-2 (Radford et al. 2019) in transformers' layout, as OpenAI and others publish it, with its tokenizer.

The names of tensors begin with "transformer." or, as in OpenAI's files, have no prefix. Causal masks, which older files
hold, are left out. The tokenizer is read from the folder of the file: tokenizer.json, or vocab.json and merges.txt.

Differs: the file does not hold the number of heads (`model.heads`), the activation (`model.blocks.activation`) and the
epsilon of the norms (`model.blocks.norm_eps`). If there is a config.json in the folder, a note tells its values.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import unwrapping
from common.weights.layers import GPT2, GPT2_MASKS, GPT2_TRANSPOSED
from common.weights.renaming import Table, rename
from common.weights.unwrapping import floats
from seq2seq.importing.beside import read_object, read_tokenizer

HEAD = "lm_head.weight"
EMBEDDING = "embedding.weight"
NAMES = Table((HEAD, HEAD), *GPT2)
SUPPORTED = "a GPT-2 in transformers' layout"
PATTERN = r"^(transformer\.)?(wte\.weight|h\.\d+\.attn\.c_attn\.weight)$"
# The activations of transformers' config by our names.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Options of transformers' config that change the model, and that ours lacks: name -> GPT-2's value.
FIXED_OPTIONS = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}


def is_gpt2(tensors: dict[str, Any]) -> bool:
    """Whether the names of the tensors are those of transformers' GPT-2, or of a model that is derived from it."""
    return any(re.match(PATTERN, name) for name in tensors)


def adopt(content: dict[str, Any], folder: Path | None) -> Adopted:
    """Convert the content of a GPT-2 file to our weights, and read the tokenizer in `folder`, if there is one.

    Raises UserError for an unsupported file, and for a tokenizer whose number of entries differs from that of the
    weights.
    """
    tensors, left_out = unwrapping.unwrap(content, ("model",), SUPPORTED)
    if not is_gpt2(tensors):
        raise UserError(f"The checkpoint has {next(iter(tensors))} and is no GPT-2; give {SUPPORTED}.")
    parts = rename(floats(tensors), NAMES.to_ours, GPT2_MASKS)
    if parts.unknown:
        raise UserError(f"The checkpoint has {parts.unknown[0]}, which GPT-2 lacks; give {SUPPORTED}.")
    weights = _tied(parts.tensors)
    _check_layout(weights)
    weights = {n: t.T.contiguous() if re.fullmatch(GPT2_TRANSPOSED, n) else t for n, t in weights.items()}
    tokenizer, notes = read_tokenizer(folder, len(weights[EMBEDDING]))
    state = {"tokenizers": [tokenizer.state()]} if tokenizer else {}
    return Adopted(weights, state, left_out + parts.left_out, (*notes, *_config_notes(folder)))


def _tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the output's matrix, which is that of the embedding; raises UserError if it is another one."""
    head = tensors.pop(HEAD, None)
    if EMBEDDING not in tensors:
        raise UserError(f"The checkpoint has no wte.weight, the embedding of tokens; give {SUPPORTED}.")
    if head is not None and not torch.equal(head, tensors[EMBEDDING]):
        raise UserError(
            f"The checkpoint's output, {HEAD}, is not the embedding wte.weight, and GPT-2 has one matrix for both; "
            f"give {SUPPORTED}."
        )
    return tensors


def _check_layout(weights: dict[str, Tensor]) -> None:
    """Raise UserError if the matrices of blocks are stored as (out, in), as in nanoGPT's files."""
    width = weights[EMBEDDING].shape[1]
    for name, tensor in weights.items():
        if name.endswith("in_proj.weight") and tuple(tensor.shape) == (3 * width, width):
            raise UserError(
                f"The checkpoint holds the matrices of its blocks as (out, in) ({3 * width} x {width}), as nanoGPT "
                "does; convert it to transformers' layout, which has them as (in, out), first."
            )


def _config_notes(folder: Path | None) -> list[str]:
    """A note on what config.json in `folder` says of options that the weights do not hold; empty without such a file.

    Raises UserError for options that our model lacks.
    """
    content = read_object(folder, "config.json")
    for name, value in FIXED_OPTIONS.items():
        if content.get(name, value) != value:
            raise UserError(f"config.json beside the checkpoint says {name}={content[name]}; give {SUPPORTED}.")
    keys = {
        "model.heads": content.get("n_head"),
        "model.blocks.activation": ACTIVATIONS.get(str(content.get("activation_function"))),
        "model.blocks.norm_eps": content.get("layer_norm_epsilon"),
    }
    stated = " ".join(f"{key}={value}" for key, value in keys.items() if value is not None)
    return [f"config.json beside the file says {stated}, which the weights do not hold"] if stated else []
