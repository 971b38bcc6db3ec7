"""The contents of config.json and generation_config.json for exports of our models to transformers' Marian."""

from typing import Any

from torch import Tensor

from common.errors import UserError

EOS = 0  # the id of </s> in Marian's vocabularies
NORM_EPS = 1e-5  # of the norms; fixed in transformers' Marian


def config(model: dict[str, Any], predict: dict[str, Any], entries: int) -> dict[str, Any]:
    """The content of config.json, with the keys of MarianConfig.

    `model` and `predict` are the sections `model` and `task.predict` of our config; `entries` is the vocabulary's size.
    """
    blocks = model["blocks"]
    sides = {f"{side}_{key}": model[ours] for side in ("encoder", "decoder")
             for key, ours in (("attention_heads", "heads"), ("ffn_dim", "feedforward"))}  # fmt: skip
    return {
        "architectures": ["MarianMTModel"],
        "model_type": "marian",
        "vocab_size": entries,
        "decoder_vocab_size": entries,
        "d_model": model["width"],
        "encoder_layers": model["encoder_layers"],
        "decoder_layers": model["decoder_layers"],
        **sides,
        "activation_function": blocks["activation"],
        "dropout": blocks["dropout"],
        "attention_dropout": blocks["attention_dropout"],
        "activation_dropout": blocks["hidden_dropout"],
        "scale_embedding": model["scaled"],
        "share_encoder_decoder_embeddings": model["tied"] == "all",
        "tie_word_embeddings": model["tied"] != "none",
        "max_position_embeddings": _max_length(model, predict),
        "forced_eos_token_id": None,
        "is_encoder_decoder": True,
        "dtype": "float32",
        **_ids(entries),
    }


def generation(model: dict[str, Any], predict: dict[str, Any], entries: int) -> dict[str, Any]:
    """The content of generation_config.json: our decoding options, as far as transformers can express them.

    `candidates` is not exported: a user of transformers sets num_return_sequences.
    The length penalty of transformers is n^alpha, which is our "average". "gnmt" is exported as n^alpha with the same
    alpha, and "none" with alpha 0. In transformers, the maximum length of a translation does not depend on the source,
    so the maximum for the longest source is exported.
    """
    beams = predict["beam"] if predict["method"] == "beam" else 1
    beam_options = {
        "early_stopping": {"first": True, "bound": False, "never": "never"}[predict["stop"]],
        "length_penalty": 0.0 if predict["penalty"] == "none" else predict["alpha"],
    }
    sampling_options = {key: predict[key] for key in ("temperature", "top_k", "top_p")}
    return {
        **_ids(entries),
        "bad_words_ids": [[entries - 1], [entries - 2]],
        "num_beams": beams,
        "do_sample": predict["method"] == "sample",
        **(beam_options if beams > 1 else {}),
        **(sampling_options if predict["method"] == "sample" else {}),
        "forced_eos_token_id": EOS if predict["at_limit"] == "end" else None,
        "max_length": _max_length(model, predict),
    }


def check_exportable(model: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raise UserError for a model that MarianMTModel cannot express."""
    if model.get("compressed"):
        raise UserError(
            "The model is compressed, and transformers' Marian has layers of one size and unfactored maps; give the "
            "checkpoint that was compressed, or use scripts/export.py."
        )
    blocks, positions = model["blocks"], model["positions"]
    problems = {
        "model.blocks.pre_norm=true": blocks["pre_norm"],
        f"model.blocks.norm_eps={blocks['norm_eps']:g}": blocks["norm_eps"] != NORM_EPS,
        f"model.positions.layout={positions['layout']}": positions["layout"] == "halves_t2t",
        f"model.positions.first={positions['first']}": positions["first"] != 0,
    }
    problem = next((key for key, unsupported in problems.items() if unsupported), None)
    if problem:
        raise UserError(
            f"{problem} is unsupported by transformers' Marian, which has norms after the sub-layers (eps "
            f"{NORM_EPS:g}) and sines from position 0 on; only such models can be exported, such as "
            "model=transformer_base."
        )
    target = len(weights["embedding.weight"])
    source = len(weights.get("source_embedding.weight", weights["embedding.weight"]))
    if source != target:
        raise UserError(
            f"The vocabularies have {source} entries for the source and {target} for the target; transformers' Marian "
            "has one id of <pad> for both, so only vocabularies of equal size can be exported."
        )


def _ids(entries: int) -> dict[str, int]:
    return {"pad_token_id": entries - 1, "decoder_start_token_id": entries - 1, "eos_token_id": EOS}


def _max_length(model: dict[str, Any], predict: dict[str, Any]) -> int:
    """The maximum length of a translation of the longest source, with the start token; at least `model.longest`."""
    limit = int(predict["longest_factor"] * model["longest"]) + int(predict["longest_extra"]) + 1
    return max(int(model["longest"]), limit)
