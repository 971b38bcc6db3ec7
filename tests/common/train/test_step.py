"""Gradients that share memory; tests/*/tasks/test_step.py test that a step does not depend on its split."""

import pytest
import torch
from torch import nn

from common.train.step import Stepper


class Tokens(nn.Module):
    """A token and its position are only added, so that their gradients are equal."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.token, self.position = (nn.Parameter(torch.randn(4, generator=generator)) for _ in range(2))
        self.out = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self, x):
        """x (B, N, 4) -> (B,)."""
        token = (self.token + self.position).expand(len(x), 1, -1)
        return (torch.cat([token, x], dim=1) @ self.out).tanh().mean(dim=1)


class Total:
    """A task with the sum of the model's outputs as its loss."""

    def normalisers(self, batch):
        return {"samples": float(len(batch["x"]))}

    def loss(self, model, batch, normalisers):
        return model(batch["x"]).sum() / normalisers["samples"], {}


class OneBuffer(Total):
    """Sets one buffer as the gradient of two parameters, as a compiled backward pass may."""

    def loss(self, model, batch, normalisers):
        value = super().loss(model, batch, normalisers)[0]
        parameters = [model.token, model.position, model.out]
        gradients = torch.autograd.grad(value, parameters)
        before = [p.grad for p in parameters]
        shared = gradients[0] if before[0] is None else before[0].add_(gradients[0])
        if before[1] is not None and before[1].data_ptr() == shared.data_ptr():
            shared.add_(gradients[0])  # as autograd does to a buffer that it holds twice
        elif before[1] is not None:
            before[1].add_(gradients[1])
        model.token.grad = shared
        model.position.grad = shared.view(4) if before[1] is None else before[1]
        model.out.grad = gradients[2] if before[2] is None else before[2] + gradients[2]
        return torch.zeros((), requires_grad=True), {}


def weights_after_step(model: nn.Module, micro_batches: int, task=None) -> dict[str, torch.Tensor]:
    """The weights after one clipped step of plain gradient descent on eight samples."""
    x = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    stepper = Stepper(task or Total(), model, optimizer, torch.device("cpu"), "fp32", clip_norm=0.1)
    stepper([{"x": part, "ids": list(range(len(part)))} for part in x.chunk(micro_batches)], 0)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_gradients_that_share_memory_are_not_changed_twice(micro_batches):
    expected = weights_after_step(Tokens(), micro_batches)
    weights = weights_after_step(Tokens(), micro_batches, OneBuffer())
    for name, weight in expected.items():
        assert torch.allclose(weights[name], weight, rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
def test_a_compiled_model_takes_the_same_step():
    expected, model = weights_after_step(Tokens(), 4), Tokens()
    model.compile()
    for name, weight in weights_after_step(model, 4).items():
        assert torch.allclose(weight, expected[name], rtol=1e-5, atol=1e-6), name
