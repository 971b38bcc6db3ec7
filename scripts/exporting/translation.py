"""A translator for export: an encoder, and a decoder that goes on by one token and hands its keys and values around."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from common.errors import UserError
from common.nn.attention import Cache
from common.nn.blocks import BlockCache
from scripts.exporting import tokenizer_files
from scripts.exporting.plan import Call, Graph, Plan, Row, Size
from scripts.verify.comparison import relative
from seq2seq.models.transformer import State, Transformer
from seq2seq.tasks.translation import Translation
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, UNK

SEED = 0
SHAPES = ((1, 1, 1), (2, 7, 5), (3, 20, 12), (1, 12, 30))  # batch, source and target tokens


class Read(nn.Module):
    """The encoder, and what all of the decoder's steps have in common."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor]:
        """Ids (B, S) int64 right-padded and their lengths (B,) -> memory (L, 2, B, h, S, C/h).

        For each layer of the decoder the keys and the values of the source.
        """
        return (_stacked([cache.memory for cache in self.model.encode(source, lengths).caches if cache.memory]),)


class Write(nn.Module):
    """One step of the decoder."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, past: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The newest tokens (B,) after T others -> logits of the next (B, V), and what is the past then.

        `past` (L, 2, B, h, T, C/h) and `memory` (L, 2, B, h, S, C/h) are keys and values of each layer, `lengths` (B,)
        those of the sources.
        """
        batch, before, length = tokens.shape[0], past.shape[4], memory.shape[4]
        real = torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, S)
        caches = [BlockCache(Joined(own), Joined(kept)) for own, kept in zip(past, memory, strict=True)]
        ancestors = torch.ones(batch, 1, before, dtype=torch.bool, device=tokens.device)
        state = State(caches, real[:, None, None], ancestors, before)
        logits = self.model.step(state, tokens)
        return logits, _stacked([cache.own for cache in caches])


class Joined(Cache):
    """A cache that grows by exactly what is put in: memory that doubles is for those who keep it."""

    def __init__(self, pair: Tensor):
        """Begin with keys and values, (2, B, h, M, C/h)."""
        super().__init__()
        self.length, self.buffers = pair.shape[3], (pair[0], pair[1])

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, h, N, C/h) at the end -> all keys and values."""
        keys, values = self.content()
        self.length, self.buffers = self.length + k.shape[2], (torch.cat([keys, k], 2), torch.cat([values, v], 2))
        return self.buffers


def plan(model: nn.Module, task: Translation) -> Plan:
    """How a translator is exported: any batch, source and translation.

    Raises UserError for another model than ours, whose state is its own affair.
    """
    if not isinstance(model, Transformer):
        raise UserError(f"{type(model).__name__} cannot be exported: only seq2seq.models.transformer.Transformer can.")
    sizes = {
        "batch": Size(Dim("batch", min=1), "1 or more"),
        "source_length": Size(Dim("source_length", min=1, max=model.longest), f"1 to {model.longest} tokens"),
        "past_length": Size(Dim("past_length", min=0), "tokens of the translation so far, 0 at first"),
    }
    reader, writer = Read(_without_writing(model)), Write(_without_reading(model))
    source, lengths, target = _sentences(model, 3, min(7, model.longest), 5)
    with torch.no_grad():
        (memory,) = reader(source, lengths)
    layers, _, _, heads, _, width = memory.shape
    past: list[str | int] = [layers, 2, "batch", heads, "past_length", width]
    kept: list[str | int] = [layers, 2, "batch", heads, "source_length", width]
    graphs = [
        Graph(
            "encoder",
            reader,
            {"source": source, "lengths": lengths},
            {"source": ["batch", "source_length"], "lengths": ["batch"]},
            {"memory": f"({layers}, 2, batch, {heads}, source_length, {width}): keys and values, for the decoder"},
        ),
        Graph(
            "decoder",
            writer,
            {
                "tokens": target[:, 0],
                "past": torch.zeros(layers, 2, len(source), heads, 5, width),
                "memory": memory,
                "lengths": lengths,
            },
            {"tokens": ["batch"], "past": past, "memory": kept, "lengths": ["batch"]},
            {
                "logits": "(batch, vocabulary): of the next token",
                "present": f"({layers}, 2, batch, {heads}, past_length + 1, {width}): the past of the next step",
            },
        ),
    ]
    files, told, rows = tokenizer_files.make(*task.data.tokenizers())
    compare = _Comparison(model)
    return Plan(graphs, sizes, {**_about(task), "tokenizer": told}, files, rows, compare)


def _about(task: Translation) -> dict[str, Any]:
    options = task.options
    return {
        "kind": "translation",
        "languages": [task.data.source, task.data.target],
        "ids": {"padding": PAD, "begin": BOS, "end": EOS, "unknown": UNK},
        "source": "ids of a sentence with the end after it, padded at the right; lengths count the end",
        "decoding": {
            "first": "tokens are begin, and past has a past_length of 0",
            "then": "tokens are the chosen ones, and past is present",
            "never": [PAD, BOS],
            "most_tokens": f"{options.longest_factor:g} x source_length + {options.longest_extra}, the end among them",
        },
    }


class _Comparison:
    """Teacher forcing in one go against token by token."""

    def __init__(self, model: Transformer):
        self.model = model

    @torch.no_grad()
    def __call__(self, calls: Mapping[str, Call]) -> list[Row]:
        """Differences of the logits of all tokens of random sentences."""
        rows = []
        for count, length, steps in SHAPES:
            source, lengths, target = _sentences(self.model, count, min(length, self.model.longest), steps)
            memory = calls["encoder"](source, lengths)["memory"]
            past, found = memory[..., :0, :], []
            for tokens in target.unbind(1):
                answer = calls["decoder"](tokens.contiguous(), past.contiguous(), memory, lengths)
                past = answer["present"]
                found.append(answer["logits"])
            expected = self.model(source, lengths, target)  # (B, T, V)
            what = f"{count} x {source.shape[1]} to {steps} tokens{', padded' if count > 1 else ''}"
            rows.append(Row(what, "logits", relative(torch.stack(found, 1), expected)))
        return rows


def _sentences(model: Transformer, count: int, source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random sources (B, S) of falling lengths (B,), and targets (B, T) that start with BOS."""
    drawn = torch.Generator().manual_seed(SEED)
    entries = model.embedding if model.source_embedding is None else model.source_embedding
    words = torch.randint(UNK + 1, entries.num_embeddings, (count, source), generator=drawn)
    lengths = torch.tensor([max(1, source - 2 * i) for i in range(count)])
    words[torch.arange(source) >= lengths[:, None]] = PAD
    answers = torch.randint(UNK + 1, model.embedding.num_embeddings, (count, target), generator=drawn)
    answers[:, 0] = BOS
    return words, lengths, answers


def _without_writing(model: Transformer) -> Transformer:
    """A copy with the weights alone that reading a source needs; a file would keep all of them."""
    copied = copy.deepcopy(model)
    copied.output = copied.output_bias = None
    if copied.source_embedding is not None:
        copied.embedding = None
    for block in copied.decoder.blocks:
        block.attention = block.feed_forward = block.residuals = None
    return copied


def _without_reading(model: Transformer) -> Transformer:
    """A copy with the weights alone that a step of the decoder needs."""
    copied = copy.deepcopy(model)
    copied.encoder = copied.source_embedding = None
    return copied


def _stacked(caches: list[Cache]) -> Tensor:
    """(L, 2, B, h, M, C/h)."""
    return torch.stack([torch.stack(cache.content()) for cache in caches])
