"""Plan the export of a GPT as two graphs: a whole pass without a cache, and a step with a key-value cache.

The cache is an input and an output of the step.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from common.errors import UserError
from common.nn.blocks import BlockCache
from scripts.exporting import tokenizer_files
from scripts.exporting.caches import ConcatenatedCache, most_heads, stack
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.verify.comparison import relative_difference
from seq2seq.models.gpt import Gpt
from seq2seq.models.hypotheses import Hypotheses
from seq2seq.tasks.language_modelling import LanguageModelling
from seq2seq.tokenizers.bpe import Tokenizer

SEED = 0
COMPARED_LENGTHS = ((1, 1), (2, 7), (3, 12), (1, 30))  # batch size, tokens
PIECES_FILE = "pieces.json"


class WholePass(nn.Module):
    """The logits of all positions of known texts."""

    def __init__(self, model: Gpt):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor]:
        """Tokens (B, N) -> logits of the token after each of them (B, N, V)."""
        return (self.model(tokens),)


class Step(nn.Module):
    """One step, from the last token of each text to the logits of the next token."""

    def __init__(self, model: Gpt):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) at position T -> logits of the next token (B, V) and the new past (L, 2, B, h, T + 1, C/h).

        `past` (L, 2, B, h, T, C/h) holds the keys and values of the T previous tokens in each of the L layers.
        """
        before = past.shape[4]
        ancestors = torch.ones(tokens.shape[0], 1, before, dtype=torch.bool, device=tokens.device)
        blocks: Any = self.model.decoder.blocks
        caches = [
            BlockCache(ConcatenatedCache(pair, block.attention)) for pair, block in zip(past, blocks, strict=True)
        ]
        logits = self.model.step(Hypotheses(caches, ancestors, before, sees_all=True), tokens)
        return logits, stack([cache.own for cache in caches])


def plan(model: nn.Module, task: LanguageModelling) -> Plan:
    """Plan the export of a GPT for any batch size, and texts of 1 to `model.longest` tokens.

    Raises UserError if the model's class is not Gpt, since the layout of its decoding state is then unknown.
    """
    if not isinstance(model, Gpt):
        raise UserError(f"{type(model).__name__} cannot be exported: only seq2seq.models.gpt.Gpt can.")
    longest = model.longest
    dimensions = {
        "batch": Dimension(Dim("batch", min=1), "1 or more"),
        "length": Dimension(Dim("length", min=1, max=longest), f"1 to {longest} tokens"),
        "past_length": Dimension(
            Dim("past_length", min=0, max=longest - 1), f"number of previous tokens, 0 to {longest - 1}"
        ),
    }
    layers, heads, width = _cache_shape(model)
    past: list[str | int] = [layers, 2, "batch", heads, "past_length", width]
    tokens = _sample_texts(model, 3, min(7, longest))
    graphs = [
        Graph(
            "model",
            WholePass(model),
            {"tokens": tokens},
            {"tokens": ["batch", "length"]},
            {"logits": "(batch, length, vocabulary): of the token after each"},
        ),
        Graph(
            "decoder",
            Step(model),
            {"tokens": tokens[:, 0].contiguous(), "past": torch.zeros(layers, 2, 3, heads, min(5, longest - 1), width)},
            {"tokens": ["batch"], "past": past},
            {
                "logits": "(batch, vocabulary): of the next token",
                "present": f"({layers}, 2, batch, {heads}, past_length + 1, {width}): the past of the next step",
            },
        ),
    ]
    files, tokenizer, comparisons = _tokenizer(task.data.text_tokenizer())

    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        return _compare(model, functions)

    return Plan(graphs, dimensions, {**_metadata(task), "tokenizer": tokenizer}, files, comparisons, compare)


def _metadata(task: LanguageModelling) -> dict[str, Any]:
    tokenizer = task.data.text_tokenizer()
    special, unknown = tokenizer.special, getattr(tokenizer, "unk", None)
    return {
        "kind": "language modelling",
        "ids": {"begin": special.begin, "end": special.end},
        "text": "ids of a text; those of a whole document follow the id begin",
        "decoding": {
            "first": "pass the ids of a prompt, or begin, one by one; past is empty at first (past_length 0)",
            "then": "tokens holds the ids chosen in the previous step, and past is that step's present",
            "never": [*special.never, *([] if unknown is None else [unknown])],
        },
    }


def _tokenizer(tokenizer: Any) -> tuple[dict[str, str], dict[str, Any], list[Comparison]]:
    """The tokenizer's files, its metadata for model.json, and comparisons.

    A BPE that this program has trained is exported for the package `tokenizers`. Of any other tokenizer, only the
    entries are listed: published tokenizers have files of their own, and with characters, each entry is a character.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer_files.export(tokenizer, tokenizer)
    pieces = tokenizer.pieces(range(tokenizer.size))
    files = {PIECES_FILE: json.dumps(pieces, ensure_ascii=False, indent=0) + "\n"}
    return files, {"pieces": PIECES_FILE, "reader": "entries by id; U+2581 is a space"}, []


@torch.no_grad()
def _compare(model: Gpt, functions: Mapping[str, GraphFunction]) -> list[Comparison]:
    """Compare the logits of both graphs with those of the model on random texts; the step runs token by token."""
    comparisons = []
    layers, heads, width = _cache_shape(model)
    for count, length in COMPARED_LENGTHS:
        tokens = _sample_texts(model, count, min(length, model.longest))
        past, logits = torch.zeros(layers, 2, count, heads, 0, width), []
        for column in tokens.unbind(1):
            outputs = functions["decoder"](column.contiguous(), past.contiguous())
            past = outputs["present"]
            logits.append(outputs["logits"])
        expected, inputs = model(tokens), f"{count} x {tokens.shape[1]} tokens"  # (B, N, V)
        computed = {"with a cache": torch.stack(logits, 1), "without": functions["model"](tokens)["logits"]}
        comparisons += [
            Comparison(f"{inputs}, {name}", "logits", relative_difference(tensor, expected))
            for name, tensor in computed.items()
        ]
    return comparisons


def _cache_shape(model: Gpt) -> tuple[int, int, int]:
    """The numbers of layers, of heads, and of channels of a head."""
    attention: Any = model.decoder.blocks[0].attention
    return model.depth, most_heads(model), attention.inner_width // attention.heads


def _sample_texts(model: Gpt, count: int, length: int) -> Tensor:
    """Sample `count` texts of `length` tokens, (count, length) int64."""
    rng = torch.Generator().manual_seed(SEED)
    return torch.randint(model.embedding.num_embeddings, (count, length), generator=rng)
