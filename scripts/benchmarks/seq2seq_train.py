"""Forward passes and training steps of the translator of base size against torch.nn.Transformer.

PyTorch's infers by the fast path of its encoder layers, in bf16 with converted weights, which that path wants. It
trains by a plain loop with a fused Adam, and spares itself the masks of padding that ours makes in any case.
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
from scripts.benchmarks.learning import Learner, same_step, stepper
from scripts.benchmarks.timing import Row, Setting, alike, near
from seq2seq.models.transformer import Transformer
from seq2seq.tokenizers.bpe import PAD, UNK

PEER = "torch.nn.Transformer"
PRECISIONS = ("fp32", "bf16")
LIKE_WITH_LIKE = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))


def forward(setting: Setting) -> Row:
    """Logits of given translations, in evaluation mode."""
    recipe, batch, model = _lesson(setting, setting.at_once(32, 512))
    model.to(setting.device).eval()
    theirs = peers.torch_peer(model, recipe).to(setting.device).eval()
    half = copy.deepcopy(theirs).bfloat16()  # faster than autocast

    def infer(run: Callable[..., Tensor], *inputs: Tensor, precision: str = "fp32") -> Callable[[], Tensor]:
        def work() -> Tensor:
            with torch.inference_mode(), autocast(setting.device, precision):
                return run(*inputs)

        return work

    source, lengths, target = batch["source"], batch["source_lengths"], batch["target_in"]
    contenders: dict[str, Callable[[], Tensor]] = {}
    for kind, wrap in (("", lambda run: run), (" compiled", torch.compile))[: 1 + setting.compile]:
        contenders[f"{PEER} fp32{kind}"] = infer(wrap(theirs), source, target)
        contenders[f"{PEER} bf16{kind}"] = infer(wrap(half), source, target)
        for precision in PRECISIONS:
            contenders[f"ours {precision}{kind}"] = infer(
                wrap(copy.deepcopy(model)), source, lengths, target, precision=precision
            )

    def check() -> str:
        truth, others = contenders[f"{PEER} fp32"](), [name for name in contenders if name != f"{PEER} fp32"]
        exact = 1e-3 if setting.device.type == "cuda" else 1e-4
        return "; ".join(
            near(f"{name} logits", contenders[name](), truth, 0.3 if "bf16" in name else exact, along=-1)
            for name in others
        )

    count, length = source.shape
    return Row(
        name=f"forward {count}x({length}+{length})",
        contenders=contenders,
        pairs=_pairs(setting.compile),
        check=check,
        amounts=dict.fromkeys(contenders, (count * length, "target tokens")),
        flops=flops.each(contenders, count * operations(model, length, training=False)),
    )


def train(setting: Setting) -> Row:
    """A training step of 32 sentence pairs of 25 tokens a side: forward, smoothed cross-entropy, backward, Adam."""
    recipe, batch, model = _lesson(setting, 32)
    learners: dict[str, Learner] = {}
    for kind in ("", " compiled")[: 1 + setting.compile]:
        for precision in PRECISIONS:
            name = f"{precision}{kind}"
            learners[f"{PEER} {name}"] = _theirs(recipe, batch, model, precision, compiled=bool(kind))
            learners[f"ours {name}"] = _ours(recipe, batch, copy.deepcopy(model), precision, compiled=bool(kind))
    # A swapped pair of tensors is 0.3 or more apart. Key biases have gradients of nothing but rounding.
    check = partial(same_step, gradient=1e-3, update=0.03, judged=lambda tensor: tensor.ndim > 1)
    return _row(
        "training step {}",
        learners,
        batch,
        model,
        _pairs(setting.compile),
        lambda: check(learners, dict(model.named_parameters())),
    )


def throughput(setting: Setting) -> Row:
    """A training step in bf16 on as many sentence pairs as keep a GPU busy."""
    return throughput_row(setting, count=setting.at_once(32, 1024), precision="bf16")


def throughput_row(setting: Setting, *, count: int, precision: str, length: int | None = None) -> Row:
    """A training step on `count` sentence pairs of `length` tokens a side."""
    recipe, batch, model = _lesson(setting, count, length)
    learners = {
        f"ours {precision}": _ours(recipe, batch, copy.deepcopy(model), precision, compiled=setting.compile),
        f"{PEER} {precision}": _theirs(recipe, batch, model, precision, compiled=setting.compile),
    }
    name = f"throughput {{}}, {precision}{', compiled' if setting.compile else ''}"
    tolerance = 0.02 if precision == "bf16" else 1e-4
    return _row(
        name,
        learners,
        batch,
        model,
        [(f"ours {precision}", f"{PEER} {precision}")],
        lambda: alike("loss", *(learner.step() for learner in learners.values()), tolerance),
    )


def operations(model: Transformer, length: int, *, training: bool) -> float:
    """Of the products for one pair of `length` tokens a side."""
    tokens, lengths = torch.full((1, length), UNK), torch.full((1,), length)
    return flops.operations(model, tokens, lengths, tokens, training=training)


def _row(
    name: str,
    learners: dict[str, Learner],
    batch: dict[str, Any],
    model: Transformer,
    pairs: Sequence[tuple[str, str]],
    check: Callable[[], str],
) -> Row:
    count, length = batch["source"].shape
    return Row(
        name=name.format(f"{count}x({length}+{length})"),
        contenders={name: learner.step for name, learner in learners.items()},
        pairs=pairs,
        check=check,
        amounts=dict.fromkeys(learners, (count * length, "target tokens")),
        flops=flops.each(learners, count * operations(model, length, training=True)),
    )


def _pairs(compiled: bool) -> list[tuple[str, str]]:
    """Ours over PyTorch's; compiled ours over its plain and its compiled."""
    pairs = [(f"ours {one}", f"{PEER} {other}") for one, other in LIKE_WITH_LIKE]
    for one, other in LIKE_WITH_LIKE if compiled else ():
        pairs += [(f"ours {one} compiled", f"{PEER} {other}{kind}") for kind in ("", " compiled")]
    return pairs


def _lesson(
    setting: Setting, count: int, length: int | None = None
) -> tuple[dict[str, Any], dict[str, Any], Transformer]:
    """The recipe, a batch on the device, and the model with its first weights."""
    recipe, entries = peers.config(tiny=setting.tiny), peers.vocabulary(tiny=setting.tiny)
    count, length = (min(count, 4), min(length or 6, 8)) if setting.tiny else (count, length or 25)
    batch = to_device(peers.pairs(count, length, length, entries), setting.device)
    return recipe, batch, peers.translator(recipe, entries)


def _ours(
    recipe: dict[str, Any], batch: dict[str, Any], model: Transformer, precision: str, *, compiled: bool
) -> Learner:
    """The trainer's own step."""
    step = stepper(model.train(), recipe, None, batch["source"].device, precision, compiled=compiled)
    return Learner(model=model, step=lambda: step([batch], 0)["loss"])


def _theirs(
    recipe: dict[str, Any], batch: dict[str, Any], ours: Transformer, precision: str, *, compiled: bool
) -> Learner:
    """A plain loop. It clips nothing, as the recipe says."""
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

    return Learner(model=model, step=step, placed=peers.in_torch)
