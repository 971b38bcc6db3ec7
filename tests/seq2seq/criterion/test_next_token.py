"""The losses of next tokens in chunks are those of PyTorch's cross-entropy, and so are their gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine.seeds import generator
from seq2seq.criterion import next_token
from seq2seq.criterion.next_token import next_token_losses


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rng = generator("next tokens")
    logits = torch.randn(3, 7, 11, dtype=torch.float64, generator=rng) * 5 - 60
    return logits.to(dtype).requires_grad_(), torch.randint(11, (3, 7), generator=rng)


@pytest.mark.parametrize("chunk", [1, 40, 2**22], ids=["single rows", "chunks of 3 rows", "one chunk"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-3)],  # gradients are rounded to bf16
    ids=str,
)
def test_losses_and_gradients_are_those_of_pytorch(
    dtype: torch.dtype, tolerance: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_token, "CHUNK_ELEMENTS", chunk)
    logits, targets = inputs(dtype)
    losses = next_token_losses(logits, targets)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)
    assert losses.shape == (3, 7) and losses.dtype == torch.promote_types(dtype, torch.float32)
    close: dict[str, Any] = {"rtol": 0, "atol": tolerance}
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=min(tolerance, 1e-4))
    weights = torch.rand(3, 7, generator=generator("weights"))
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype and expected.std() > 1
    torch.testing.assert_close(logits.grad.double(), exact.grad, **close)


@torch.no_grad()
def test_no_gradient_is_needed_for_losses() -> None:
    logits, targets = inputs(torch.float32)
    assert not next_token_losses(logits, targets).requires_grad
