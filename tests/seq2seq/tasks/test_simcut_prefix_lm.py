"""SimCut with a decoder-only translator equals a plain loop."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.task import Batch
from seq2seq.tokenizers.bpe import PAD
from tests.cutting import SIMCUT, batches, check_loss, kept, make

KEYS = ["model=gpt_translator", "model.width=16", "model.heads=2", "model.feedforward=24", "model.layers=2", *SIMCUT]


def joined(batch: Batch) -> Tensor:
    """The factors of each row's source, its target, and places after them, whose values have no effect: (B, S + T)."""
    source, target = kept(batch, "source"), kept(batch, "target_in")
    factors = torch.ones(len(source), source.shape[1] + target.shape[1], dtype=source.dtype)
    for b, length in enumerate(batch["source_lengths"].tolist()):
        count = int((batch["target_in"][b] != PAD).sum())
        factors[b, : length + count] = torch.cat((source[b, :length], target[b, :count]))
    return factors


@pytest.mark.parametrize("prefix", ["full", "causal"])
def test_it_is_the_loss_of_a_plain_loop_with_its_gradients(tmp_path: Path, prefix: str) -> None:
    task, model = make(tmp_path, *KEYS, f"model.prefix={prefix}")
    (batch,) = batches(task, [8])
    check_loss(task, model.double(), batch, {"embedding": [joined(batch)]})
