"""An exponential moving average (EMA) of a model's weights, which is evaluated instead of the raw weights.

Averaging weights over updates goes back to Polyak and Juditsky 1992, whose average is uniform and not exponential. The
decay grows during the first updates, as in TensorFlow's ExponentialMovingAverage.
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
    """The moving average of all parameters by name, with a copy of the model's latest buffers."""

    def __init__(self, model: nn.Module, decay: float):
        """Start from a copy of the model's weights. An update is average = decay * average + (1 - decay) * weights."""
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average after an optimizer step.

        The decay of update n (counted from 0) is min(decay, (1 + n) / (10 + n)). The initial weights therefore lose
        their influence quickly, even in a short run.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = model.state_dict()
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False) if name in current]
        average = get_ema_multi_avg_fn(decay)
        average([self.weights[n] for n in parameters], [current[n] for n in parameters], self.updates)
        for name in current.keys() - set(parameters):
            self.weights[name].copy_(current[name])
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give `model` the averaged weights within the context; on exit, restore its own weights bit for bit.

        Values are copied into the model's own tensors, so that a compiled model is not compiled again. No checkpoint
        may be written within the context: it would store the averaged weights in place of the raw ones.
        """
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        try:
            _copy(self.weights, model)
            yield
        finally:
            _copy(own, model)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of `updates`, and `weights` in the form of the model's state dict.

        Sharded tensors are gathered; other tensors are returned without a copy.
        """
        return {"updates": self.updates, "weights": distributed.full_tensors(self.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a result of `state_dict`; raises UserError when names or shapes differ from this model's."""
        saved: dict[str, Tensor] = state["weights"]
        if {n: v.shape for n, v in saved.items()} != {n: v.shape for n, v in self.weights.items()}:
            raise UserError("the checkpoint's averaged weights are of another model; resume with its own config.")
        for name, value in saved.items():
            distributed.copy_full(self.weights[name], value)
        self.updates = state["updates"]


@torch.no_grad()
def _copy(weights: dict[str, Tensor], model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        value.copy_(weights[name])
