"""Import BERT and RoBERTa from files of transformers, and from older files with the names of the authors' code.

Tensors get this project's names, and the projections of queries, keys and values are joined. The model computes the
same function. The tokenizer is read from the folder of the file (seq2seq/tokenizers/files.py), and the names of a
classifier's classes from config.json there.

A file may hold only a part of what a model needs: transformers does not write the output of a masked language model,
which is the embedding matrix. BERT's prediction of the next sentence is left out. So is the pooler of a masked language
model, and the head of masked language modelling of a classifier.

Differs: the config must give what a file does not hold: the number of heads (`model.heads`), the epsilon of the norms
(`model.blocks.norm_eps`: 1e-12 in BERT, 1e-5 in RoBERTa), and the row of the first position (`model.first_position`: 0
in BERT, 2 in RoBERTa). GELU is exact, as in the published files.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import projections, unwrapping
from common.weights.renaming import Table, identify_format, rename, with_prefixes
from common.weights.unwrapping import floats
from seq2seq.importing.beside import read_object, read_tokenizer

TABLE = Table(
    *with_prefixes(
        "{bert.|roberta.|}",
        "",
        (
            ("embeddings.word_embeddings.", "embeddings.tokens."),
            ("embeddings.position_embeddings.", "embeddings.positions."),
            ("embeddings.token_type_embeddings.", "embeddings.types."),
            ("embeddings.LayerNorm.", "embeddings.norm."),
            ("pooler.dense.", "representation."),
            *with_prefixes(
                "encoder.layer.{i}.",
                "encoder.blocks.{i}.",
                (
                    ("attention.self.query.", "attention.q."),
                    ("attention.self.key.", "attention.k."),
                    ("attention.self.value.", "attention.v."),
                    ("attention.output.dense.", "attention.out_proj."),
                    ("attention.output.LayerNorm.", "residuals.0.norm."),
                    ("intermediate.dense.", "feed_forward.expand."),
                    ("output.dense.", "feed_forward.contract."),
                    ("output.LayerNorm.", "residuals.1.norm."),
                ),
            ),
        ),
    ),
    ("{cls.predictions.transform.dense|lm_head.dense}.", "transform."),
    ("{cls.predictions.transform.LayerNorm|lm_head.layer_norm}.", "transform_norm."),
    ("{cls.predictions.bias|lm_head.bias}", "output_bias"),
    ("{cls.predictions.decoder|lm_head.decoder}.", "output."),
    ("classifier.dense.", "representation."),  # in RoBERTa
    ("{classifier|classifier.out_proj}.", "head."),
)
# Indices of positions; BERT's prediction of the next sentence.
LEFT_OUT = r"(.*\.)?embeddings\.(position_ids|token_type_ids)|cls\.seq_relationship\..*"
SUPPORTED_FILES = "a BERT or RoBERTa of transformers"
TOKENS, OUTPUT = "embeddings.tokens.weight", "output.weight"
MASKED_HEAD, CLASSIFIER = ("transform", "transform_norm", "output_bias"), ("representation", "head")

# Patterns of tensor names, each with the unsupported model that it identifies; the first that matches decides.
UNSUPPORTED = (
    (r"distilbert|transformer\.layer\.\d+\.attention\.q_lin", "a DistilBERT"),
    (r"albert|embedding_hidden_mapping_in", "an ALBERT"),
    (r"rel_embeddings|pos_q_proj|query_proj", "a DeBERTa"),
    (r"embeddings_project|discriminator_predictions|generator_predictions", "an ELECTRA"),
    (r"crossattention", "a BERT with cross-attention"),
    (r"qa_outputs", "a BERT that answers questions by spans of a text"),
    (r"(^|\.)wte\.|lm_head\.weight$", "a language model"),
    (r"^(embeddings\.tokens|encoder\.blocks\.)", "bare weights of this program's own, without their config"),
    (r"encoder\.layers\.\d+\.self_attn", "a translator"),
)


def adopt(content: dict[str, Any], folder: Path | None, *, classifies: bool = False) -> Adopted:
    """Convert the content of a file to our weights, and the tokenizer in `folder` to the task's state.

    With `classifies`, the weights are those of `BertClassifier`, otherwise those of `Bert`; the file's other tensors
    are left out. The state has the key "tokenizer", unless `folder` has no tokenizer, and with `classifies` the key
    "classes", which is empty if the file has no classifier.

    Raises UserError for an unsupported file, and for a tokenizer whose number of entries is not that of the embeddings.
    """
    tensors, left_out = unwrapping.unwrap(content, ("model",), SUPPORTED_FILES)
    tensors = {re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name)): t for name, t in floats(tensors).items()}
    if "classifier.dense.weight" in tensors:  # RoBERTa's classifier does not use the pooler, which has the same place
        left_out += [name for name in tensors if "pooler.dense." in name]
        tensors = {name: tensor for name, tensor in tensors.items() if "pooler.dense." not in name}
    parts = rename(tensors, TABLE.to_ours, LEFT_OUT)
    if TOKENS not in parts.tensors or parts.unknown:
        raise UserError(_refusal(tensors, parts.unknown))
    weights = _without_tied_output(projections.join(parts.tensors))
    unused = MASKED_HEAD if classifies else CLASSIFIER
    dropped = [name for name in weights if name.split(".")[0] in unused]
    left_out = left_out + parts.left_out + [parts.sources[name] for name in dropped]
    weights = {name: tensor for name, tensor in weights.items() if name not in dropped}
    tokenizer, notes = read_tokenizer(folder, len(weights[TOKENS]))
    state: dict[str, Any] = {"tokenizer": tokenizer.state(), "token_counts": []} if tokenizer else {}
    if classifies:
        state["classes"] = _class_names(folder, len(weights["head.weight"])) if "head.weight" in weights else []
    return Adopted(weights, state, left_out, tuple(notes))


def _without_tied_output(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the output's matrix, which is the embedding matrix, and the second name of the output's bias.

    Raises UserError if the output is another matrix.
    """
    output, bias = weights.pop(OUTPUT, None), weights.pop("output.bias", None)
    if output is not None and not torch.equal(output, weights[TOKENS]):
        raise UserError(
            "The checkpoint has an output matrix of its own, and that of this model is the embedding matrix; give a "
            "file with tied embeddings, as BERT and RoBERTa were published."
        )
    if bias is not None:
        weights.setdefault("output_bias", bias)
    return weights


def _class_names(folder: Path | None, count: int) -> list[str]:
    """The names of the classes in config.json (`id2label`), or "class 0", "class 1" ... if they are not there."""
    labels = read_object(folder, "config.json").get("id2label")
    names = [labels.get(str(i)) for i in range(count)] if isinstance(labels, dict) else []
    if len(names) == count == len({*names}) and all(isinstance(name, str) for name in names):
        return [str(name) for name in names]
    return [f"class {i}" for i in range(count)]


def _refusal(tensors: dict[str, Tensor], unknown: Sequence[str]) -> str:
    name = unknown[0] if unknown else next(iter(tensors))
    kind = identify_format(tensors, UNSUPPORTED) or "something else"
    reason = f"it has {name}" if unknown else f"it has no embeddings of tokens, but {name}"
    return (
        f"The checkpoint is {kind} and neither a BERT nor a RoBERTa ({reason}); give {SUPPORTED_FILES}, or a file that "
        "this program wrote."
    )
