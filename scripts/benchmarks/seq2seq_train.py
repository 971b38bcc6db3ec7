"""Benchmark forward passes and training steps of the base-size translator against torch.nn.Transformer.

In evaluation mode, PyTorch's encoder layers take their fast path. In bf16, this path requires weights converted to
bf16. PyTorch's model is trained in a plain loop with fused Adam. The sentences have no padding, so PyTorch's model gets
no padding masks, while our model always computes them.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.machine.device import autocast, to_device
from scripts.benchmarks import flops
from scripts.benchmarks import seq2seq_peers as peers
from scripts.benchmarks.learning import TrainingContender, compare_first_steps, stepper
from scripts.benchmarks.timing import Row, Setting, compare_numbers, compare_tensors
from seq2seq.models.transformer import Transformer
from seq2seq.tokenizers.bpe import PAD, UNK

PEER = "torch.nn.Transformer"
PRECISIONS = ("fp32", "bf16")
COMPARED_PRECISIONS = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))


def forward(setting: Setting) -> Row:
    """Build a benchmark that times a forward pass on sentence pairs (teacher forcing), in evaluation mode.

    The batch has `setting.batch` pairs of 25 tokens per side; the default is 512 pairs on CUDA and 32 on other devices.
    """
    recipe, batch, model = _setup(setting, setting.batch_size(32, 512))
    model.to(setting.device).eval()
    theirs = peers.torch_peer(model, recipe).to(setting.device).eval()
    theirs_bf16 = copy.deepcopy(theirs).bfloat16()  # faster than autocast

    def forward_pass(model: Callable[..., Tensor], *inputs: Tensor, precision: str = "fp32") -> Callable[[], Tensor]:
        def work() -> Tensor:
            with torch.inference_mode(), autocast(setting.device, precision):
                return model(*inputs)

        return work

    source, lengths, target = batch["source"], batch["source_lengths"], batch["target_in"]
    contenders: dict[str, Callable[[], Tensor]] = {}
    for suffix, wrap in (("", lambda model: model), (" compiled", torch.compile))[: 1 + setting.compile]:
        contenders[f"{PEER} fp32{suffix}"] = forward_pass(wrap(theirs), source, target)
        contenders[f"{PEER} bf16{suffix}"] = forward_pass(wrap(theirs_bf16), source, target)
        for precision in PRECISIONS:
            contenders[f"ours {precision}{suffix}"] = forward_pass(
                wrap(copy.deepcopy(model)), source, lengths, target, precision=precision
            )

    def check() -> str:
        expected = contenders[f"{PEER} fp32"]()
        tolerance = 1e-3 if setting.device.type == "cuda" else 1e-4
        return "; ".join(
            compare_tensors(
                f"{name} logits", contenders[name](), expected, 0.3 if "bf16" in name else tolerance, along=-1
            )
            for name in contenders
            if name != f"{PEER} fp32"
        )

    count, length = source.shape
    return Row(
        name=f"forward {count}x({length}+{length})",
        contenders=contenders,
        pairs=_pairs(setting.compile),
        check=check,
        amounts=dict.fromkeys(contenders, (count * length, "target tokens")),
        flops=flops.per_contender(contenders, count * operations(model, length, training=False)),
    )


def train(setting: Setting) -> Row:
    """Build a benchmark that times a training step on 32 sentence pairs of 25 tokens per side.

    The loss is cross-entropy with label smoothing, and the optimizer is Adam.
    """
    recipe, batch, model = _setup(setting, 32)
    contenders: dict[str, TrainingContender] = {}
    for compiled in (False, True)[: 1 + setting.compile]:
        for precision in PRECISIONS:
            name = f"{precision} compiled" if compiled else precision
            contenders[f"{PEER} {name}"] = _theirs(recipe, batch, model, precision, compiled=compiled)
            contenders[f"ours {name}"] = _ours(recipe, batch, copy.deepcopy(model), precision, compiled=compiled)
    # If two tensors were swapped, the relative difference of the updates would be at least 0.3. The updates of vectors
    # are not compared: the gradients of key biases are rounding errors, which Adam scales up to updates of the usual
    # size.
    check = partial(
        compare_first_steps,
        gradient_tolerance=1e-3,
        update_tolerance=0.03,
        compares_update=lambda tensor: tensor.ndim > 1,
    )
    return _row(
        "training step {}",
        contenders,
        batch,
        model,
        _pairs(setting.compile),
        lambda: check(contenders, dict(model.named_parameters())),
    )


def throughput(setting: Setting) -> Row:
    """Build a benchmark that times a training step in bf16 on a large batch.

    The batch has `setting.batch` sentence pairs; the default is 1,024 on CUDA, which keeps the GPU busy, and 32 on
    other devices.
    """
    return throughput_row(setting, count=setting.batch_size(32, 1024), precision="bf16")


def throughput_row(setting: Setting, *, count: int, precision: str, length: int | None = None) -> Row:
    """Build a benchmark that times a training step on `count` sentence pairs of `length` (None: 25) tokens per side.

    With `setting.compile`, only compiled models are timed.
    """
    recipe, batch, model = _setup(setting, count, length)
    contenders = {
        f"ours {precision}": _ours(recipe, batch, copy.deepcopy(model), precision, compiled=setting.compile),
        f"{PEER} {precision}": _theirs(recipe, batch, model, precision, compiled=setting.compile),
    }
    ours, theirs = contenders.values()
    name = f"throughput {{}}, {precision}{', compiled' if setting.compile else ''}"
    tolerance = 0.02 if precision == "bf16" else 1e-4
    return _row(
        name,
        contenders,
        batch,
        model,
        [(f"ours {precision}", f"{PEER} {precision}")],
        lambda: compare_numbers("loss", ours.step(), theirs.step(), tolerance),
    )


def operations(model: Transformer, length: int, *, training: bool) -> float:
    """Count the operations for one sentence pair of `length` tokens per side; see `flops.operations`."""
    tokens, lengths = torch.full((1, length), UNK), torch.full((1,), length)
    return flops.operations(model, tokens, lengths, tokens, training=training)


def _row(
    name: str,
    contenders: dict[str, TrainingContender],
    batch: dict[str, Any],
    model: Transformer,
    pairs: Sequence[tuple[str, str]],
    check: Callable[[], str],
) -> Row:
    count, length = batch["source"].shape
    return Row(
        name=name.format(f"{count}x({length}+{length})"),
        contenders={name: contender.step for name, contender in contenders.items()},
        pairs=pairs,
        check=check,
        amounts=dict.fromkeys(contenders, (count * length, "target tokens")),
        flops=flops.per_contender(contenders, count * operations(model, length, training=True)),
    )


def _pairs(compiled: bool) -> list[tuple[str, str]]:
    """List the pairs (contender, reference) whose times are compared, for each pair of COMPARED_PRECISIONS.

    Our eager model is paired with PyTorch's eager model. If `compiled`, our compiled model is also paired with
    PyTorch's eager model and with PyTorch's compiled model.
    """
    pairs = [(f"ours {ours}", f"{PEER} {theirs}") for ours, theirs in COMPARED_PRECISIONS]
    for ours, theirs in COMPARED_PRECISIONS if compiled else ():
        pairs += [(f"ours {ours} compiled", f"{PEER} {theirs}{suffix}") for suffix in ("", " compiled")]
    return pairs


def _setup(
    setting: Setting, count: int, length: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], Transformer]:
    """Return the config, a batch of `count` sentence pairs on the device, and our model with random weights.

    Sentences have `length` tokens; None means 25. With `setting.tiny`, there are at most 4 pairs, the sentences have at
    most 8 tokens, and None means 6.
    """
    recipe, entries = peers.config(tiny=setting.tiny), peers.vocabulary_size(tiny=setting.tiny)
    count, length = (min(count, 4), min(length or 6, 8)) if setting.tiny else (count, length or 25)
    batch = to_device(peers.sample_pairs(count, length, length, entries), setting.device)
    return recipe, batch, peers.translator(recipe, entries)


def _ours(
    recipe: dict[str, Any], batch: dict[str, Any], model: Transformer, precision: str, *, compiled: bool
) -> TrainingContender:
    """Make our contender, which runs an optimizer step of our trainer."""
    step = stepper(model.train(), recipe, None, batch["source"].device, precision, compiled=compiled)
    return TrainingContender(model=model, step=lambda: step([batch], 0)["loss"])


def _theirs(
    recipe: dict[str, Any], batch: dict[str, Any], ours: Transformer, precision: str, *, compiled: bool
) -> TrainingContender:
    """Make PyTorch's contender, which runs a step of a plain training loop.

    `ours` is the model with the initial weights. Gradients are not clipped, as in our config `recipe`.
    """
    device, adam = batch["source"].device, recipe["optimizer"]
    model = peers.torch_peer(ours, recipe).to(device).train()
    smoothing, targets = recipe["task"]["loss"]["smoothing"], batch["target_out"].flatten()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=adam["lr"], betas=tuple(adam["betas"]), eps=adam["eps"], fused=True
    )
    if compiled:
        model.compile()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logits = model(batch["source"], batch["target_in"]).flatten(0, 1)  # (B * T, V)
            loss = F.cross_entropy(logits, targets, ignore_index=PAD, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return TrainingContender(model=model, step=step, from_ours=peers.to_torch)
