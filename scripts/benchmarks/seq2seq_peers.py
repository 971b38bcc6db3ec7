"""The translator (Vaswani et al. 2017, arXiv 1706.03762) in transformers, CTranslate2 and PyTorch, with our weights.

Benchmarks of decoding use Marian's variant of the model. In this variant, the embedding of the start token is zero, the
logits have a bias, and all sines of a position embedding come before the cosines.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, MarianConfig

from common.config.check import build
from common.config.compose import configure
from common.machine.seeds import generator
from common.nn.positions import sine
from common.weights import projections
from common.weights.layers import TORCH_DECODER_LAYER, TORCH_ENCODER_LAYER
from common.weights.renaming import Table, rename, with_prefixes
from scripts.benchmarks.ctranslate2_engine import Engine
from scripts.benchmarks.drawing import randomise_parameters
from seq2seq.importing.marian import NAMES
from seq2seq.models.transformer import Transformer
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK

WORD_COUNT = 8000  # vocabulary entries other than the four special ones
MAX_LENGTH = 256
EXCLUDED_LOGIT = -1e4  # the output bias of entries that must not be chosen

TORCH_NAMES = Table(
    ("embedding.weight", "embedding.weight"),
    *with_prefixes("transformer.encoder.layers.{i}.", "encoder.blocks.{i}.", TORCH_ENCODER_LAYER),
    *with_prefixes("transformer.decoder.layers.{i}.", "decoder.blocks.{i}.", TORCH_DECODER_LAYER),
)


def config(*overrides: str, tiny: bool) -> dict[str, Any]:
    """Compose the config of `train.py model=transformer_base` with a learning rate of 7e-4 and without dropout.

    The preset's learning rate of 1.0 is a factor on its schedule, and benchmarks do not use a schedule. Dropout is off,
    because the outputs of the timed functions are compared. The model accepts at most MAX_LENGTH tokens. With `tiny`,
    encoder and decoder have two layers each, of width 64. `overrides` are further config keys, key=value.
    """
    keys = [f"model.longest={MAX_LENGTH}", "model.blocks.dropout=0.0", "optimizer.lr=7e-4"]
    if tiny:
        keys += ["model.width=64", "model.heads=4", "model.feedforward=128"]
        keys += ["model.encoder_layers=2", "model.decoder_layers=2"]
    return configure("train", ["model=transformer_base", *keys, *overrides])


def marian_config(*, tiny: bool) -> dict[str, Any]:
    """Compose the config of Marian's variant: that of `config`, with sines before cosines and a bias on the logits."""
    return config("model.positions.layout=halves", "model.output_bias=true", tiny=tiny)


def vocabulary_size(*, tiny: bool) -> int:
    """Return the number of entries of the vocabulary, which both languages share, including the four special ones."""
    return 4 + (96 if tiny else WORD_COUNT)


def translator(recipe: dict[str, Any], entries: int) -> Transformer:
    """Build our translator for a vocabulary of `entries` entries, with random values in every parameter.

    `recipe` is a result of `config` or `marian_config`. If the model has an output bias, as in benchmarks of decoding,
    `_vary_translations` changes the weights.
    """
    model: Transformer = build(recipe["model"], vocabularies=(entries, entries), joint=True)
    randomise_parameters(model)
    if model.output_bias is not None:
        _vary_translations(model, model.output_bias)
    return model


@torch.no_grad()
def _vary_translations(model: Any, bias: Tensor) -> None:
    """Change random weights so that translations have many different words and the maximum length.

    The embedding of BOS is set to zero, like that of Marian's start token. The output bias excludes PAD, BOS and EOS.

    With random weights, the likeliest next word is often the previous word, since input and output embeddings are tied.
    Random signs in the last norm prevent this repetition. The likeliest next word is also often the same for all
    previous words. Three changes make it depend on the previous word. The outputs of feed-forward layers are enlarged.
    The part of these outputs that is the same for all words is removed. The outputs of the decoder's attention layers
    are reduced.
    """
    model.embedding.weight[BOS] = 0
    bias[[PAD, BOS, EOS]] = EXCLUDED_LOGIT
    encoder, decoder = ([*stack.blocks] for stack in (model.encoder, model.decoder))
    for block in encoder + decoder:
        block.feed_forward.expand.weight *= 2
        contract = block.feed_forward.contract.weight
        contract.copy_(2 * (contract - contract.mean(1, keepdim=True)))
    for block in decoder:
        for attention in (block.attention, block.cross_attention):
            attention.out_proj.weight *= 0.3
    signs = decoder[-1].residuals[2].norm.weight
    signs *= torch.randn(signs.shape, generator=generator("signs")).sign()


def sample_pairs(count: int, source: int, target: int, entries: int) -> dict[str, Any]:
    """Sample a batch of `count` sentence pairs, each with `source` source tokens and `target` target tokens.

    These numbers include EOS. `entries` is the size of the vocabulary. The batch has the keys that our translation task
    expects.
    """
    rng = generator("sentences", count)
    words = torch.randint(UNK + 1, entries, (count, source + target), generator=rng)
    words[:, source - 1] = EOS
    starts = torch.full((count, 1), BOS)
    targets = torch.cat([words[:, source:-1], torch.full((count, 1), EOS)], 1)  # (B, T)
    return {
        "ids": [*range(count)],
        "source": words[:, :source],
        "source_lengths": torch.full((count,), source),
        "target_in": torch.cat([starts, targets[:, :-1]], 1),
        "target_out": targets,
        "target_lengths": torch.full((count,), target),
    }


# transformers.


def marian_order(entries: int) -> list[int]:
    """List our ids in the order of Marian's vocabulary: EOS, UNK, the words, and BOS.

    Marian's last entry is both the start token and the padding; it is listed as our BOS.
    """
    return [EOS, UNK, *range(UNK + 1, entries), BOS]


def marian_ids(entries: int) -> Tensor:
    """Return Marian's id for each of our V ids, (V,) int64; BOS and PAD have the same Marian id."""
    ids = torch.empty(entries, dtype=torch.int64)
    ids[marian_order(entries)] = torch.arange(entries - 1)
    ids[PAD] = ids[BOS]
    return ids


def marian(model: Transformer, recipe: dict[str, Any], entries: int) -> nn.Module:
    """Build transformers' MarianMTModel with the weights of our `model` and PyTorch's fused attention.

    `recipe` is the config of `model`, and `entries` the size of our vocabulary.
    """
    options, start = recipe["model"], entries - 2
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_layers"] = options[f"{side}_layers"]
        sides[f"{side}_attention_heads"] = options["heads"]
        sides[f"{side}_ffn_dim"] = options["feedforward"]
    config = MarianConfig(
        vocab_size=entries - 1,
        d_model=options["width"],
        max_position_embeddings=options["longest"],
        activation_function=options["blocks"]["activation"],
        scale_embedding=options["scaled"],
        pad_token_id=start,
        decoder_start_token_id=start,
        eos_token_id=0,
        forced_eos_token_id=None,
        **sides,
    )
    theirs: nn.Module = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="sdpa")
    tensors = to_transformers(dict(model.named_parameters()))
    positions = {name: tensor for name, tensor in theirs.state_dict().items() if "embed_positions" in name}
    theirs.load_state_dict({**positions, **tensors})
    return theirs


def to_transformers(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert our parameters to those of MarianMTModel, with its names and the order of its vocabulary."""
    order = marian_order(len(ours["embedding.weight"]))
    words = ours["embedding.weight"][order]
    blocks = {name: tensor for name, tensor in ours.items() if ".blocks." in name}
    theirs = rename(projections.split(blocks), NAMES.to_theirs).tensors
    theirs["final_logits_bias"] = ours["output_bias"][order][None]  # (V,) -> (1, V)
    names = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    return {**theirs, **{f"{name}.weight": words for name in names}}


def generation(beam: int, tokens: int, entries: int) -> GenerationConfig:
    """Make the options of transformers' `generate` for up to `tokens` new tokens, with a key-value cache.

    `beam` is the number of hypotheses; with 1, decoding is greedy. `entries` is the size of our vocabulary.
    """
    return GenerationConfig(
        num_beams=beam,
        do_sample=False,
        max_new_tokens=tokens,
        length_penalty=1.0,
        use_cache=True,
        pad_token_id=entries - 2,
        decoder_start_token_id=entries - 2,
        eos_token_id=0,
    )


# CTranslate2.


def has_ctranslate2() -> bool:
    """Whether CTranslate2 is installed."""
    return importlib.util.find_spec("ctranslate2") is not None


def ctranslate2_types() -> set[str]:
    """The types in which CTranslate2 computes on this CPU, such as "int8"; it replaces other types by one of these."""
    import ctranslate2

    types: set[str] = ctranslate2.get_supported_compute_types("cpu")
    return types


class _TokenizerStub:
    """A substitute for a tokenizer, with the members that CTranslate2's converter needs.

    Its words are "</s>", "<unk>", "<pad>" and our ids of the ordinary words, written as text.
    """

    eos_token, unk_token = "</s>", "<unk>"

    def __init__(self, entries: int):
        self.entries = entries

    def get_vocab(self) -> dict[str, int]:
        words = [str(word) for word in range(UNK + 1, self.entries)]
        return {name: i for i, name in enumerate((self.eos_token, self.unk_token, *words, "<pad>"))}


def to_words(sentences: Tensor) -> list[list[str]]:
    """Convert sentences (B, N) of our ids to the words of `_TokenizerStub`."""
    special = {EOS: _TokenizerStub.eos_token, UNK: _TokenizerStub.unk_token}
    return [[special.get(word, str(word)) for word in sentence] for sentence in sentences.tolist()]


def to_ids(words: list[str]) -> list[int]:
    """Convert words of `_TokenizerStub` to our ids."""
    special = {_TokenizerStub.eos_token: EOS, _TokenizerStub.unk_token: UNK}
    return [special[word] if word in special else int(word) for word in words]


def ctranslate2_model(theirs: Any, entries: int, folder: Path, **options: Any) -> Engine:
    """Convert transformers' model with CTranslate2's converter; returns it as CTranslate2 runs it on the CPU.

    `theirs` is the model, and `entries` the size of our vocabulary. The converter reads and writes files in `folder`.
    `options` are the keyword arguments of `Engine`.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):  # type: ignore[misc]  # without types
        """Converts the model `theirs`, which is in memory, instead of loading a model and its tokenizer."""

        def load_model(self, *arguments: Any, **options: Any) -> Any:
            return theirs

        def load_tokenizer(self, *arguments: Any, **options: Any) -> _TokenizerStub:
            return _TokenizerStub(entries)

    theirs.config.save_pretrained(folder / "transformers")
    Converter(str(folder / "transformers")).convert(str(folder / "ctranslate2"), force=True)
    return Engine(folder / "ctranslate2", **options)


# PyTorch.


class TorchTranslator(nn.Module):
    """torch.nn.Transformer with scaled embeddings and sinusoidal positions, as in PyTorch's tutorials.

    As in the paper, source embedding, target embedding and output share one matrix, and neither encoder nor decoder has
    a norm after its last layer. By default, nn.Transformer adds this norm, so encoder and decoder are built separately.
    """

    positions: Tensor

    def __init__(self, recipe: dict[str, Any], entries: int):
        super().__init__()
        options = recipe["model"]
        width, self.scale = options["width"], math.sqrt(options["width"])
        layer_options: dict[str, Any] = {
            "d_model": width,
            "nhead": options["heads"],
            "dim_feedforward": options["feedforward"],
            "dropout": options["blocks"]["dropout"],
            "activation": options["blocks"]["activation"],
            "layer_norm_eps": options["blocks"]["norm_eps"],
            "batch_first": True,
        }
        stacks: dict[str, Any] = {
            "custom_encoder": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer_options), options["encoder_layers"], enable_nested_tensor=False
            ),
            "custom_decoder": nn.TransformerDecoder(
                nn.TransformerDecoderLayer(**layer_options), options["decoder_layers"]
            ),
        }
        self.embedding = nn.Embedding(entries, width)
        self.dropout = nn.Dropout(options["blocks"]["dropout"])
        self.transformer = nn.Transformer(width, options["heads"], batch_first=True, **stacks)
        self.register_buffer("positions", sine(torch.arange(options["longest"]).float(), width), persistent=False)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """Compute the logits (B, T, V) from token ids of sources (B, S) and targets (B, T), both without padding."""
        causal = nn.Transformer.generate_square_subsequent_mask(target_in.shape[1], device=source.device)
        x = self.transformer(self._embed(source), self._embed(target_in), tgt_mask=causal, tgt_is_causal=True)
        return F.linear(x, self.embedding.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.embedding(tokens) * self.scale + self.positions[: tokens.shape[1]])
        return embedded


def to_torch(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our parameters, or a dict of their gradients, to the names of TorchTranslator."""
    return rename(ours, TORCH_NAMES.to_theirs).tensors


def torch_peer(model: Transformer, recipe: dict[str, Any]) -> TorchTranslator:
    """Build a TorchTranslator with our weights."""
    theirs = TorchTranslator(recipe, model.embedding.num_embeddings)
    theirs.load_state_dict(to_torch(dict(model.named_parameters())))
    return theirs
