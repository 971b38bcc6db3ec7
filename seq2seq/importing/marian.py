"""Marian's Transformer (Junczys-Dowmunt et al. 2018, arXiv 1804.00344) in transformers' layout: to ours and back.

Their vocabulary holds </s>, <unk>, the pieces, and <pad>, with which a translation also starts; sources end with </s>.
Coming in, BOS is their <pad>, EOS and UNK theirs, and the pieces follow in their order. Our PAD is one entry more, a
row of zeros that an output bias keeps out of the softmax, so that all log probabilities are theirs; it takes
`model.output_bias=true`. Going out, nothing is added: our PAD becomes an entry before the last, <pad> is our BOS, and
neither may be generated, which `bad_words_ids` say.

Their positions are sines in the layout "halves". A model with the interleaved layout is exported with its channels in
another order, sines first, which is the same function: norms, attention and feed-forwards know no order of channels.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.nn.positions import sine
from common.task import Adopted
from common.weights import projections
from common.weights.renaming import Table, rename, with_prefixes
from seq2seq.importing import layouts, marian_config
from seq2seq.tokenizers import marian as foreign_tokenizers
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK
from seq2seq.tokenizers.marian import Special

METADATA_FILE = "triptych.json"  # beside a file that we exported: what it takes to have it back exactly
FORMAT = "triptych-marian-1"
EOS_THERE, UNK_THERE = marian_config.EOS, 1
SHARED, LOGITS_BIAS, HEAD = "model.shared.weight", "final_logits_bias", "lm_head.weight"
EMBEDDINGS = {stack: f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
# Rounding in half precision is 5e-4 at most, that of large angles less; another layout differs by more than 1.
SAME_SINES = 2e-3
# The axis of our tensors along which the channels of the residual stream lie.
STREAM = (
    (r"(.*embedding|output|.*in_proj|.*expand)\.weight", 1),
    (r".*(out_proj|contract|norm)\.(weight|bias)", 0),
)
NAMES = Table(*with_prefixes("model.", "", layouts.BLOCKS))
POSITIONS = r"model\.(encoder|decoder)\.embed_positions\.weight"


class Export(NamedTuple):
    """The files of a model in transformers' layout."""

    tensors: dict[str, Tensor]  # model.safetensors
    config: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json
    metadata: dict[str, Any]  # triptych.json


def is_marian(tensors: dict[str, Any]) -> bool:
    """Whether the names are those of transformers' MarianMTModel, or of one of its relatives."""
    return any(re.match(rf"model\.{layouts.BLOCK}", name) for name in tensors)


def adopt(tensors: dict[str, Tensor], folder: Path | None) -> Adopted:
    """A MarianMTModel's weights by our names, and the tokenizers that lie in `folder`, if there are any.

    Raises UserError for what our Transformer has not, naming the tensor, and for a tokenizer of another size.
    """
    config, mark = _json(folder, "config.json"), _json(folder, METADATA_FILE)
    if config.get("model_type", "marian") != "marian":
        raise UserError(_refusal(f"config.json beside it says model_type={config['model_type']}"))
    parts, left_out = _parts(tensors)
    tables = _tables(tensors)
    bias = tensors.get(LOGITS_BIAS, torch.zeros(len(tables[2]))).flatten()  # (1, V) -> (V,)
    if not len(tables[0]) == len(tables[1]) == len(tables[2]) == len(bias):
        sizes = ", ".join(str(len(table)) for table in (*tables, bias))
        raise UserError(_refusal(f"source, target, output and bias have {sizes} entries"))
    if mark.get("format") == FORMAT and mark["entries"] == len(bias):
        return Adopted(_returned(parts, tables, bias, mark), mark["task"], left_out)
    joint = torch.equal(tables[0], tables[1])
    vocabularies = foreign_tokenizers.vocabularies(folder, joint, len(bias))
    specials = [_special(config, len(bias), names) for names in vocabularies or ({}, {})]
    orders = row_order(len(bias), specials[0]), row_order(len(bias), specials[1])
    output_bias = layouts.reorder_rows(bias, orders[1])
    output_bias[PAD] = layouts.MASKED_LOGIT
    weights = {**parts, **layouts.embeddings(tables, orders), "output_bias": output_bias}
    states = foreign_tokenizers.states(folder, vocabularies, orders) if folder and vocabularies else []
    return Adopted(weights, {"tokenizers": states} if states else {}, left_out)


def row_order(size: int, special: Special) -> list[int]:
    """Which of a foreign vocabulary's rows each of our entries has, one more than it: PAD, BOS, EOS, UNK, the rest."""
    rest = [row for row in range(size) if row not in special]
    return [layouts.ZERO_ROW, special.pad, special.eos, special.unk, *rest]


def target_row_order(size: int, folder: Path) -> list[int]:
    """Which row of a file of `size` entries in this folder each of our target's entries has (see `row_order`)."""
    mark = _json(folder, METADATA_FILE)
    if mark.get("format") == FORMAT and mark["entries"] == size:
        return torch.tensor(exported_row_order(size)).argsort().tolist()
    return row_order(size, _special(_json(folder, "config.json"), size, {}))


def exported_row_order(size: int) -> list[int]:
    """Which of our rows each entry of an exported vocabulary has."""
    return [EOS, UNK, *range(4, size), PAD, BOS]


def export(model: dict[str, Any], predict: dict[str, Any], weights: dict[str, Tensor], state: dict[str, Any]) -> Export:
    """Our model as a MarianMTModel of transformers.

    `model` and `predict` are those sections of a checkpoint's config, `state` its task's. Raises UserError for what
    Marian cannot express, naming the key.
    """
    marian_config.check_exportable(model, weights)
    size = len(weights["embedding.weight"])
    ordered = (
        permute_channels(weights, _sines_first(model["width"])) if model["positions"]["layout"] != "halves" else weights
    )
    blocks = {name: tensor for name, tensor in ordered.items() if ".blocks." in name}
    tensors, _, _, unknown = rename(projections.split(blocks), NAMES.to_theirs)
    assert not unknown, unknown
    there = exported_row_order(size)
    embedding = SHARED if model["tied"] == "all" else EMBEDDINGS["decoder"]
    for name, ours in ((embedding, "embedding"), (EMBEDDINGS["encoder"], "source_embedding"), (HEAD, "output")):
        if f"{ours}.weight" in ordered:
            tensors[name] = layouts.reorder_rows(ordered[f"{ours}.weight"], there)
    bias = weights.get("output_bias", torch.zeros(size))
    tensors[LOGITS_BIAS] = layouts.reorder_rows(bias, there)[None]  # (V,) -> (1, V)
    metadata = {
        "format": FORMAT,
        "entries": size,
        "layout": model["positions"]["layout"],
        "output_bias": "output_bias" in weights,
        "task": state,
    }
    return Export(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        marian_config.config(model, predict, size),
        marian_config.generation(model, predict, size),
        metadata,
    )


def permute_channels(weights: dict[str, Tensor], channels: Tensor) -> dict[str, Tensor]:
    """A post-norm Transformer by our names with the channels of its residual stream in another order, (C,) int64."""
    arranged = {}
    for name, tensor in weights.items():
        axis = next((axis for pattern, axis in STREAM if re.fullmatch(pattern, name)), None)
        arranged[name] = tensor if axis is None else tensor.index_select(axis, channels)
    return arranged


def _sines_first(width: int) -> Tensor:
    """The channels of the interleaved layout in the order of "halves": (C,)."""
    return torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])


def _parts(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The blocks' tensors by our names, and the names of what has no place in ours."""
    tables = (SHARED, *EMBEDDINGS.values(), HEAD, LOGITS_BIAS)
    parts = rename({name: t for name, t in tensors.items() if name not in tables}, NAMES.to_ours, POSITIONS)
    for name in parts.left_out:
        _check_sines(name, tensors[name])
    if parts.unknown:
        name = parts.unknown[0]
        raise UserError(_refusal(f"{name} {tuple(tensors[name].shape)} has no place in ours"))
    return projections.join(parts.tensors), parts.left_out


def _tables(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of source, target and output. A file may hold one of them under up to four names."""
    head = tensors.get(HEAD)
    shared = tensors.get(SHARED, head)
    source, target = (tensors.get(EMBEDDINGS[stack], shared) for stack in ("encoder", "decoder"))
    if source is None or target is None:
        raise UserError(_refusal(f"it has neither {SHARED} nor {EMBEDDINGS['encoder']} and {EMBEDDINGS['decoder']}"))
    return source, target, target if head is None else head


def _check_sines(name: str, table: Tensor) -> None:
    """Raise UserError for positions that are not those which our model computes."""
    expected = sine(torch.arange(len(table), dtype=torch.float32), table.shape[1], layout="halves")
    difference = float((table - expected).abs().max())
    if difference > SAME_SINES:
        raise UserError(_refusal(f"{name} are no sines in halves, from which they differ by up to {difference:.2g}"))


def _special(config: dict[str, Any], size: int, names: dict[str, int]) -> Special:
    """The ids of </s>, <unk> and <pad>: of the vocabulary, or of config.json, or as usual."""
    pad = config.get("pad_token_id", size - 1)
    special = Special(
        names.get("</s>", config.get("eos_token_id", EOS_THERE)), names.get("<unk>", UNK_THERE), names.get("<pad>", pad)
    )
    if config.get("decoder_start_token_id", pad) != pad or pad != special.pad:
        raise UserError(_refusal("its translations do not start with <pad>"))
    if len({*special}) < 3 or not all(isinstance(id, int) and 0 <= id < size for id in special):
        raise UserError(_refusal(f"its ids of </s>, <unk> and <pad> are {[*special]}, and it has {size} entries"))
    return special


def _returned(
    parts: dict[str, Tensor], tables: tuple[Tensor, Tensor, Tensor], bias: Tensor, mark: dict[str, Any]
) -> dict[str, Tensor]:
    """What we exported as it was: the rows and the channels in our order, and no bias that was not there."""
    back = torch.tensor(exported_row_order(len(bias))).argsort()
    weights = {**parts, **layouts.embeddings(tables, (back.tolist(), back.tolist()))}
    if mark["layout"] != "halves":
        weights = permute_channels(weights, _sines_first(tables[0].shape[1]).argsort())
    return weights | ({"output_bias": bias[back]} if mark["output_bias"] else {})


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    """The content of a file that may lie in a folder; empty when there is none."""
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}, which belongs to it, is no JSON ({error}); copy or download it again.") from error
    return content if isinstance(content, dict) else {}


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is in transformers' layout and no Marian that ours can be ({reason}); give a MarianMTModel as "
        "published, such as those of OPUS-MT."
    )
