"""Import image GPTs of the authors (arrays in an .npz file) and of transformers, with their palettes.

The authors publish TensorFlow checkpoints. Their arrays are read from an .npz file under their own names, which
TensorFlow writes: `numpy.savez("igpt_s.npz", **{name: reader.get_tensor(name) for name in
reader.get_variable_to_shape_map()})` with `reader = tf.train.load_checkpoint(FILE)`. The files do not hold the palette.
It is read from the folder of the file: from kmeans_centers.npy (the authors' file), or from preprocessor_config.json
(that of transformers).

Differs: the models of transformers have biases and ours has none. The published files hold zeros, which are left out;
a file with other biases is refused. The file does not hold the number of heads (`model.heads`), the activation (quick
GELU is assumed) and the epsilon of the norms (`model.norm_eps`).
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import projections, unwrapping
from common.weights.layers import GPT2, GPT2_MASKS, GPT2_TRANSPOSED
from common.weights.renaming import Table, identify_format, rename, with_prefixes
from common.weights.unwrapping import floats

BLOCK = "decoder.blocks.{i}."
OFFICIAL = Table(
    ("model/wpe", "positions.table.weight"),
    ("model/wte", "embedding.weight"),
    ("model/sos", "start"),
    ("model/wtet", "output.weight"),
    ("model/ln_f/g", "decoder.norm.weight"),
    ("model/clf/wclf", "head.weight"),
    *with_prefixes(
        "model/h{i}/",
        BLOCK,
        (
            ("ln_1/g", "residuals.0.norm.weight"),
            ("ln_2/g", "residuals.1.norm.weight"),
            ("attn/{qkv}_proj", "attention.{qkv}.weight"),
            ("attn/c_proj", "attention.out_proj.weight"),
            ("mlp/c_fc/w", "feed_forward.expand.weight"),
            ("mlp/c_proj/w", "feed_forward.contract.weight"),
        ),
    ),
)
TRANSFORMERS = Table(("lm_head.", "output."), ("score.", "head."), *GPT2)
FORMATS = {"authors": OFFICIAL, "transformers": TRANSFORMERS}
FORMAT_PATTERNS = ((r"^model/wte$", "authors"), (r"^(transformer\.)?wte\.weight$", "transformers"))
LEFT_OUT = rf"{GPT2_MASKS}|global_step"  # causal masks in transformers' older files; the step's number
SUPPORTED_FILES = "an image GPT of transformers, or an .npz file with the authors' arrays"
CENTRES, PREPROCESSOR = "kmeans_centers.npy", "preprocessor_config.json"


def adopt(content: dict[str, Any], classes: list[str] | None, folder: Path) -> Adopted:
    """Convert the content of another program's file to our weights and task state.

    `classes` are the names of the data's classes, or None. `folder` is the file's folder, which holds the palette.
    Raises UserError for an unsupported file, and if the folder has no palette of as many colours as the file.
    """
    tensors, left_out = unwrapping.unwrap(content, ("model",), SUPPORTED_FILES)
    form = identify_format(tensors, FORMAT_PATTERNS)
    if form is None:
        raise UserError(f"The checkpoint has {next(iter(tensors))} and is no image GPT; give {SUPPORTED_FILES}.")
    parts = rename(floats(tensors), FORMATS[form].to_ours, LEFT_OUT)
    if parts.unknown:
        raise UserError(f"The checkpoint has {parts.unknown[0]}, which image GPT lacks; give {SUPPORTED_FILES}.")
    weights, notes = _without_biases(parts.tensors), list[str]()
    if form == "authors":
        weights, notes = _with_start(projections.join({name: _matrix(name, t) for name, t in weights.items()}))
    weights = {name: t.T.contiguous() if _is_transposed(name, form) else t for name, t in weights.items()}
    palette = read_palette(folder)
    if len(palette) + 1 != len(weights["embedding.weight"]):
        raise UserError(
            f"The checkpoint has {len(weights['embedding.weight']) - 1} colours, and the palette beside it "
            f"{len(palette)}; put the palette of the same model into {folder}."
        )
    names = list(classes or [])
    if "head.weight" in weights and len(names) != len(weights["head.weight"]):
        names = [f"class {i}" for i in range(len(weights["head.weight"]))]
    state = {"palette": palette, "lossless": False, "classes": names}
    return Adopted(weights, state, left_out + parts.left_out, tuple(notes))


def read_palette(folder: Path) -> list[list[float]]:
    """Read the palette from `kmeans_centers.npy` or `preprocessor_config.json` in `folder`: V colours in [-1, 1].

    Raises UserError if there is neither, or if its content is not a list of colours.
    """
    try:
        if (folder / CENTRES).is_file():
            centres = np.load(folder / CENTRES, allow_pickle=False)
        elif (folder / PREPROCESSOR).is_file():
            centres = np.asarray(json.loads((folder / PREPROCESSOR).read_text(encoding="utf-8"))["clusters"])
        else:
            raise UserError(
                f"The palette of colours is missing, which the checkpoint does not hold; put {CENTRES} (of the "
                f"authors) or {PREPROCESSOR} (of transformers) into {folder}."
            )
        values: list[list[float]] = centres.astype(np.float32).tolist()
        if centres.ndim != 2 or centres.shape[1] not in (1, 3) or not np.abs(centres).max() <= 1.5:
            raise ValueError(f"an array of shape {centres.shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: the palette cannot be read ({error}); expected (colours, 3) numbers from -1 to 1, as published."
        ) from error
    return values


def _without_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out biases, which are zeros in published files; raises UserError if one is not zero."""
    for name, tensor in tensors.items():
        if name.endswith(".bias") and tensor.any():
            raise UserError(
                f"The checkpoint has biases ({name}), as transformers learns them when it trains an image GPT further, "
                "and this model has none; give a file as it was published."
            )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}


def _matrix(name: str, tensor: Tensor) -> Tensor:
    """Join the axes of heads and of channels in a head, (h, C/h, C) -> (C, C), in the matrices of attention."""
    return tensor.flatten(0, 1) if re.search(r"attention\.", name) else tensor


def _with_start(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Append the start token to the colours' embeddings, as zeros if the file has none; returns a note in that case."""
    table, tensors = tensors["embedding.weight"], dict(tensors)
    start = tensors.pop("start", None)
    row = table.new_zeros(table.shape[1]) if start is None else start
    note = "the file has no start token, so it was trained with task.loss.objective=masked and cannot sample"
    return {**tensors, "embedding.weight": torch.cat([table, row[None]])}, [note] if start is None else []


def _is_transposed(name: str, form: str) -> bool:
    """Whether a matrix is stored as (in, out). The authors' joined projections of queries, keys and values are not."""
    return bool(re.fullmatch(GPT2_TRANSPOSED, name)) and not (form == "authors" and "in_proj" in name)
