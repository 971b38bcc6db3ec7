"""One optimizer step: the same step however its batch is cut into micro-batches and dealt to ranks."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine import distributed, memory
from common.machine.device import Copies, autocast
from common.task import Batch, Task

MAX_CONSECUTIVE_OVERFLOWS = 10  # skipped fp16 steps in a row before the run stops: the scale has then fallen by 1,000


@dataclass(frozen=True)
class _Verdict:
    """Whether a step's loss and gradient norm are finite, on its way from the device; and what to say if not."""

    number: int
    finite: Tensor  # (2,) boolean, on the host
    arrived: torch.cuda.Event | None  # when it holds what it says; None: now
    parts: dict[str, Tensor]
    norm: Tensor
    ids: list[Any]


@dataclass
class Stepper:
    """What a step needs and changes: weights, optimizer, and the fp16 loss scale."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    clip_norm: float | None
    overflows: int = 0  # fp16 steps skipped in a row
    late: bool = field(init=False)  # whether a step is judged one step later, so that the host need not wait for a GPU
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        sharded = distributed.is_sharded(self.parameters)
        self.late = self.device.type == "cuda" and self.precision != "fp16" and not sharded
        self._copies = Copies(self.device)
        self._last: _Verdict | None = None
        self._loss = distributed.joined(_Loss(self.model, lambda *of: self.task.loss(*of)))

    def __call__(self, micro_batches: list[Batch], number: int) -> dict[str, Tensor]:
        """Update the weights by step `number`; returns this rank's share of the loss's parts, and the gradient norm.

        The normalisers are added up over micro-batches and ranks before the first backward pass, so gradients are sums
        and nothing is averaged. A loss or gradient that is not finite never reaches the weights: it raises UserError
        on all ranks alike, but for an fp16 overflow, which halves the scale and skips the step. On a GPU the device
        itself leaves such an update out, and the error comes with the next step, or `check_last_step`.
        """
        real = [batch for batch in micro_batches if "dummy" not in batch]
        normalisers = step_normalisers(self.task, real)
        self.optimizer.zero_grad(set_to_none=True)
        parts = {"loss": torch.zeros((), device=self.device)}
        self.scaler.scale(parts["loss"])  # sets it up, on a rank without samples too
        moved = self._copies(micro_batches)
        for batch in micro_batches:
            joining = nullcontext() if batch is micro_batches[-1] else distributed.accumulating(self._loss)
            with memory.named(f"Step {number}", batch, self.device, memory.TRAINING), joining:
                with autocast(self.device, self.precision):
                    loss, named = self._loss(next(moved), normalisers)
                if "dummy" in batch:  # which only takes part in what ranks do together
                    loss, named = loss * 0, {}
                torch.autograd.backward(self.scaler.scale(loss))
            _own_memory(self.parameters)
            for name, value in {"loss": loss.detach(), **named}.items():
                parts[name] = parts[name] + value if name in parts else value
        batch = micro_batches[-1] if micro_batches else {"ids": []}
        with memory.named(f"The update of step {number}", batch, self.device, memory.UPDATE):
            norm = self._update(parts, real, number)
        return {**parts, "gradient_norm": norm / distributed.world_size()}  # shares add up when they are logged

    def check_last_step(self) -> None:
        """Raise UserError if the last step was not taken; waits for the device."""
        verdict, self._last = self._last, None
        if verdict is not None and not self._is_fine(verdict):
            self._refuse(verdict)

    def _update(self, parts: dict[str, Tensor], real: list[Batch], number: int) -> Tensor:
        """Clip and apply the gradients, or refuse to; the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        norm: Tensor = distributed.whole(nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or float("inf")))
        total = distributed.sum_(parts["loss"].to(torch.float32, copy=True))
        finite = torch.stack((total, norm.float())).isfinite()
        ids = [i for batch in real for i in batch["ids"]]
        self.check_last_step()
        verdict = _Verdict(number, *self._copies.to_host(finite), dict(parts), norm, ids)
        if self.late:
            self._apply_if(finite.all())
            self._last = verdict
        elif self._is_fine(verdict):
            self.scaler.step(self.optimizer)
            self.overflows = 0
        else:
            self._refuse(verdict)
        self.scaler.update()
        return norm

    def _apply_if(self, fine: Tensor) -> None:
        """Update the weights if `fine` () says so, which the host never learns: torch's fused optimizers can."""
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (~fine).float()  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]

    def _is_fine(self, verdict: _Verdict) -> bool:
        if verdict.arrived is not None:
            verdict.arrived.synchronize()
        return bool(verdict.finite.all())

    def _refuse(self, verdict: _Verdict) -> None:
        self.overflows += 1
        if self.scaler.is_enabled() and bool(verdict.finite[0]) and self.overflows < MAX_CONSECUTIVE_OVERFLOWS:
            return
        shares = distributed.gather(({name: float(v) for name, v in verdict.parts.items()}, verdict.ids))
        names = dict.fromkeys(name for parts, _ in shares for name in parts)
        sums = {name: sum(parts.get(name, 0.0) for parts, _ in shares) for name in names}
        ids = [i for _, of_rank in shares for i in of_rank]
        raise UserError(
            f"Step {verdict.number} was not taken, because its loss or gradient is not finite: "
            + ", ".join(f"{name} {value:g}" for name, value in sums.items())
            + f", gradient norm {float(verdict.norm):g}, on samples {ids}; the weights are as before it: look at these "
            "samples, lower optimizer.lr, or use trainer.precision=fp32."
        )


class _Loss(nn.Module):
    """A task's loss as a forward pass, so that DDP sees all of it, whichever methods of the model it calls."""

    def __init__(self, model: nn.Module, loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task.loss`."""
        return self.loss(self.model, batch, normalisers)


def _own_memory(parameters: list[nn.Parameter]) -> None:
    """Give every gradient memory of its own.

    A compiled backward pass hands out one buffer for the gradients of two parameters that are only added, such as a
    token and its position (torch 2.15); another micro-batch, or clipping, would then change it twice.
    """
    taken: set[int] = set()
    for parameter in parameters:
        if parameter.grad is not None:
            if distributed.local(parameter.grad).data_ptr() in taken:
                parameter.grad = parameter.grad.clone()
            taken.add(distributed.local(parameter.grad).data_ptr())


def step_normalisers(task: Task, micro_batches: list[Batch]) -> dict[str, float]:
    """The divisors of a whole step, summed in float64 over micro-batches and ranks; only an exact zero becomes one."""
    of = getattr(task, "sizes", None) or task.normalisers
    sums: dict[str, float] = {}
    for of_rank in distributed.gather([of(batch) for batch in micro_batches]):
        for of_batch in of_rank:
            for name, value in of_batch.items():
                sums[name] = sums.get(name, 0.0) + value
    return {name: value if value != 0 else 1.0 for name, value in sums.items()}
