"""An exponential moving average of a model's weights, kept beside it and evaluated in its place.

Polyak and Juditsky 1992; the warm-up of the decay is that of TensorFlow's ExponentialMovingAverage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common.errors import UserError
from common.machine import distributed


class Average:
    """The running average of all parameters; buffers are copied. A plain dict under the model's own names."""

    def __init__(self, model: nn.Module, decay: float):
        """Start at the model's present weights; `decay` in [0, 1] is the share of the old average that a step keeps."""
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step.

        The decay grows from 0.1 as (1 + n) / (10 + n), so that the random start is soon forgotten in a short run.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = model.state_dict()
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in now]
        average = get_ema_multi_avg_fn(decay)
        average([self.weights[n] for n in parameters], [now[n] for n in parameters], self.updates)
        for name in now.keys() - set(parameters):
            self.weights[name].copy_(now[name])
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` computes with the averaged weights; afterwards it has its own again, bit for bit.

        Values are copied into the model's own tensors, so a model compiled in place needs no new compilation.
        A checkpoint must not be written inside.
        """
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        try:
            _copy(self.weights, model)
            yield
        finally:
            _copy(own, model)

    def state_dict(self) -> dict[str, Any]:
        """`updates` and `weights`; the latter fit the model's own load_state_dict. Shared memory, where it can be."""
        return {"updates": self.updates, "weights": distributed.whole(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; raises UserError when it is another model's."""
        saved: dict[str, Tensor] = state["weights"]
        if {n: v.shape for n, v in saved.items()} != {n: v.shape for n, v in self.weights.items()}:
            raise UserError("the checkpoint's averaged weights are of another model; resume with its own config.")
        for name, value in saved.items():
            distributed.fill(self.weights[name], value)
        self.updates = state["updates"]


@torch.no_grad()
def _copy(weights: dict[str, Tensor], model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        value.copy_(weights[name])
