"""Gradients joined by hand against PyTorch's DDP wrapper: `torchrun --nproc-per-node 2 scripts/benchmarks/joining.py`.

A round is a forward and a backward pass of each process and the sum of their gradients, once by hand (one flat
all-reduce after the last backward pass), once by the wrapper (pieces of 25 MiB, while the backward pass still runs),
and once not at all, which shows what joining costs. Reported is the ratio of the median times, with the quartiles of
the rounds' own ratios: below one, the first is faster.
"""

import argparse
import copy
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script sees its own folder, not the project's

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.config.check import build
from common.config.compose import configure
from common.files.log import table
from common.machine import device as devices
from common.machine import distributed
from scripts.benchmarks.timing import Row, measure, near

TIMEOUT = 600.0  # seconds; a process that builds a large model on a busy machine takes some of them
KEYS = {
    "vit_s16": ["model.blocks.dropout=0", "model.blocks.attention_dropout=0"],
    "detr_r50": ["model.backbone.weights=none", "model.dropout=0"],
}
TINY = {
    "vit_s16": ["model.width=32", "model.heads=2", "model.layers=2", "model.feedforward=64"],
    "detr_r50": ["model.width=32", "model.feedforward=64", "model.encoder_layers=1", "model.decoder_layers=1"],
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "vit_s16": {"classes": 1000, "channels": 3, "image_size": (224, 224)},
    "detr_r50": {"classes": 91},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; rank 0 prints it."""
    options = _options(arguments)
    device = devices.choose(options.device, distributed.local_rank())
    distributed.start(device, TIMEOUT)
    if distributed.world_size() == 1:
        print("One process has nothing to join; start it with torchrun --nproc-per-node 2.", file=sys.stderr)
        return 2
    lines: list[Sequence[Any]] = [("model", "parameters", "one", "ms", "other", "ms", "ratio", "quartiles")]
    agreements = []
    for name in options.models.split(","):
        model = _model(name, tiny=options.tiny).to(device)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = _row(name, model, _inputs(name, options.batch, options.side, device))
        measured = measure(row, rounds=options.rounds, warm_up=options.warm_up, device=device)
        agreements.append(f"{name}: {measured['agreement']}")
        for ratio in measured["ratios"]:
            low, high = ratio["quartiles"]
            times = [ratio["one"], f"{ratio['one_ms']:.1f}", ratio["other"], f"{ratio['other_ms']:.1f}"]
            lines.append((name, f"{count:,}", *times, f"{ratio['ratio']:.3f}", f"{low:.3f}-{high:.3f}"))
    if distributed.is_main():
        print(f"{devices.describe(device)}, {distributed.world_size()} processes, torch {torch.__version__}")
        print("\n".join(agreements))
        print(table(f"medians of {options.rounds} rounds, in turn", lines))
        print(f"load at the end: {os.getloadavg()[0]:.2f}")
    distributed.barrier()
    distributed.stop()
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--models", default=",".join(ARGUMENTS), help="which, with commas between; both by default")
    parser.add_argument("--batch", type=int, default=2, help="images of each process")
    parser.add_argument("--side", type=int, default=224, help="of the detector's images, in pixels")
    parser.add_argument("--rounds", type=int, default=20, help="how often each contender is timed")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before these")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that everything runs")
    options = parser.parse_args(arguments)
    if unknown := {*options.models.split(",")} - {*ARGUMENTS}:
        parser.error(f"--models has {', '.join(ARGUMENTS)}, not {', '.join(sorted(unknown))}")
    return options


def _model(name: str, *, tiny: bool) -> nn.Module:
    """The model by its preset, the same in all processes, without dropout and without weights from elsewhere."""
    recipe = configure("train", [f"model={name}", *KEYS[name], *(TINY[name] if tiny else [])])
    torch.manual_seed(0)
    found: nn.Module = build(recipe["model"], **ARGUMENTS[name])
    return found


def _inputs(name: str, batch: int, side: int, device: torch.device) -> tuple[Any, ...]:
    """Other images in each process."""
    side = ARGUMENTS[name].get("image_size", (side,))[0]
    draw = torch.Generator().manual_seed(distributed.rank())
    images = torch.randn(batch, 3, side, side, generator=draw).to(device)
    return (images, None) if name == "detr_r50" else (images,)


def _row(name: str, model: nn.Module, inputs: tuple[Any, ...]) -> Row:
    """The contenders on copies of one model."""
    by_hand, bare = model, copy.deepcopy(model)
    module = copy.deepcopy(model)
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    parameters = [p for p in by_hand.parameters() if p.requires_grad]

    def joined() -> None:
        _learn(by_hand, by_hand, inputs)
        distributed.join_gradients(parameters)

    contenders: dict[str, Callable[[], object]] = {
        "by hand": joined,
        "wrapper": lambda: _learn(wrapped, module, inputs),
        "not joined": lambda: _learn(bare, bare, inputs),
    }

    def check() -> str:
        contenders["by hand"]()
        contenders["wrapper"]()
        return near("gradients", _flat(by_hand), _flat(module) * distributed.world_size(), 1e-5)  # which takes means

    pairs = [("by hand", "wrapper"), ("by hand", "not joined"), ("wrapper", "not joined")]
    return Row(name=name, contenders=contenders, pairs=pairs, check=check)


def _learn(model: nn.Module, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    outputs = model(*inputs)
    tensors: list[Tensor] = [*outputs.values()] if isinstance(outputs, dict) else [outputs]
    # Ones, because a new classifier says nothing but zeros, which would be learnt without any gradient.
    total = torch.stack([(tensor - 1).square().mean() for tensor in tensors]).sum()
    torch.autograd.backward(total)


def _flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


if __name__ == "__main__":
    sys.exit(main())
