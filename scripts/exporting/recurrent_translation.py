"""Plan the export of a translator with a recurrent decoder as two graphs: the encoder, and a decoder step.

The decoder step takes the state of the previous step and returns the new one: a vector for each sentence. The encoder's
graph loops over the source inside one operator, so that it accepts any length.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from common.nn.padding import is_real
from scripts.exporting import tokenizer_files
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.exporting.translation import compare_logits, metadata, sample_sentences
from seq2seq.models.recurrent import RecurrentTranslator, State
from seq2seq.tasks.translation import Translation

# Modules that only encoding needs, and modules that only a decoder step needs, if a model has them.
ENCODER_ONLY = ("encoder", "source_embedding", "summary", "bridge", "cross_attention.key")
DECODER_ONLY = ("output", "decoder", "deep_output", "combine", "cross_attention.query", "cross_attention.score")


class Layout:
    """How the tensors of a `State` are packed: those of a sentence into one vector, those of its tokens into another.

    `example` is a state of the model that is exported.
    """

    def __init__(self, example: State):
        self.parts = [len(layer) for layer in example.hidden]  # tensors of each layer's state
        self.has_context, self.has_attentional = example.context is not None, example.attentional is not None
        self.widths = [part.shape[-1] for part in _vectors(example)]
        self.memory_widths = [part.shape[-1] for part in _memories(example)]  # empty for a model without attention

    def pack(self, state: State) -> tuple[Tensor, ...]:
        """A state -> vectors (B, K) and, for a model with attention, its memory (B, S, M)."""
        memories = _memories(state)
        return torch.cat(_vectors(state), -1), *([torch.cat(memories, -1)] if memories else [])

    def unpack(self, vectors: Tensor, memory: Tensor | None, lengths: Tensor | None) -> State:
        """The inverse of `pack`; `lengths` (B,) are those of the sources."""
        parts = iter(vectors.split(self.widths, -1))
        hidden = [tuple(next(parts) for _ in range(count)) for count in self.parts]
        context, attentional = (next(parts) if exists else None for exists in (self.has_context, self.has_attentional))
        if memory is None or lengths is None:
            return State(hidden, context, attentional)
        memories = memory.split(self.memory_widths, -1)
        return State(hidden, context, attentional, memories[0], memories[-1], is_real(lengths, memory.shape[1]))


class Encoder(nn.Module):
    """The encoder, and what else is computed from the source alone."""

    def __init__(self, model: RecurrentTranslator, layout: Layout):
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Source ids (B, S) int64, right-padded, and lengths of sources (B,) -> state (B, K) and memory (B, S, M)."""
        return self.layout.pack(self.model.encode(source, lengths))


class DecoderStep(nn.Module):
    """One step of a decoder without attention."""

    def __init__(self, model: RecurrentTranslator, layout: Layout):
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The last tokens (B,) and state (B, K) -> logits of the next token (B, V), and the new state (B, K)."""
        unpacked = self.layout.unpack(state, None, None)
        return self.model.step(unpacked, tokens), self.layout.pack(unpacked)[0]


class AttentionStep(nn.Module):
    """One step of a decoder with attention."""

    def __init__(self, model: RecurrentTranslator, layout: Layout):
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, tokens: Tensor, state: Tensor, memory: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """As `DecoderStep.forward`, with the encoder's memory (B, S, M) and the lengths of the sources (B,)."""
        unpacked = self.layout.unpack(state, memory, lengths)
        return self.model.step(unpacked, tokens), self.layout.pack(unpacked)[0]


def plan(model: RecurrentTranslator, task: Translation) -> Plan:
    """Plan the export for any batch size and target length, and sources of 1 to `model.longest` tokens."""
    source, lengths, target = sample_sentences(model, 3, min(7, model.longest), 5)
    with torch.no_grad():
        example = model.encode(source, lengths)
        layout = Layout(example)
        state, *memory = layout.pack(example)
    has_memory, width = bool(memory), state.shape[1]
    dimensions = {
        "batch": Dimension(Dim("batch", min=1), "1 or more"),
        "source_length": Dimension(Dim("source_length", min=1, max=model.longest), f"1 to {model.longest} tokens"),
    }
    shapes: dict[str, list[str | int]] = {"tokens": ["batch"], "state": ["batch", width]}
    inputs = {"tokens": target[:, 0], "state": state}
    outputs = {"state": f"(batch, {width}): for the decoder's first step"}
    if has_memory:
        channels = memory[0].shape[2]
        inputs |= {"memory": memory[0], "lengths": lengths}
        shapes |= {"memory": ["batch", "source_length", channels], "lengths": ["batch"]}
        outputs["memory"] = f"(batch, source_length, {channels}): for each step of the decoder"
    embedding = ("embedding",) if model.source_embedding is not None else ()  # of the target
    decoder = (AttentionStep if has_memory else DecoderStep)(_part(model, ENCODER_ONLY), layout)
    graphs = [
        Graph(
            "encoder",
            Encoder(_part(model, DECODER_ONLY + embedding), layout),
            {"source": source, "lengths": lengths},
            {"source": ["batch", "source_length"], "lengths": ["batch"]},
            outputs,
        ),
        Graph(
            "decoder",
            decoder,
            inputs,
            shapes,
            {
                "logits": "(batch, vocabulary): of the next token",
                "next_state": f"(batch, {width}): the state of the next step",
            },
        ),
    ]
    files, tokenizer, comparisons = tokenizer_files.export(*task.data.tokenizers())
    content = {**metadata(task), "tokenizer": tokenizer}
    content["decoding"] |= {
        "first": "tokens holds the id begin for each sentence, and state is that of the encoder",
        "then": "tokens holds the ids chosen in the previous step, and state is that step's next_state",
    }

    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        return compare_logits(model, partial(_logits, functions))

    return Plan(graphs, dimensions, content, files, comparisons, compare)


def _logits(functions: Mapping[str, GraphFunction], source: Tensor, lengths: Tensor, target: Tensor) -> list[Tensor]:
    """The logits (B, V) after each target token by the exported graphs, which decode token by token."""
    encoded, logits = functions["encoder"](source, lengths), []
    state, memory = encoded["state"], [encoded["memory"], lengths] if "memory" in encoded else []
    for tokens in target.unbind(1):
        outputs = functions["decoder"](tokens.contiguous(), state, *memory)
        state = outputs["next_state"]
        logits.append(outputs["logits"])
    return logits


def _vectors(state: State) -> list[Tensor]:
    """The tensors of a state with one row for each sentence."""
    parts = [*(part for layer in state.hidden for part in layer), state.context, state.attentional]
    return [part for part in parts if part is not None]


def _memories(state: State) -> list[Tensor]:
    """The tensors of a state with one vector for each token of a source; memory and keys may be the same."""
    if state.memory is None or state.keys is None:
        return []
    return [state.memory] if state.keys is state.memory else [state.memory, state.keys]


def _part(model: RecurrentTranslator, unneeded: tuple[str, ...]) -> Any:
    """Copy the model and replace modules by None, since a graph contains all weights of the module that is traced."""
    copied = copy.deepcopy(model)
    for name in unneeded:
        parent, _, last = name.rpartition(".")
        owner = getattr(copied, parent, None) if parent else copied
        if hasattr(owner, last):
            setattr(owner, last, None)
    return copied
