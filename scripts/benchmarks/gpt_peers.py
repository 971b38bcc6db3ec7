"""GPT-2 (Radford et al. 2019) in transformers, with the weights of our model."""

import re
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from common.config.check import build
from common.config.compose import configure
from common.machine.seeds import generator
from common.weights.layers import GPT2_TRANSPOSED
from common.weights.renaming import rename
from scripts.benchmarks.drawing import randomise_parameters
from seq2seq.importing.gpt2 import HEAD, NAMES
from seq2seq.models.gpt import Gpt

ENTRIES = 50257
TINY_ENTRIES = 96


def config(*, tiny: bool) -> dict[str, Any]:
    """Compose the config of `train.py model=gpt2`, without dropout, because the outputs of the functions are compared.

    With `tiny`, the model has two layers of width 64 and 64 positions.
    """
    keys = ["model.blocks.dropout=0.0", "model.blocks.attention_dropout=0.0"]
    if tiny:
        keys += ["model.width=64", "model.heads=4", "model.layers=2", "model.feedforward=128", "model.longest=64"]
    return configure("train", ["model=gpt2", *keys])


def entries(*, tiny: bool) -> int:
    """Return the number of vocabulary entries."""
    return TINY_ENTRIES if tiny else ENTRIES


def language_model(recipe: dict[str, Any], *, tiny: bool) -> Gpt:
    """Build our model with random values in every parameter; `recipe` is the result of `config`."""
    model: Gpt = build(recipe["model"], vocabulary=entries(tiny=tiny))
    randomise_parameters(model)
    _vary_texts(model)
    return model


@torch.no_grad()
def _vary_texts(model: Any) -> None:
    """Change random weights so that generated texts have many different tokens.

    With random weights, the likeliest next token is often the previous one, since embedding and output are tied; random
    signs in the last norm prevent this. It is also often the same for all previous tokens. It depends on them if the
    outputs of feed-forwards are larger, without the part that is the same for all tokens, and those of attentions
    smaller.
    """
    for block in model.decoder.blocks:
        block.feed_forward.expand.weight *= 2
        contract = block.feed_forward.contract.weight
        contract.copy_(2 * (contract - contract.mean(1, keepdim=True)))
        block.attention.out_proj.weight *= 0.3
    signs = model.decoder.norm.weight
    signs *= torch.randn(signs.shape, generator=generator("signs")).sign()


def sample_texts(count: int, length: int, *, tiny: bool) -> Tensor:
    """Sample `count` texts of `length` tokens, (count, length) int64."""
    return torch.randint(entries(tiny=tiny), (count, length), generator=generator("texts", count))


def peer(model: Gpt, recipe: dict[str, Any]) -> GPT2LMHeadModel:
    """Build transformers' GPT2LMHeadModel with the weights of our `model` and PyTorch's fused attention.

    The activation is computed by PyTorch's function, which is faster than GPT2Config's default for the same formula.
    """
    options = recipe["model"]
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        vocab_size=model.embedding.num_embeddings,
        n_positions=options["longest"],
        n_embd=options["width"],
        n_layer=options["layers"],
        n_head=options["heads"],
        n_inner=options["feedforward"],
        activation_function="gelu_pytorch_tanh",
        layer_norm_epsilon=options["blocks"]["norm_eps"],
        bos_token_id=None,
        eos_token_id=None,
        **drop,
        attn_implementation="sdpa",
    )
    theirs = GPT2LMHeadModel(config)
    tensors = to_transformers(dict(model.named_parameters()))
    theirs.load_state_dict({**tensors, HEAD: tensors["transformer.wte.weight"]})
    return theirs


def to_transformers(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert our parameters, or a dict of their gradients, to the names and shapes of GPT2LMHeadModel."""
    theirs = rename(ours, NAMES.to_theirs)
    return {name: _transposed(theirs.sources[name], tensor) for name, tensor in theirs.tensors.items()}


def _transposed(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if re.fullmatch(GPT2_TRANSPOSED, name) else tensor


def generation(tokens: int, cache: str | None) -> GenerationConfig:
    """Make the options of transformers' `generate` for exactly `tokens` new tokens by greedy search.

    `cache` is transformers' name of the key-value cache: None for one that grows, or "static".
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=tokens,
        use_cache=True,
        cache_implementation=cache,
        pad_token_id=0,
        eos_token_id=None,
    )
