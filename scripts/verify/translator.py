"""Does an imported translator answer as transformers' Marian? A part of scripts/verify_import.py.

Reads the file twice, by our import and by transformers, and compares the logits of random sentences. The config.json
beside the file says what the weights do not: heads, activation, whether embeddings are scaled.
"""

from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config.check import build
from common.errors import UserError
from scripts.verify.comparison import TOLERANCE, foreign, refuse_another_model, relative, report
from seq2seq.importing import adopt as importing
from seq2seq.importing import marian, marian_config
from seq2seq.importing.layouts import ZERO_ROW
from seq2seq.tokenizers.bpe import BOS

MODEL = "seq2seq.models.transformer.Transformer"
COUNT, LENGTH, SEED = 4, 20, 0  # of random sentences


def verify(config: dict[str, Any]) -> tuple[str, bool]:
    """What was read and compared, and whether both agree; raises UserError when there is nothing to compare."""
    path, model = Path(config["checkpoint"]), config["model"]
    content = foreign(path)
    try:
        adopted = importing.adopt(content, path.parent)
        tensors, _ = importing.unwrap(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not marian.is_marian(tensors):
        raise UserError(f"{path} is fairseq's, which no package here reads; only Marian's files can be compared.")
    theirs = _peer(tensors, path)
    refuse_another_model(path, model, needed(theirs.config))
    difference = compare(model, adopted.weights, theirs, path.parent)
    rows = [
        ("checkpoint", str(path)),
        ("layout", f"Marian's in transformers, read for comparison by transformers {metadata.version('transformers')}"),
        ("used", f"{len(tensors) - len(adopted.left_out)} tensors of the file, as {len(adopted.weights)} of ours"),
        ("left out", ", ".join(adopted.left_out) or "nothing"),
        ("tokenizers", "beside the file" if adopted.task_state.get("tokenizers") else "none beside the file"),
        ("sentences", f"{COUNT} of {min(LENGTH, model['longest'])} tokens, random (seed {SEED}), fp32"),
        ("logits", f"differ by {difference:.2g} of the largest deviation from the mean at most"),
    ]
    same = difference <= TOLERANCE
    return report(rows, same=same), same


def needed(config: Any) -> list[tuple[str, Any]]:
    """What a MarianConfig says about ours, by its keys; of the layout only that ours fits, which exports may decide."""
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


def _peer(tensors: dict[str, Tensor], path: Path) -> Any:
    """transformers' model with the file's tensors in it."""
    if not (path.parent / "config.json").is_file():
        raise UserError(f"{path} has no config.json beside it, without which transformers cannot compute it.")
    try:
        from transformers import MarianConfig, MarianMTModel
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} is Marian's, and transformers, which could read it for comparison, is not installed; "
            "pip install transformers."
        ) from error
    model = MarianMTModel(MarianConfig.from_pretrained(path.parent))
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def compare(model: dict[str, Any], weights: dict[str, Tensor], theirs: Any, folder: Path) -> float:
    """The largest difference of logits on random sentences, as a share of their largest deviation from the mean.

    `theirs` is the MarianMTModel of the files in `folder`, which tell what its entries are of ours.
    """
    size = len(weights["embedding.weight"])
    ours = build(model, vocabularies=(size, size), joint=model["tied"] == "all").eval()
    try:
        ours.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The file's weights do not fit the config's model ({reason}); give its other keys.") from error
    rows = torch.tensor(marian.target_row_order(theirs.final_logits_bias.shape[1], folder))  # (V,): theirs of ours
    drawn = torch.Generator().manual_seed(SEED)
    length = min(LENGTH, model["longest"])
    source, target = torch.randint(4, size, (2, COUNT, length), generator=drawn)
    target[:, 0] = BOS
    theirs_too = rows != ZERO_ROW
    logits = ours(source, torch.full((COUNT,), length), target)[..., theirs_too]
    expected = theirs(input_ids=rows[source], decoder_input_ids=rows[target]).logits[..., rows[theirs_too]]
    return relative(logits, expected)
