"""One optimizer step: the same step however its batch is cut into micro-batches and dealt to ranks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common import distributed, memory
from common.device import autocast, to_device
from common.errors import UserError
from common.task import Batch, Task

MOST_OVERFLOWS = 10  # skipped fp16 steps in a row before the run stops: the scale has then fallen by 1,000


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
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def __call__(self, micro_batches: list[Batch], number: int) -> dict[str, Tensor]:
        """Update the weights by step `number`; returns this rank's share of the loss's parts, and the gradient norm.

        The divisors are added up over micro-batches and ranks before the first backward pass, so gradients are sums
        and nothing is averaged. A loss or gradient that is not finite never reaches the weights: it raises UserError
        on all ranks alike, but for an fp16 overflow, which halves the scale and skips the step.
        """
        real = [batch for batch in micro_batches if "dummy" not in batch]
        sizes = step_sizes(self.task, real)
        self.optimizer.zero_grad(set_to_none=True)
        parts = {"loss": torch.zeros((), device=self.device)}
        self.scaler.scale(parts["loss"])  # sets it up, on a rank without samples too
        for batch in micro_batches:
            with memory.named(f"Step {number}", batch, self.device, memory.TRAINING):
                with autocast(self.device, self.precision):
                    loss, named = self.task.loss(self.model, to_device(batch, self.device), sizes)
                if "dummy" in batch:  # which keeps this rank in step with the others, and counts for nothing
                    loss, named = loss * 0, {}
                torch.autograd.backward(self.scaler.scale(loss))
            _own_memory(self.parameters)
            for name, value in {"loss": loss.detach(), **named}.items():
                parts[name] = parts[name] + value if name in parts else value
        batch = micro_batches[-1] if micro_batches else {"ids": []}
        with memory.named(f"The update of step {number}", batch, self.device, memory.UPDATE):
            norm = self._update(parts, real, number)
        return {**parts, "gradient_norm": norm / distributed.world_size()}  # shares add up when they are logged

    def _update(self, parts: dict[str, Tensor], real: list[Batch], number: int) -> Tensor:
        """Join, clip and apply the gradients, or refuse to; the gradient's norm."""
        distributed.join_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        norm: Tensor = distributed.whole(nn.utils.clip_grad_norm_(self.parameters, self.clip_norm or float("inf")))
        total = distributed.sum_(parts["loss"].to(torch.float32, copy=True))
        loss_is_finite, norm_is_finite = torch.stack((total, norm.float())).isfinite().tolist()
        if loss_is_finite and norm_is_finite:
            self.scaler.step(self.optimizer)
            self.overflows = 0
        else:
            self._refuse(loss_is_finite, real, number, parts, norm)
        self.scaler.update()
        return norm

    def _refuse(
        self, loss_is_finite: bool, micro_batches: list[Batch], number: int, parts: dict[str, Tensor], norm: Tensor
    ) -> None:
        self.overflows += 1
        if self.scaler.is_enabled() and loss_is_finite and self.overflows < MOST_OVERFLOWS:
            return
        everything = distributed.gather(
            ({name: float(value) for name, value in parts.items()}, [i for b in micro_batches for i in b["ids"]])
        )
        names = dict.fromkeys(name for shares, _ in everything for name in shares)
        sums = {name: sum(shares.get(name, 0.0) for shares, _ in everything) for name in names}
        ids = [i for _, of_rank in everything for i in of_rank]
        raise UserError(
            f"Step {number} was not taken, because its loss or gradient is not finite: "
            + ", ".join(f"{name} {value:g}" for name, value in sums.items())
            + f", gradient norm {float(norm):g}, on samples {ids}; the weights are as before it: look at these "
            "samples, lower optimizer.lr, or use trainer.precision=fp32."
        )


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


def step_sizes(task: Task, micro_batches: list[Batch]) -> dict[str, float]:
    """The divisors of a whole step, summed in float64 over micro-batches and ranks; only an exact zero becomes one."""
    sums: dict[str, float] = {}
    for sizes in distributed.gather([task.sizes(batch) for batch in micro_batches]):
        for of_batch in sizes:
            for name, value in of_batch.items():
                sums[name] = sums.get(name, 0.0) + value
    return {name: value if value != 0 else 1.0 for name, value in sums.items()}
