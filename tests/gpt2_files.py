"""Small GPT-2 files in transformers' layout, with random weights, and the files of a byte-level BPE."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
from torch import Tensor

from common.machine.seeds import generator
from seq2seq.tokenizers.bpe import byte_alphabet

WIDTH, HEADS, LAYERS, LONGEST = 24, 3, 2, 16
MERGES = [("t", "h"), ("th", "e"), ("\u0120", "the")]
END = "<|endoftext|>"
VOCABULARY = [*sorted(byte_alphabet()), *("".join(merge) for merge in MERGES), END]
ENTRIES = len(VOCABULARY)


def state_dict(prefix: str = "", entries: int = ENTRIES) -> dict[str, Tensor]:
    """Random weights by transformers' names."""
    rng, norms = generator("gpt2 file"), ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
    block: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (WIDTH,))
    for name, (inputs, outputs) in {
        "attn.c_attn": (WIDTH, 3 * WIDTH),
        "attn.c_proj": (WIDTH, WIDTH),
        "mlp.c_fc": (WIDTH, 4 * WIDTH),
        "mlp.c_proj": (4 * WIDTH, WIDTH),
    }.items():
        block |= {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}
    shapes: dict[str, Any] = {"wte.weight": (entries, WIDTH), "wpe.weight": (LONGEST, WIDTH)}
    shapes |= {f"h.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    return {prefix + name: torch.empty(shape).normal_(std=0.3, generator=rng) for name, shape in shapes.items()}


def write_tokenizer(folder: Path, kind: str, entries: Sequence[str] = VOCABULARY) -> None:
    """Write vocab.json and merges.txt, or tokenizer.json."""
    ids = {entry: i for i, entry in enumerate(entries)}
    if kind == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        merges = "\n".join(" ".join(merge) for merge in MERGES)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
        return
    library = tokenizers.Tokenizer(tokenizers.models.BPE(ids, MERGES))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens([END])
    library.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, kind: str = "vocab.json") -> Path:
    """Write weights and a tokenizer; returns the file of the weights."""
    safetensors.torch.save_file(state_dict(), folder / "model.safetensors")
    write_tokenizer(folder, kind)
    return folder / "model.safetensors"
