"""Import and export of Marian's Transformer (Junczys-Dowmunt et al. 2018, arXiv 1804.00344) in transformers' layout.

Marian's vocabulary holds </s>, <unk>, the pieces, and <pad>. Sources end with </s>, and the decoder's input starts with
<pad>.

Import: our BOS, EOS and UNK are Marian's <pad>, </s> and <unk>, and the pieces follow in Marian's order. Our PAD is an
additional entry. Its embedding is zero, and an output bias masks it in the softmax (`model.output_bias=true`), so that
all log probabilities are Marian's.

Export: no entry is added. Our PAD becomes the last entry but one, and our BOS becomes the last, <pad>. `bad_words_ids`
in generation_config.json keeps both from being generated.

Marian's positions are sines in the layout "halves". A model with the interleaved layout is exported with its channels
permuted, so that all sines come first. The permuted model computes the same function, since the weights of embeddings,
norms, attention and feed-forwards are permuted alike.
"""

import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from common.errors import UserError
from common.files import schema
from common.nn.positions import sine
from common.task import Adopted
from common.types import Count
from common.weights import projections
from common.weights.renaming import Table, rename, with_prefixes
from seq2seq.importing import layouts, marian_config
from seq2seq.importing.beside import read_object
from seq2seq.tokenizers import marian as foreign_tokenizers
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK
from seq2seq.tokenizers.marian import ForeignSpecialIds

METADATA_FILE = "triptych.json"  # a file in an export's folder; with it, import restores exactly the exported model
FORMAT = "triptych-marian-1"  # the value of "format" in this file
MARIAN_EOS, MARIAN_UNK = marian_config.EOS, 1
SHARED, LOGITS_BIAS, HEAD = "model.shared.weight", "final_logits_bias", "lm_head.weight"
EMBEDDINGS = {stack: f"model.{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")}
# The largest accepted difference of a file's sines from ours. Rounding a sine to fp16 changes it by at most 5e-4, and
# rounding a large angle changes its sine by less. Sines in another layout differ by more than 1.
SINE_TOLERANCE = 2e-3
# Patterns of tensor names, each with the axis of these tensors that holds the channels of the residual stream. Tensors
# with other names have no such axis.
STREAM_AXES = (
    (r"(.*embedding|output|.*in_proj|.*expand)\.weight", 1),
    (r".*(out_proj|contract|norm)\.(weight|bias)", 0),
)
NAMES = Table(*with_prefixes("model.", "", layouts.BLOCKS))
POSITIONS = r"model\.(encoder|decoder)\.embed_positions\.weight"


class Metadata(TypedDict):
    """The content of triptych.json, except its key "format"."""

    entries: Count  # size of the vocabulary
    layout: Literal["halves", "interleaved"]  # of the model's positions before the export
    output_bias: bool  # whether the model had an output bias before the export
    task: dict[str, Any]  # the task's state


class Export(NamedTuple):
    """The contents of the files of an exported model."""

    tensors: dict[str, Tensor]  # model.safetensors
    config: dict[str, Any]  # config.json
    generation: dict[str, Any]  # generation_config.json
    metadata: dict[str, Any]  # triptych.json


def is_marian(tensors: dict[str, Any]) -> bool:
    """Whether the names of the tensors are those of transformers' MarianMTModel, or of a related model such as BART."""
    return any(re.match(rf"model\.{layouts.BLOCK}", name) for name in tensors)


def adopt(tensors: dict[str, Tensor], folder: Path | None) -> Adopted:
    """Convert a MarianMTModel's weights to our names, and read the tokenizers in `folder`, if there are any.

    If `folder` has the triptych.json of an export of this program, the weights are exactly those of the exported model.
    Raises UserError for a model that is not a plain MarianMTModel, for example one with other positions or with a
    tensor that our Transformer does not have, and for a tokenizer whose number of entries differs from that of the
    weights.
    """
    config, metadata = read_object(folder, "config.json"), _metadata(folder)
    if config.get("model_type", "marian") != "marian":
        raise UserError(_refusal(f"config.json in its folder says model_type={config['model_type']}"))
    blocks, left_out = _blocks(tensors)
    matrices = _matrices(tensors)
    bias = tensors.get(LOGITS_BIAS, torch.zeros(len(matrices[2]))).flatten()  # (1, V) -> (V,)
    if not len(matrices[0]) == len(matrices[1]) == len(matrices[2]) == len(bias):
        counts = ", ".join(str(len(matrix)) for matrix in (*matrices, bias))
        raise UserError(_refusal(f"source, target, output and bias have {counts} entries"))
    if metadata and metadata["entries"] == len(bias):
        return Adopted(_restore_export(blocks, matrices, bias, metadata), metadata["task"], left_out)
    joint = torch.equal(matrices[0], matrices[1])
    vocabularies = foreign_tokenizers.vocabularies(folder, joint, len(bias))
    specials = [_special(config, len(bias), names) for names in vocabularies or ({}, {})]
    orders = row_order(len(bias), specials[0]), row_order(len(bias), specials[1])
    output_bias = layouts.reorder_rows(bias, orders[1])
    output_bias[PAD] = layouts.MASKED_LOGIT
    weights = {**blocks, **layouts.embeddings(matrices, orders), "output_bias": output_bias}
    states = foreign_tokenizers.tokenizer_states(folder, vocabularies, orders) if folder and vocabularies else []
    return Adopted(weights, {"tokenizers": states} if states else {}, left_out)


def row_order(entries: int, special: ForeignSpecialIds) -> list[int]:
    """For each of our entries, its row in Marian's vocabulary of `entries` entries; ZERO_ROW for PAD.

    Our entries are PAD, BOS, EOS, UNK, and the other ones in Marian's order.
    """
    rest = [row for row in range(entries) if row not in special]
    return [layouts.ZERO_ROW, special.pad, special.eos, special.unk, *rest]


def target_row_order(entries: int, folder: Path) -> list[int]:
    """For each of our entries, its row in the target vocabulary of the model in `folder`.

    The model may be an export of this program or any other Marian model.
    """
    metadata = _metadata(folder)
    if metadata and metadata["entries"] == entries:
        return torch.tensor(exported_row_order(entries)).argsort().tolist()
    return row_order(entries, _special(read_object(folder, "config.json"), entries, {}))


def exported_row_order(entries: int) -> list[int]:
    """For each entry of an exported vocabulary of `entries` entries, its row in our vocabulary."""
    return [EOS, UNK, *range(4, entries), PAD, BOS]


def export(model: dict[str, Any], predict: dict[str, Any], weights: dict[str, Tensor], state: dict[str, Any]) -> Export:
    """Convert our model to a MarianMTModel of transformers.

    `model` and `predict` are the sections `model` and `task.predict` of a checkpoint's config, `weights` is the state
    dict of its model, and `state` is its task state. Raises UserError for a model that MarianMTModel cannot express.
    """
    marian_config.check_exportable(model, weights)
    entries = len(weights["embedding.weight"])
    if model["positions"]["layout"] != "halves":
        weights = permute_channels(weights, _sines_first(model["width"]))
    blocks = {name: tensor for name, tensor in weights.items() if ".blocks." in name}
    tensors, _, _, unknown = rename(projections.split(blocks), NAMES.to_theirs)
    assert not unknown, unknown
    order = exported_row_order(entries)
    embedding = SHARED if model["tied"] == "all" else EMBEDDINGS["decoder"]
    for name, ours in ((embedding, "embedding"), (EMBEDDINGS["encoder"], "source_embedding"), (HEAD, "output")):
        if f"{ours}.weight" in weights:
            tensors[name] = layouts.reorder_rows(weights[f"{ours}.weight"], order)
    bias = weights.get("output_bias", torch.zeros(entries))
    tensors[LOGITS_BIAS] = layouts.reorder_rows(bias, order)[None]  # (V,) -> (1, V)
    metadata = {
        "format": FORMAT,
        "entries": entries,
        "layout": model["positions"]["layout"],
        "output_bias": "output_bias" in weights,
        "task": state,
    }
    return Export(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        marian_config.config(model, predict, entries),
        marian_config.generation(model, predict, entries),
        metadata,
    )


def permute_channels(weights: dict[str, Tensor], channels: Tensor) -> dict[str, Tensor]:
    """The weights of a post-norm Transformer with the channels of its residual stream in the order `channels` (C,)."""
    permuted = {}
    for name, tensor in weights.items():
        axis = next((axis for pattern, axis in STREAM_AXES if re.fullmatch(pattern, name)), None)
        permuted[name] = tensor if axis is None else tensor.index_select(axis, channels)
    return permuted


def _sines_first(width: int) -> Tensor:
    """For each channel of the layout "halves", its channel in the interleaved layout: (C,) int64."""
    return torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])


def _blocks(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The blocks' tensors by our names, and the names of the position tables, which are left out.

    Raises UserError for unknown tensors, and for positions that differ from our sines.
    """
    vocabulary = (SHARED, *EMBEDDINGS.values(), HEAD, LOGITS_BIAS)
    renamed = rename({name: t for name, t in tensors.items() if name not in vocabulary}, NAMES.to_ours, POSITIONS)
    for name in renamed.left_out:
        _check_sines(name, tensors[name])
    if renamed.unknown:
        name = renamed.unknown[0]
        raise UserError(_refusal(f"{name} {tuple(tensors[name].shape)} is unsupported"))
    return projections.join(renamed.tensors), renamed.left_out


def _matrices(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of source, target and output, each (V, C).

    A missing embedding of source or target is replaced by SHARED or, without SHARED, by HEAD. A missing HEAD is
    replaced by the target's embedding. Raises UserError if an embedding is missing and cannot be replaced.
    """
    head = tensors.get(HEAD)
    shared = tensors.get(SHARED, head)
    source, target = (tensors.get(EMBEDDINGS[stack], shared) for stack in ("encoder", "decoder"))
    if source is None or target is None:
        raise UserError(_refusal(f"it has neither {SHARED} nor {EMBEDDINGS['encoder']} and {EMBEDDINGS['decoder']}"))
    return source, target, target if head is None else head


def _check_sines(name: str, table: Tensor) -> None:
    """Raise UserError if `table` (N, C) differs from the sines that our model computes for positions 0 to N - 1."""
    expected = sine(torch.arange(len(table), dtype=torch.float32), table.shape[1], layout="halves")
    difference = float((table - expected).abs().max())
    if difference > SINE_TOLERANCE:
        raise UserError(_refusal(f"{name} differs from sines in halves by up to {difference:.2g}"))


def _special(config: dict[str, Any], entries: int, names: dict[str, int]) -> ForeignSpecialIds:
    """The ids of </s>, <unk> and <pad> in a vocabulary of `entries` entries.

    They are taken from `names` (entry -> id). Ids that `names` lacks are taken from `config`, the content of
    config.json, which has no id of <unk>. Ids that both lack are Marian's defaults. Raises UserError if translations do
    not start with <pad>, if `names` and `config` have different ids of <pad>, or if the ids are not three different
    numbers from 0 to `entries` - 1.
    """
    pad = config.get("pad_token_id", entries - 1)
    special = ForeignSpecialIds(
        names.get("</s>", config.get("eos_token_id", MARIAN_EOS)),
        names.get("<unk>", MARIAN_UNK),
        names.get("<pad>", pad),
    )
    if config.get("decoder_start_token_id", pad) != pad or pad != special.pad:
        raise UserError(_refusal("its translations do not start with <pad>"))
    if len({*special}) < 3 or not all(isinstance(id, int) and 0 <= id < entries for id in special):
        raise UserError(_refusal(f"its ids of </s>, <unk> and <pad> are {[*special]}, and it has {entries} entries"))
    return special


def _restore_export(
    blocks: dict[str, Tensor], matrices: tuple[Tensor, Tensor, Tensor], bias: Tensor, metadata: dict[str, Any]
) -> dict[str, Tensor]:
    """The weights that a model had before its export: rows and channels in our order, an output bias if it had one."""
    order = torch.tensor(exported_row_order(len(bias))).argsort()
    weights = {**blocks, **layouts.embeddings(matrices, (order.tolist(), order.tolist()))}
    if metadata["layout"] != "halves":
        weights = permute_channels(weights, _sines_first(matrices[0].shape[1]).argsort())
    return weights | ({"output_bias": bias[order]} if metadata["output_bias"] else {})


def _metadata(folder: Path | None) -> dict[str, Any]:
    """The content of triptych.json; empty without such a file, or if its "format" is not FORMAT.

    Raises UserError if its content does not match `Metadata`, which means that the file was altered.
    """
    content = read_object(folder, METADATA_FILE)
    if content.get("format") != FORMAT:
        return {}
    if mistake := schema.mistake(content, Metadata, ""):
        raise UserError(f"{METADATA_FILE}, in the checkpoint's folder, was altered: {mistake}; export the model again.")
    return content


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is in transformers' layout, but not a supported Marian ({reason}); give a MarianMTModel as "
        "published, such as those of OPUS-MT."
    )
