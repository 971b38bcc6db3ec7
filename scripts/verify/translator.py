"""Compare our translator with transformers' Marian, with the weights of a Marian file in both models.

scripts/verify_import.py calls `verify`, and scripts/export_marian.py calls `compare`. The file is loaded twice, into
our model and into transformers' model. Then the logits of the two models on random token ids are compared. The file
must have its config.json beside it. From config.json, transformers reads what the tensors do not show: the number of
heads, the activation, and whether embeddings are scaled.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config.check import build
from common.errors import UserError
from common.weights import fetching
from scripts.verify.comparison import TOLERANCE, check_options, load_foreign, relative_difference, report
from seq2seq.importing import adopt as importing
from seq2seq.importing import marian, marian_config
from seq2seq.importing.layouts import ZERO_ROW
from seq2seq.tokenizers.bpe import BOS

MODEL = "seq2seq.models.transformer.Transformer"
SENTENCES, LENGTH, SEED = 4, 20, 0


def verify(config: dict[str, Any]) -> tuple[str, bool]:
    """Compare the models on the file that `config` names; returns a report, and whether the outputs agree.

    Raises UserError if nothing can be compared.
    """
    path, model = fetching.locate(config).path, config["model"]
    content = load_foreign(path, config["weights"])
    try:
        adopted = importing.adopt(content, path.parent)
        tensors, _ = importing.unwrap(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not marian.is_marian(tensors):
        raise UserError(f"{path} is a file of fairseq, which cannot be compared; give a file of Marian.")
    peer = _load_peer(tensors, path)
    check_options(path, model, required_options(peer.config))
    difference = compare(model, adopted.weights, peer, path.parent)
    rows = [
        ("checkpoint", str(path)),
        ("layout", f"Marian's in transformers, read for comparison by transformers {metadata.version('transformers')}"),
        ("used", f"{len(tensors) - len(adopted.left_out)} tensors of the file, as {len(adopted.weights)} of ours"),
        ("left out", ", ".join(adopted.left_out) or "nothing"),
        ("tokenizers", "beside the file" if adopted.task_state.get("tokenizers") else "none beside the file"),
        ("sentences", f"{SENTENCES} of {min(LENGTH, model['longest'])} tokens, random (seed {SEED}), fp32"),
        ("logits", f"differ by {difference:.2g} of the largest deviation from the mean at most"),
    ]
    agree = difference <= TOLERANCE
    return report(rows, agree=agree), agree


def required_options(config: Any) -> list[tuple[str, Any]]:
    """Return the keys of the config's `model` that a MarianConfig determines, each with its required value.

    `positions.layout` is not one of these keys, because a MarianConfig does not contain it. A wrong layout is noticed
    when logits are compared.
    """
    tied = "all" if config.share_encoder_decoder_embeddings else "target"
    activation = {"silu": "swish"}.get(config.activation_function, config.activation_function)
    return [
        ("width", config.d_model),
        ("heads", config.encoder_attention_heads),
        ("feedforward", config.encoder_ffn_dim),
        ("encoder_layers", config.encoder_layers),
        ("decoder_layers", config.decoder_layers),
        ("scaled", bool(config.scale_embedding)),
        ("tied", tied if config.tie_word_embeddings else "none"),
        ("blocks.pre_norm", False),
        ("blocks.activation", activation),
        ("blocks.norm_eps", marian_config.NORM_EPS),
    ]


def _load_peer(tensors: dict[str, Tensor], path: Path) -> Any:
    """Load the tensors into transformers' model; raises UserError if config.json or transformers is missing."""
    if not (path.parent / "config.json").is_file():
        raise UserError(f"{path} has no config.json beside it, which transformers needs.")
    try:
        from transformers import MarianConfig, MarianMTModel
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is to be compared with transformers' Marian, but transformers is not installed; "
            "pip install transformers."
        ) from error
    model = MarianMTModel(MarianConfig.from_pretrained(path.parent))
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def compare(model: dict[str, Any], weights: dict[str, Tensor], peer: Any, folder: Path) -> float:
    """Return the `relative_difference` between the logits of our model and of `peer` on random token ids.

    `model` is the section `model` of the config, and `weights` is the state dict of our model. `peer` is the
    MarianMTModel of the files in `folder`. These files also determine the order of the peer's vocabulary. Vocabulary
    entries that the peer does not have are not compared. Raises UserError if the weights do not fit the config's model.
    """
    size = len(weights["embedding.weight"])
    ours = build(model, vocabularies=(size, size), joint=model["tied"] == "all").eval()
    try:
        ours.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"The file's weights do not fit the config's model ({reason}); override further keys of model."
        ) from error
    order = torch.tensor(marian.target_row_order(peer.final_logits_bias.shape[1], folder))  # (V,): our id -> peer's id
    rng = torch.Generator().manual_seed(SEED)
    length = min(LENGTH, model["longest"])
    source, target = torch.randint(4, size, (2, SENTENCES, length), generator=rng)
    target[:, 0] = BOS
    shared = order != ZERO_ROW
    logits = ours(source, torch.full((SENTENCES,), length), target)[..., shared]
    expected = peer(input_ids=order[source], decoder_input_ids=order[target]).logits[..., order[shared]]
    return relative_difference(logits, expected)
