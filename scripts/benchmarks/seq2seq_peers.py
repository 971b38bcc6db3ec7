"""Translators of transformers, CTranslate2 and PyTorch, with our weights (Vaswani et al. 2017, arXiv 1706.03762).

Marian's form of it, which all three translate with, starts from an embedding of zeros and has a bias for each logit.
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
from scripts.benchmarks.drawing import redraw
from seq2seq.importing.marian import NAMES
from seq2seq.models.transformer import Transformer
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK

WORDS = 8000  # beside the four special entries
LONGEST = 256
NEVER = -1e4  # a logit that nothing chooses

TORCH_NAMES = Table(
    ("embedding.weight", "embedding.weight"),
    *with_prefixes("transformer.encoder.layers.{i}.", "encoder.blocks.{i}.", TORCH_ENCODER_LAYER),
    *with_prefixes("transformer.decoder.layers.{i}.", "decoder.blocks.{i}.", TORCH_DECODER_LAYER),
)


def config(*overrides: str, tiny: bool) -> dict[str, Any]:
    """The base model and its recipe as `train.py model=transformer_base` takes them, with a rate and no dropout.

    Its own rate is a factor of the schedule's. Without dropout the very work that is timed can be compared. With `tiny`
    it has two narrow layers.
    """
    keys = [f"model.longest={LONGEST}", "model.blocks.dropout=0.0", "optimizer.lr=7e-4"]
    if tiny:
        keys += ["model.width=64", "model.heads=4", "model.feedforward=128"]
        keys += ["model.encoder_layers=2", "model.decoder_layers=2"]
    return configure("train", ["model=transformer_base", *keys, *overrides])


def marian_form(*, tiny: bool) -> dict[str, Any]:
    """The same in Marian's form."""
    return config("model.positions.layout=halves", "model.output_bias=true", tiny=tiny)


def vocabulary(*, tiny: bool) -> int:
    """Entries of the joint vocabulary, the special ones among them."""
    return 4 + (96 if tiny else WORDS)


def translator(recipe: dict[str, Any], entries: int) -> Transformer:
    """Ours, with every tensor drawn at random."""
    model: Transformer = build(recipe["model"], vocabularies=(entries, entries), joint=True)
    redraw(model)
    if model.output_bias is not None:
        _lead_on(model, model.output_bias)
    return model


@torch.no_grad()
def _lead_on(model: Any, bias: Tensor) -> None:
    """Make translations that are sequences of many words, all as long as they may be, by what a random model lacks.

    BOS is Marian's start, zeros; the bias keeps the end and the other special entries from being chosen. A word would
    be followed by itself but for the last norm's signs, and all words by the same one but for feed-forwards that are
    larger than what attention adds, and add nothing that is common to all words.
    """
    model.embedding.weight[BOS] = 0
    bias[[PAD, BOS, EOS]] = NEVER
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


def pairs(count: int, source: int, target: int, entries: int) -> dict[str, Any]:
    """A batch of sentence pairs of random words with so many tokens on each side, their ends among them."""
    draw = generator("sentences", count)
    words = torch.randint(UNK + 1, entries, (count, source + target), generator=draw)
    words[:, source - 1] = EOS
    starts = torch.full((count, 1), BOS)
    answers = torch.cat([words[:, source:-1], torch.full((count, 1), EOS)], 1)  # (B, T)
    return {
        "ids": [*range(count)],
        "source": words[:, :source],
        "source_lengths": torch.full((count,), source),
        "target_in": torch.cat([starts, answers[:, :-1]], 1),
        "target_out": answers,
        "target_lengths": torch.full((count,), target),
    }


# transformers.


def marian_order(entries: int) -> list[int]:
    """Our ids in Marian's order: the end, the unknown, words, and its last, whose zeros start and pad."""
    return [EOS, UNK, *range(UNK + 1, entries), BOS]


def marian_ids(entries: int) -> Tensor:
    """Marian's id of each of ours, (V,); BOS and PAD are one."""
    ids = torch.empty(entries, dtype=torch.int64)
    ids[marian_order(entries)] = torch.arange(entries - 1)
    ids[PAD] = ids[BOS]
    return ids


def marian(model: Transformer, recipe: dict[str, Any], entries: int) -> nn.Module:
    """transformers' MarianMTModel with our weights, and attention by PyTorch's fused kernel."""
    sizes, last = recipe["model"], entries - 2
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_layers"] = sizes[f"{side}_layers"]
        sides[f"{side}_attention_heads"] = sizes["heads"]
        sides[f"{side}_ffn_dim"] = sizes["feedforward"]
    options = MarianConfig(
        vocab_size=entries - 1,
        d_model=sizes["width"],
        max_position_embeddings=sizes["longest"],
        activation_function=sizes["blocks"]["activation"],
        scale_embedding=sizes["scaled"],
        pad_token_id=last,
        decoder_start_token_id=last,
        eos_token_id=0,
        forced_eos_token_id=None,
        **sides,
    )
    theirs: nn.Module = AutoModelForSeq2SeqLM.from_config(options, attn_implementation="sdpa")
    tensors = in_transformers(dict(model.named_parameters()))
    places = {name: tensor for name, tensor in theirs.state_dict().items() if "embed_positions" in name}
    theirs.load_state_dict({**places, **tensors})
    return theirs


def in_transformers(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under the names of MarianMTModel, and in its vocabulary's order."""
    order = marian_order(len(ours["embedding.weight"]))
    words = ours["embedding.weight"][order]
    blocks = {name: tensor for name, tensor in ours.items() if ".blocks." in name}
    theirs = rename(projections.split(blocks), NAMES.to_theirs).tensors
    theirs["final_logits_bias"] = ours["output_bias"][order][None]  # (V,) -> (1, V)
    names = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    return {**theirs, **{f"{name}.weight": words for name in names}}


def generation(beam: int, tokens: int, entries: int) -> GenerationConfig:
    """What its `generate` shall do: translations of so many tokens by greedy or beam search, with the cache."""
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
    """Whether it is installed."""
    return importlib.util.find_spec("ctranslate2") is not None


class _Entries:
    """As much of a tokenizer as its converter asks for: entries, named by their ids in ours."""

    eos_token, unk_token = "</s>", "<unk>"

    def __init__(self, entries: int):
        self.entries = entries

    def get_vocab(self) -> dict[str, int]:
        words = [str(word) for word in range(UNK + 1, self.entries)]
        return {name: i for i, name in enumerate((self.eos_token, self.unk_token, *words, "<pad>"))}


def in_words(sentences: Tensor) -> list[list[str]]:
    """Sentences (B, N) of our ids as CTranslate2 reads them."""
    special = {EOS: _Entries.eos_token, UNK: _Entries.unk_token}
    return [[special.get(word, str(word)) for word in sentence] for sentence in sentences.tolist()]


def in_ids(words: list[str]) -> list[int]:
    """What it writes, in our ids."""
    special = {_Entries.eos_token: EOS, _Entries.unk_token: UNK}
    return [special[word] if word in special else int(word) for word in words]


def ctranslate2_model(theirs: Any, entries: int, folder: Path, *, compute: str, threads: int) -> Any:
    """CTranslate2's Translator with the weights of transformers' model, by its own converter, through a new folder."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        """Converts a model that lies in memory and has no tokenizer."""

        def load_model(self, *arguments: Any, **options: Any) -> Any:
            return theirs

        def load_tokenizer(self, *arguments: Any, **options: Any) -> _Entries:
            return _Entries(entries)

    theirs.config.save_pretrained(folder / "transformers")
    Converter(str(folder / "transformers")).convert(str(folder / "ctranslate2"), force=True)
    path = str(folder / "ctranslate2")
    return ctranslate2.Translator(path, device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads)


# PyTorch.


class TorchTranslator(nn.Module):
    """torch.nn.Transformer between tied, scaled embeddings with the paper's sines, as its tutorials build it.

    Its stacks end in a norm, which the paper's do not, so they are made without.
    """

    places: Tensor

    def __init__(self, recipe: dict[str, Any], entries: int):
        super().__init__()
        sizes = recipe["model"]
        width, self.scale = sizes["width"], math.sqrt(sizes["width"])
        options: dict[str, Any] = {
            "d_model": width,
            "nhead": sizes["heads"],
            "dim_feedforward": sizes["feedforward"],
            "dropout": sizes["blocks"]["dropout"],
            "activation": sizes["blocks"]["activation"],
            "layer_norm_eps": sizes["blocks"]["norm_eps"],
            "batch_first": True,
        }
        stacks: dict[str, Any] = {
            "custom_encoder": nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**options), sizes["encoder_layers"], enable_nested_tensor=False
            ),
            "custom_decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(**options), sizes["decoder_layers"]),
        }
        self.embedding = nn.Embedding(entries, width)
        self.dropout = nn.Dropout(sizes["blocks"]["dropout"])
        self.transformer = nn.Transformer(width, sizes["heads"], batch_first=True, **stacks)
        self.register_buffer("places", sine(torch.arange(sizes["longest"]).float(), width), persistent=False)

    def forward(self, source: Tensor, target_in: Tensor) -> Tensor:
        """Sources (B, S) and targets (B, T), none of them padded -> logits (B, T, V)."""
        causal = nn.Transformer.generate_square_subsequent_mask(target_in.shape[1], device=source.device)
        x = self.transformer(self._embed(source), self._embed(target_in), tgt_mask=causal, tgt_is_causal=True)
        return F.linear(x, self.embedding.weight)

    def _embed(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.embedding(tokens) * self.scale + self.places[: tokens.shape[1]])
        return embedded


def in_torch(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, or what belongs to each of them (its gradient), under the names of TorchTranslator."""
    return rename(ours, TORCH_NAMES.to_theirs).tensors


def torch_peer(model: Transformer, recipe: dict[str, Any]) -> TorchTranslator:
    """Theirs, with our weights."""
    theirs = TorchTranslator(recipe, model.embedding.num_embeddings)
    theirs.load_state_dict(in_torch(dict(model.named_parameters())))
    return theirs
