"""Optimizers and learning-rate schedules by name, and the parameter groups of a model.

Sources: AdamW is Loshchilov and Hutter 2019 (arXiv:1711.05101), and Adam is Kingma and Ba 2015 (arXiv:1412.6980). The
schedule "cosine" is Loshchilov and Hutter 2017 (arXiv:1608.03983) without restarts, and "noam" is Vaswani et al. 2017
(arXiv:1706.03762).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.config.check import did_you_mean
from common.errors import UserError
from common.machine import distributed
from common.train.muon import MuonWithAdamW, block_matrices
from common.types import Count, Fraction, NonNegativeFloat, Positive, PositiveFloat

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The optimizer and the learning rate of each part of the model."""

    name: Literal["adamw", "adam", "sgd", "muon"]  # muon: Muon for the matrices of blocks, AdamW for the rest
    lr: PositiveFloat
    weight_decay: NonNegativeFloat  # decoupled in adamw and muon; in adam and sgd, an L2 penalty
    decay_norms: bool  # whether weight decay also applies to vectors (norms, biases) and to OptionalModel.undecayed
    betas: tuple[Fraction, Fraction]  # of adamw and adam, and of AdamW in muon
    eps: PositiveFloat  # of the same optimizers
    momentum: Fraction  # of sgd and muon
    # Part of parameter names -> factor on lr; the longest matching part applies. A part that begins the name of any
    # parameter matches only names that begin with it; any other part matches anywhere in a name.
    rates: dict[str, NonNegativeFloat]
    layer_decay: Fraction  # a layer's rate divided by that of the layer after it; 1 = equal rates
    reference_batch: Positive | None  # the batch size for which lr is given; None = lr is not scaled
    scaling: Literal["linear", "sqrt"]  # how lr is scaled from reference_batch to data.batch_size


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How the learning rate changes over a run, as a factor on each group's rate.

    Raises UserError for noam without a width or without warm-up.
    """

    name: Literal["constant", "step", "cosine", "linear", "inverse_sqrt", "noam"]
    warmup: Count | Fraction  # length of the linear warm-up: an integer is steps, a float is a fraction of the run
    start: Fraction  # the factor from which the warm-up rises; noam rises from 0
    drops: list[Fraction]  # for "step": the positions of the drops, as fractions of the run
    factor: Fraction  # for "step": the number by which each drop multiplies the rate
    final: Fraction  # for "cosine" and "linear": the factor at the end of the run
    width: Positive | None  # for "noam": the model's width; the rate is divided by its square root

    def __post_init__(self) -> None:
        if self.name == "noam" and self.width is None:
            raise UserError(
                "schedule.width=null: noam divides by the square root of the model's width; give that width."
            )
        if self.name == "noam" and not self.warmup:
            raise UserError(
                f"schedule.warmup={self.warmup}: noam needs at least 1 step of warm-up; give 4000 as published, or use "
                "schedule=inverse_sqrt."
            )


# Optimizers.


def build(model: nn.Module, options: OptimizerOptions) -> Optimizer:
    """Build the optimizer over all parameters of `model` that require a gradient.

    Each parameter group has a readable "name", the learning rate before the schedule as "base_lr", and "param_names".
    Raises UserError when a part in `rates` matches no parameter, when no parameter is trainable, or for a
    `layer_decay` other than 1 if the model has no method `layers`. For muon, it is also raised when the model has no
    blocks.
    """
    groups = _groups(model, options)
    # A fused update is 2.4 times as fast on a CPU core. On devices other than CPU and CUDA, None lets PyTorch choose.
    fused = True if all(p.device.type in ("cpu", "cuda") for g in groups for _, p in g["params"]) else None
    optimizer: Optimizer
    if options.name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum, fused=fused)
    elif options.name == "muon":
        optimizer = MuonWithAdamW(groups, options.momentum, options.betas, options.eps, fused)
    else:
        adam = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
        optimizer = adam(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)
    optimizer.register_step_pre_hook(_match_layouts)
    return optimizer


def refuse_sharding(options: OptimizerOptions) -> None:
    """Raise UserError for an optimizer that cannot train a model that FSDP shards over processes."""
    if options.name == "muon":
        raise UserError("optimizer.name=muon needs whole matrices; use trainer.strategy=ddp, or optimizer.name=adamw.")


def refuse_scaled_steps(options: OptimizerOptions) -> None:
    """Raise UserError unless a step is the rate times the gradient, as `OptionalTask.set_rate` assumes."""
    if options.name != "sgd" or options.momentum or options.weight_decay:
        raise UserError(
            f"optimizer.name={options.name}, momentum={options.momentum}, weight_decay={options.weight_decay}: the "
            "loss of this task descends in several small steps itself, which only sgd without momentum and decay "
            "applies unchanged; keep the model's own optimizer."
        )


def can_skip_update(optimizer: Optimizer) -> bool:
    """Whether `optimizer` skips an update if its attribute `found_inf` is 1.

    PyTorch's fused optimizers do. `MuonWithAdamW` does not, even if its AdamW is fused.
    """
    return all(group.get("fused") and "muon" not in group for group in optimizer.param_groups)


def scale_to_batch(options: OptimizerOptions, batch_size: int) -> OptimizerOptions:
    """Return `options` with `lr` scaled from `reference_batch` to `batch_size`, and `reference_batch` set to None.

    If `reference_batch` is None, `lr` stays as it is. Linear scaling is Goyal et al. 2017 (arXiv:1706.02677).
    Square-root scaling suits Adam better when the two batch sizes differ by a large factor.
    """
    factor = batch_size / (options.reference_batch or batch_size)
    lr = options.lr * (factor if options.scaling == "linear" else math.sqrt(factor))
    return replace(options, lr=lr, reference_batch=None)


def set_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its "base_lr"."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def state(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state by parameter name.

    This state can be restored into an optimizer with other parameter groups, on another device, fused or not.
    """
    named = _named_parameters(optimizer)
    return {name: distributed.full_tensors(dict(optimizer.state[p])) for name, p in named if p in optimizer.state}


def refuse_incomplete(
    optimizer: Optimizer, saved: dict[str, dict[str, Any]], path: Path, may_be_empty: bool = False
) -> None:
    """Raise UserError when `saved`, the optimizer state in the file `path`, lacks entries or has non-float tensors.

    Without this check, a run could resume with moments that silently start again from zero. `saved` may lack
    parameters, because a parameter that was never updated has no state. `may_be_empty` states whether `saved` may lack
    all parameters. That is the case if SGD without momentum wrote `saved`, because it keeps no state.
    """
    keys = {name: _state_keys(group) for group in optimizer.param_groups for name in group["param_names"]}
    missing = next((f"{k} of {name}" for name, v in saved.items() for k in keys.get(name, ()) if k not in v), None)
    if any(keys.values()) and not saved and not may_be_empty:
        missing = "everything"
    other = next(
        (f"{key} of {name} as {value.dtype}".replace("torch.", "")
         for name, values in saved.items()
         for key, value in values.items()
         if isinstance(value, Tensor) and not value.is_floating_point()),
        None,
    )  # fmt: skip
    if other:
        raise UserError(f"{path} holds {other}, expected floats, which no training writes; give another checkpoint.")
    if missing:
        raise UserError(
            f"{path} holds an optimizer state without {missing}, from which no run can resume; start a new run from "
            f"its weights with another run_dir and checkpoint={path}."
        )


def _state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """The entries that an update adds to the state of each parameter in a group."""
    if "momentum" in group:  # of SGD or Muon
        return ("momentum_buffer",) if group["momentum"] else ()
    return ("step", "exp_avg", "exp_avg_sq")


def restore(optimizer: Optimizer, saved: dict[str, dict[str, Any]]) -> None:
    """Load the result of `state` into `optimizer`, which keeps its own learning rates, weight decay and other options.

    Raises UserError when `saved` has a parameter that `optimizer` lacks, or moments with another shape than their
    parameter.
    """
    named = _named_parameters(optimizer)
    shapes = {name: p.shape for name, p in named}
    for name, values in saved.items():
        moments = {value.shape for value in values.values() if isinstance(value, Tensor) and value.ndim}
        if name not in shapes or moments - {shapes[name]}:
            raise UserError(
                f"the checkpoint's optimizer does not match this run at {name} ({[*map(tuple, moments)]} in the file, "
                f"{tuple(shapes[name]) if name in shapes else 'not trained'} in this run); resume with its own config."
            )
    by_number = {number: dict(saved[name]) for number, (name, _) in enumerate(named) if name in saved}
    optimizer.load_state_dict({"state": by_number, "param_groups": optimizer.state_dict()["param_groups"]})
    for p, values in optimizer.state.items():  # moments need the parameter's memory layout, see _match_layouts
        moments_of_p = {key: v for key, v in values.items() if isinstance(v, Tensor) and v.shape == p.shape}
        values.update({key: torch.empty_like(p, dtype=v.dtype) for key, v in moments_of_p.items()})
        for key, value in moments_of_p.items():
            distributed.copy_full(values[key], value)


def _groups(model: nn.Module, options: OptimizerOptions) -> Groups:
    """Return groups of parameters with equal learning rate and weight decay, in the order of the model's parameters."""
    parameters = dict(model.named_parameters())
    matching = {part: _matching_names(part, parameters) for part in options.rates}
    if unmatched := next((part for part, names in matching.items() if not names), None):
        parts = {".".join(name.split(".")[:length]) for name in parameters for length in (1, 2)}
        parts |= {word for name in parameters for word in name.split(".")}
        raise UserError(
            f"optimizer.rates.{unmatched} matches no parameter of the model{did_you_mean(unmatched, parts)}"
        )
    undecayed: Sequence[str] = getattr(model, "undecayed", ())
    depths = _depths(model, options)
    matrices = block_matrices(model) if options.name == "muon" else set()
    groups: dict[tuple[str, int, bool, bool], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        part = max((part for part, names in matching.items() if name in names), key=len, default="")
        depth = next((depth for prefix, depth in depths.items() if _has_prefix(name, prefix)), 0)
        decays = options.decay_norms or (
            parameter.ndim >= 2 and not any(_has_prefix(name, prefix) for prefix in undecayed)
        )
        layer = f", {depth} below the output" if depths else ""
        muon = name in matrices and decays
        group = groups.setdefault(
            (part, depth, decays, muon),
            {
                "params": [],
                "name": f"{part or 'rest'}{layer}, {'decay' if decays else 'no decay'}{', muon' if muon else ''}",
                "base_lr": options.lr * options.rates.get(part, 1.0) * options.layer_decay**depth,
                "weight_decay": options.weight_decay if decays else 0.0,
            },
        )
        group["lr"] = group["base_lr"]
        if options.name == "muon":
            group["muon"] = muon
        group["params"].append((name, parameter))
    if not groups:
        raise UserError("the model has no parameter to train: all of them are frozen; unfreeze some.")
    return list(groups.values())


def _depths(model: nn.Module, options: OptimizerOptions) -> dict[str, int]:
    """Map each prefix of a layer's parameter names to the number of layers after that layer.

    The result is empty if `layer_decay` is 1, because all layers then have the same rate.
    `OptionalModel.layers` lists the prefixes of each layer, from the input to the output of the model.
    """
    if options.layer_decay == 1:
        return {}
    if not hasattr(model, "layers"):
        raise UserError(
            f"optimizer.layer_decay={options.layer_decay}: {type(model).__name__} has no method layers() that lists "
            "its layers; set it to 1, or use optimizer.rates."
        )
    layers: Sequence[tuple[str, ...]] = model.layers()  # type: ignore[operator]
    return {part: len(layers) - 1 - index for index, parts in enumerate(layers) for part in parts}


def _matching_names(part: str, names: Iterable[str]) -> set[str]:
    """Return the names that begin with the words of `part` or, if there are none, those that contain them.

    "backbone" begins "backbone.conv1.weight"; "sampling_offsets" is contained in "blocks.0.sampling_offsets.weight".
    """
    names = list(names)
    begin = {name for name in names if _has_prefix(name, part)}
    return begin or {name for name in names if f".{part}." in f".{name}."}


def _has_prefix(name: str, prefix: str) -> bool:
    """Whether a dotted `name` begins with the words of `prefix`: "backbone" is a prefix of "backbone.conv1.weight".

    "backbone" is not a prefix of "backbone2.weight".
    """
    return name == prefix or name.startswith(f"{prefix}.")


def _named_parameters(optimizer: Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [pair for g in optimizer.param_groups for pair in zip(g["param_names"], g["params"], strict=True)]


def _match_layouts(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Give every gradient its parameter's memory layout.

    The fused kernels iterate over memory and do not compare strides. They would silently apply the elements of a
    contiguous gradient to the wrong elements of a channels_last weight (observed with torch 2.15 on the CPU).
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)


# Schedules.


def rate_factor(options: ScheduleOptions, step: int, steps: int) -> float:
    """Return the factor by which "base_lr" is multiplied in update `step` (counted from 0) of a run of `steps` updates.

    The warm-up is linear. In its update n (counted from 1), the factor is start + (1 - start) * n / warmup, which is 1
    in the last update of the warm-up. With noam, the factor is instead proportional to n during the warm-up, and
    1 / sqrt(width * warmup) in its last update.
    """
    warmup, number = warm_up(options, steps), step + 1
    if options.name == "noam":  # equation 3 of Vaswani et al. 2017, with updates counted from 1
        assert options.width is not None, "ScheduleOptions refuses noam without a width"
        warmup = max(1, warmup)  # a small fraction of a short run may round to 0
        return math.sqrt(1 / options.width) * min(math.sqrt(1 / number), number * math.pow(warmup, -1.5))
    if step < warmup:
        return options.start + (1 - options.start) * number / warmup
    if options.name == "step":  # rounded, because 2/3 of a run is rarely a whole number of steps
        return options.factor ** sum(step >= round(drop * steps) for drop in options.drops)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if options.name == "cosine":
        return options.final + (1 - options.final) * (1 + math.cos(math.pi * progress)) / 2
    if options.name == "linear":
        return options.final + (1 - options.final) * (1 - progress)
    if options.name == "inverse_sqrt":  # 1 at the end of the warm-up, so that the rate is continuous
        return math.sqrt(max(1, warmup) / number)
    return 1.0


def warm_up(options: ScheduleOptions, steps: int) -> int:
    """Return the number of warm-up steps in a run of `steps` steps."""
    return options.warmup if isinstance(options.warmup, int) else round(options.warmup * steps)


def peak_rate_factor(options: ScheduleOptions, steps: int) -> float:
    """Return the largest `rate_factor` of a run of `steps` steps.

    It is that of the last update of the warm-up or, if there is no warm-up, of the first update. If the run ends during
    the warm-up, it is that of the run's last update.
    """
    return rate_factor(options, min(max(1, warm_up(options, steps)), steps) - 1, steps)
