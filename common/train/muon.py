"""Muon for the matrices of Transformer blocks, with AdamW for all other parameters, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of each matrix and
updates the matrix with the result. The update is scaled by 0.2 sqrt(max(rows, columns)), so that learning rates and
weight decays for AdamW also suit Muon (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982, section
2.2).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from common.errors import UserError
from common.nn.blocks import Block


def block_matrices(model: nn.Module) -> set[str]:
    """Return the names of all matrices in the model's Transformer blocks.

    Muon updates them, except those that are frozen or that weight decay skips (`OptionalModel.undecayed`).
    Embeddings, output heads and norms are left to AdamW, as in section 2.2 of Liu et al. 2025, and so are biases and
    convolutions. Raises UserError if the model has no block.
    """
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]
    if not blocks:
        raise UserError(
            "optimizer.name=muon updates the matrices of attention and feed-forward blocks, which "
            f"{type(model).__name__} does not have; use optimizer.name=adamw."
        )
    return {
        f"{block}.{name}" if block else name
        for block, module in blocks
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2
    }


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon over the groups with `muon` true and torch.optim.AdamW over the other groups.

    Both use the groups and the state of this optimizer, so its learning rates, its state dict and its hooks work as in
    any optimizer. A group that Muon updates has the key "momentum", and a group that AdamW updates has the key "betas".

    Differs: the query, key and value projections of an attention module are orthogonalised as one matrix
    (3 * inner_width, width), as the module stores them. Jordan et al. recommend orthogonalising the three separately.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool | None,
    ):
        """Build both optimizers.

        Args:
            groups: parameter groups as in PyTorch's optimizers, with the keys "lr", "weight_decay" and "muon". If
                "muon" is true, Muon updates the group's parameters, which must be matrices; otherwise AdamW does.
            momentum: Muon's momentum, applied as Nesterov momentum.
            betas: AdamW's decay rates of the averages of the gradient and of its square.
            eps: AdamW's epsilon.
            fused: whether AdamW updates all parameters in one kernel; None lets PyTorch decide.
        """
        matrices, others = ([group for group in groups if group["muon"] == muon] for muon in (True, False))
        self._optimizers: dict[bool, Optimizer] = {}  # True: Muon, False: AdamW; only those that have groups
        # Both constructors add their options to the dicts in `groups`.
        if matrices:
            self._optimizers[True] = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        if others:
            self._optimizers[False] = torch.optim.AdamW(others, betas=betas, eps=eps, fused=fused)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        A `closure` is called first, and its result is returned; without one, the result is None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for is_muon, optimizer in self._optimizers.items():
            # Assigned in each step, since load_state_dict replaces the groups and the state.
            optimizer.param_groups = [group for group in self.param_groups if group["muon"] == is_muon]
            optimizer.state = self.state
            optimizer.step()
        return loss
