"""Take one optimizer step.

Its result does not depend, up to rounding, on how the batch is split into micro-batches and over ranks. The exceptions
are dropout of any kind, BatchNorm, and the modules and loss terms named in `per_micro_batch` (common/task.py).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine import distributed, memory
from common.machine.device import DeviceCopier, autocast
from common.task import Batch, Task
from common.train import optim

MAX_CONSECUTIVE_OVERFLOWS = 10  # fp16 overflows in a row at which the run stops; each one halves the loss scale


@dataclass(frozen=True)
class _FiniteCheck:
    """Whether a step's loss and gradient norm are finite, and the values for the error message if they are not."""

    number: int  # number of the step
    finite: Tensor  # (2,) boolean, on the host: whether the loss and the gradient norm are finite
    copied: torch.cuda.Event | None  # reached when the copy to `finite` is complete; None if it is complete already
    parts: dict[str, Tensor]
    norm: Tensor
    ids: list[Any]


@dataclass
class Stepper:
    """The model, its optimizer and the fp16 loss scale, updated one step at a time."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    clip_norm: float | None
    overflows: int = 0  # fp16 steps skipped in a row
    deferred: bool = field(init=False)  # whether step n is checked during step n + 1, so that the GPU need not wait
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        sharded = distributed.is_sharded(self.parameters)
        can_skip = optim.can_skip_update(self.optimizer) and not sharded
        self.deferred = self.device.type == "cuda" and self.precision != "fp16" and can_skip
        self._copies = DeviceCopier(self.device)
        self._last: _FiniteCheck | None = None
        self._loss = distributed.data_parallel(_Loss(self.model, lambda *arguments: self.task.loss(*arguments)))

    def __call__(self, micro_batches: list[Batch], number: int) -> dict[str, Tensor]:
        """Take optimizer step `number`; returns this rank's share of the loss, of its parts and of the gradient norm.

        The values of the step are the sums of these shares over ranks. The normalisers, which are the divisors of the
        loss terms (`Task.normalisers`), are summed over all micro-batches and ranks before the first forward pass. The
        gradients of micro-batches and ranks therefore only have to be summed.

        If the loss or the gradient norm is not finite, the weights are not updated and all ranks raise UserError. An
        fp16 overflow of the gradient instead skips the update and halves the loss scale; the error is raised when
        `MAX_CONSECUTIVE_OVERFLOWS` steps in a row overflow. If `deferred`, the GPU itself skips the update, and the
        next step or `check_last_step` raises the error.
        """
        real = [batch for batch in micro_batches if "dummy" not in batch]
        normalisers = step_normalisers(self.task, real)
        self.optimizer.zero_grad(set_to_none=True)
        parts = {"loss": torch.zeros((), device=self.device)}
        self.scaler.scale(parts["loss"])  # initialises the scale, also on a rank without samples
        on_device = self._copies(micro_batches)
        for batch in micro_batches:
            synchronise = nullcontext() if batch is micro_batches[-1] else distributed.no_gradient_sync(self._loss)
            with memory.report_out_of_memory(f"Step {number}", batch, self.device, memory.TRAINING_ADVICE), synchronise:
                with autocast(self.device, self.precision):
                    loss, loss_parts = self._loss(next(on_device), normalisers)
                if "dummy" in batch:  # this rank only takes part in collectives
                    loss, loss_parts = loss * 0, {}
                torch.autograd.backward(self.scaler.scale(loss))
            _unshare_gradients(self.parameters)
            for name, value in {"loss": loss.detach(), **loss_parts}.items():
                parts[name] = parts[name] + value if name in parts else value
        batch = micro_batches[-1] if micro_batches else {"ids": []}
        with memory.report_out_of_memory(f"The update of step {number}", batch, self.device, memory.UPDATE_ADVICE):
            norm = self._update(parts, real, number)
        return {**parts, "gradient_norm": norm / distributed.world_size()}  # the log sums over ranks

    def check_last_step(self) -> None:
        """Wait for the device; raise UserError if it skipped the last step.

        It skips a step whose loss or gradient norm is not finite. If `deferred` is False, there is nothing to check.
        """
        check, self._last = self._last, None
        if check is not None and not self._is_finite(check):
            self._refuse(check)

    def _update(self, parts: dict[str, Tensor], real: list[Batch], number: int) -> Tensor:
        """Clip the gradients, and apply them if loss and gradient norm are finite; returns the norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm: Tensor = distributed.full_tensors(
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or float("inf"))
        )
        total = distributed.sum_over_ranks(parts["loss"].to(torch.float32, copy=True))
        finite = torch.stack((total, norm.float())).isfinite()
        ids = [i for batch in real for i in batch["ids"]]
        self.check_last_step()
        check = _FiniteCheck(number, *self._copies.to_host(finite), dict(parts), norm, ids)
        if self.deferred:
            self._apply_if(finite.all())
            self._last = check
        elif self._is_finite(check):
            self.scaler.step(self.optimizer)
            self.overflows = 0
        else:
            self._refuse(check)
        self.scaler.update()
        return norm

    def _apply_if(self, finite: Tensor) -> None:
        """Update the weights if the boolean scalar `finite` is true, without copying it to the host.

        PyTorch's fused optimizers read `found_inf` on the device, and skip the update if it is 1. See
        `optim.can_skip_update`.
        """
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]

    def _is_finite(self, check: _FiniteCheck) -> bool:
        if check.copied is not None:
            check.copied.synchronize()
        return bool(check.finite.all())

    def _refuse(self, check: _FiniteCheck) -> None:
        """Count an fp16 overflow of the gradient, or raise UserError for a loss or gradient norm that is not finite.

        The error is raised if the precision is not fp16, if the loss itself is not finite, or at the last of
        `MAX_CONSECUTIVE_OVERFLOWS` overflows in a row.
        """
        self.overflows += 1
        if self.scaler.is_enabled() and bool(check.finite[0]) and self.overflows < MAX_CONSECUTIVE_OVERFLOWS:
            return
        shares = distributed.gather(({name: float(v) for name, v in check.parts.items()}, check.ids))
        names = dict.fromkeys(name for parts, _ in shares for name in parts)
        sums = {name: sum(parts.get(name, 0.0) for parts, _ in shares) for name in names}
        ids = [i for _, rank_ids in shares for i in rank_ids]
        raise UserError(
            f"Step {check.number} was not taken, because its loss or gradient is not finite: "
            + ", ".join(f"{name} {value:g}" for name, value in sums.items())
            + f", gradient norm {float(check.norm):g}, on samples {ids}; the weights are those before it: check these "
            "samples, lower optimizer.lr, or use trainer.precision=fp32."
        )


class _Loss(nn.Module):
    """A module that computes the task's loss in `forward`.

    DDP synchronises gradients only if the forward pass goes through the `forward` of the module that it wraps. The
    task's loss may call other methods of the model. Therefore DDP wraps this module instead of the model.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch, normalisers: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Task.loss`."""
        return self.loss(self.model, batch, normalisers)


def _unshare_gradients(parameters: list[nn.Parameter]) -> None:
    """Clone each gradient that shares its memory with the gradient of another parameter.

    If the model uses two parameters only in their sum, such as a learned token and its position embedding, their
    gradients are equal, and a compiled backward pass returns one buffer for both (torch 2.15). Without the clone, each
    operation on the gradients, such as clipping or adding those of the next micro-batch, would change this buffer
    twice.
    """
    addresses: set[int] = set()
    for parameter in parameters:
        if parameter.grad is not None:
            if distributed.local_part(parameter.grad).data_ptr() in addresses:
                parameter.grad = parameter.grad.clone()
            addresses.add(distributed.local_part(parameter.grad).data_ptr())


def step_normalisers(task: Task, micro_batches: list[Batch]) -> dict[str, float]:
    """Sum the normalisers in float64 over a step's micro-batches and all ranks; a sum of zero is replaced by one.

    The normalisers are the divisors of the loss terms by name (`Task.normalisers`).
    """
    normalisers = getattr(task, "sizes", None) or task.normalisers
    sums: dict[str, float] = {}
    for of_rank in distributed.gather([normalisers(batch) for batch in micro_batches]):
        for of_batch in of_rank:
            for name, value in of_batch.items():
                sums[name] = sums.get(name, 0.0) + value
    return {name: value if value != 0 else 1.0 for name, value in sums.items()}
