"""Plan the export of a translator as two graphs: the encoder, and a decoder step.

The key-value cache is an input and an output of the decoder step.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from common.errors import UserError
from common.nn.blocks import BlockCache
from common.nn.padding import is_real
from scripts.exporting import prefix_lm, tokenizer_files
from scripts.exporting.caches import ConcatenatedCache, most_heads, stack
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.verify.comparison import relative_difference
from seq2seq.models.bert_translator import BertTranslator
from seq2seq.models.prefix_lm import PrefixLm
from seq2seq.models.transformer import State, Transformer
from seq2seq.tasks.translation import Translation
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK

SEED = 0
COMPARED_LENGTHS = ((1, 1, 1), (2, 7, 5), (3, 20, 12), (1, 12, 30))  # batch size, source length, target length


class Encoder(nn.Module):
    """The encoder, and the projections to keys and values that each decoder layer applies to the encoder's output."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """Source ids (B, S) int64, right-padded, and lengths of sources (B,) -> memory (L, 2, B, h, S, C/h).

        `memory` holds the keys and values of the source for the cross-attention of the L decoder layers. C is the
        model's width, and h is the number of heads.
        """
        return (stack([cache.memory for cache in self.model.encode(source, lengths).caches if cache.memory]),)


class DecoderStep(nn.Module):
    """One step of the decoder, from the last token of each sentence to the logits of the next token."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, past: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) at position T -> logits of the next token (B, V) and the new past (L, 2, B, h, T + 1, C/h).

        V is the size of the target vocabulary. `past` (L, 2, B, h, T, C/h) holds the keys and values of the T previous
        tokens in each of the L layers. `memory` (L, 2, B, h, S, C/h) is the output of `Encoder`. `lengths` (B,) are the
        lengths of the sources.
        """
        batch, before, length = tokens.shape[0], past.shape[4], memory.shape[4]
        real = is_real(lengths, length)
        blocks: Any = self.model.decoder.blocks
        caches = [
            BlockCache(ConcatenatedCache(own, block.attention), ConcatenatedCache(source, block.cross_attention))
            for own, source, block in zip(past, memory, blocks, strict=True)
        ]
        ancestors = torch.ones(batch, 1, before, dtype=torch.bool, device=tokens.device)
        state = State(caches, ancestors, before, sees_all=True, real=real[:, None, None])
        logits = self.model.step(state, tokens)
        return logits, stack([cache.own for cache in caches])


def plan(model: nn.Module, task: Translation) -> Plan:
    """Plan the export of a translator for any batch size and target length, and sources of 1 to `model.longest` tokens.

    Raises UserError if the model's class is not known, since the layout of its decoding state is then unknown.
    """
    if not isinstance(model, Transformer | PrefixLm):
        raise UserError(
            f"{type(model).__name__} cannot be exported: only the models in seq2seq/models/ and their subclasses can."
        )
    dimensions = {
        "batch": Dimension(Dim("batch", min=1), "1 or more"),
        "source_length": Dimension(Dim("source_length", min=1, max=model.longest), f"1 to {model.longest} tokens"),
        "past_length": Dimension(Dim("past_length", min=0), "number of previous target tokens, initially 0"),
    }
    encoder, decoder = _graphs(model)
    source, lengths, target = sample_sentences(model, 3, min(7, model.longest), 5)
    with torch.no_grad():
        (memory,) = encoder(source, lengths)
    layer_count, _, _, heads, _, width = memory.shape
    own_heads = most_heads(model)
    past_shape: list[str | int] = [layer_count, 2, "batch", own_heads, "past_length", width]
    memory_shape: list[str | int] = [layer_count, 2, "batch", heads, "source_length", width]
    graphs = [
        Graph(
            "encoder",
            encoder,
            {"source": source, "lengths": lengths},
            {"source": ["batch", "source_length"], "lengths": ["batch"]},
            {"memory": f"({layer_count}, 2, batch, {heads}, source_length, {width}): keys and values, for the decoder"},
        ),
        Graph(
            "decoder",
            decoder,
            {
                "tokens": target[:, 0],
                "past": torch.zeros(layer_count, 2, len(source), own_heads, 5, width),
                "memory": memory,
                "lengths": lengths,
            },
            {"tokens": ["batch"], "past": past_shape, "memory": memory_shape, "lengths": ["batch"]},
            {
                "logits": "(batch, vocabulary): of the next token",
                "present": f"({layer_count}, 2, batch, {own_heads}, past_length + 1, {width}): the next step's past",
            },
        ),
    ]
    files, tokenizer, comparisons = tokenizer_files.export(*task.data.tokenizers())

    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        return compare_logits(model, partial(_logits, functions, own_heads))

    return Plan(graphs, dimensions, {**metadata(task), "tokenizer": tokenizer}, files, comparisons, compare)


def _graphs(model: Transformer | PrefixLm) -> tuple[nn.Module, nn.Module]:
    """The modules of the graphs "encoder" and "decoder"."""
    if isinstance(model, PrefixLm):
        return prefix_lm.Encoder(model), prefix_lm.DecoderStep(model)
    return Encoder(_encoder_part(model)), DecoderStep(_decoder_part(model))


def metadata(task: Translation) -> dict[str, Any]:
    """Describe languages, ids and decoding for model.json."""
    options = task.options
    return {
        "kind": "translation",
        "languages": [task.data.source, task.data.target],
        "ids": {"padding": PAD, "begin": BOS, "end": EOS, "unknown": UNK},
        "source": "ids of a sentence and the end id, right-padded; lengths include the end id",
        "decoding": {
            "first": "tokens holds the id begin for each sentence, and past is empty (past_length 0)",
            "then": "tokens holds the ids chosen in the previous step, and past is that step's present",
            "never": [PAD, BOS],
            "most_tokens": f"{options.longest_factor:g} x source_length + {options.longest_extra}, including the end",
        },
    }


def _logits(
    functions: Mapping[str, GraphFunction], own_heads: int, source: Tensor, lengths: Tensor, target: Tensor
) -> list[Tensor]:
    """The logits (B, V) after each target token by the exported graphs, which decode token by token.

    `own_heads` is the number of heads in the decoder's `past`.
    """
    memory = functions["encoder"](source, lengths)["memory"]
    layers, pair, count, _, _, width = memory.shape
    past, logits = memory.new_zeros(layers, pair, count, own_heads, 0, width), []
    for tokens in target.unbind(1):
        outputs = functions["decoder"](tokens.contiguous(), past.contiguous(), memory, lengths)
        past = outputs["present"]
        logits.append(outputs["logits"])
    return logits


@torch.no_grad()
def compare_logits(model: Any, decode: Callable[[Tensor, Tensor, Tensor], list[Tensor]]) -> list[Comparison]:
    """Compare the logits of the exported graphs with those of the model on random sentences.

    `decode` maps sources, their lengths and targets to the graphs' logits (B, V) after each target token. The model
    computes the logits of all target tokens in one forward pass.
    """
    comparisons = []
    for count, length, steps in COMPARED_LENGTHS:
        source, lengths, target = sample_sentences(model, count, min(length, model.longest), steps)
        computed, expected = torch.stack(decode(source, lengths, target), 1), model(source, lengths, target)
        inputs = f"{count} x {source.shape[1]} to {steps} tokens{', padded' if count > 1 else ''}"
        comparisons.append(Comparison(inputs, "logits", relative_difference(computed, expected)))  # both (B, T, V)
    return comparisons


def sample_sentences(model: Any, count: int, source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample `count` sources of up to `source` tokens, and `count` targets of `target` tokens.

    Returns the right-padded sources (B, S), their lengths (B,) in descending order, and the targets (B, T), which start
    with BOS.
    """
    rng = torch.Generator().manual_seed(SEED)
    embedding = getattr(model, "source_embedding", None) or model.embedding
    embedding = model.embeddings.tokens if isinstance(model, BertTranslator) else embedding
    words = torch.randint(UNK + 1, embedding.num_embeddings, (count, source), generator=rng)
    lengths = torch.tensor([max(1, source - 2 * i) for i in range(count)])
    words[torch.arange(source) >= lengths[:, None]] = PAD
    targets = torch.randint(UNK + 1, model.embedding.num_embeddings, (count, target), generator=rng)
    targets[:, 0] = BOS
    return words, lengths, targets


def _encoder_part(model: Transformer) -> Transformer:
    """Copy the model and remove weights that encoding does not need.

    A graph contains all weights of the module that is traced, including those that the module does not use.
    """
    copied = copy.deepcopy(model)
    _remove(copied, "output", "output_bias")
    if copied.source_embedding is not None or isinstance(copied, BertTranslator):
        _remove(copied, "embedding")
    for block in copied.decoder.blocks:
        _remove(block, "attention", "feed_forward", "residuals")
    return copied


def _decoder_part(model: Transformer) -> Transformer:
    """Copy the model and remove weights that a decoder step does not need (see `_encoder_part`)."""
    copied = copy.deepcopy(model)
    _remove(copied, "encoder", "source_embedding")
    if isinstance(copied, BertTranslator):
        _remove(copied, "embeddings")
    return copied


def _remove(module: nn.Module, *names: str) -> None:
    """Set parts of a module to None."""
    for name in names:
        setattr(module, name, None)
