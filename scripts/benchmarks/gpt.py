"""Benchmarks of GPT-2 small (`model=gpt2`) against transformers: greedy generation, and a training step.

ROWS maps the names of the benchmarks to the functions that build them. transformers uses PyTorch's fused attention and
either of its two key-value caches: one that grows, and one of the final length ("static"). The faster one is the
reference. For generation in bf16, the weights of transformers' model are converted to bf16; training in bf16 uses
autocast, which keeps the weights in fp32.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.check import construct
from common.decoding.contract import SpecialIds
from common.decoding.decode import decode
from common.decoding.options import DecodingOptions
from common.machine.device import autocast
from scripts.benchmarks import flops
from scripts.benchmarks import gpt_peers as peers
from scripts.benchmarks.learning import TrainingContender, compare_first_steps, stepper
from scripts.benchmarks.timing import MismatchError, Row, Setting, compare_tensors
from seq2seq.models.gpt import Gpt

Texts = list[list[int]]
PEER = "transformers"
PRECISIONS = ("fp32", "bf16")
COMPARED_PRECISIONS = (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16"))
CACHES = {"": None, " static": "static"}  # names of contenders and of transformers' caches
NO_END = SpecialIds(begin=0, end=-1, never=())  # so that every text has the maximum length


def one(setting: Setting) -> Row:
    """Build a benchmark that times the greedy generation of one text."""
    return generate(setting, 1)


def many(setting: Setting) -> Row:
    """Build a benchmark that times the greedy generation of 32 texts at once, or `setting.batch`."""
    return generate(setting, setting.batch or 32)


def generate(setting: Setting, count: int) -> Row:
    """Build a benchmark that times the greedy generation of `count` texts from prompts of 32 tokens to 64 new tokens.

    With `setting.tiny`, there are at most 4 texts, with prompts of 6 tokens and 8 new ones.
    """
    count, length, tokens = (min(count, 4), 6, 8) if setting.tiny else (count, 32, 64)
    recipe = peers.config(tiny=setting.tiny)
    model = peers.language_model(recipe, tiny=setting.tiny).eval()
    theirs = peers.peer(model, recipe).eval()
    prompts = peers.sample_texts(count, length, tiny=setting.tiny)
    options = replace(construct(DecodingOptions, recipe["task"]["predict"]), method="greedy", longest_extra=tokens)
    contenders = _generators(setting, model, theirs, prompts, options)

    def check() -> str:
        logits = _compare_logits(setting, model, theirs, prompts)
        return "; ".join([logits, *_compare_texts(contenders, tokens)])

    return Row(
        name=f"greedy generation {count}x{length}, {tokens} new tokens",
        contenders=contenders,
        pairs=[
            (f"ours {ours}", tuple(f"{PEER} {precision}{cache}" for cache in CACHES))
            for ours, precision in COMPARED_PRECISIONS
        ],
        check=check,
        amounts=dict.fromkeys(contenders, (count * tokens, "new tokens")),
    )


def _generators(
    setting: Setting, model: Gpt, theirs: Any, prompts: Tensor, options: DecodingOptions
) -> dict[str, Callable[[], Texts]]:
    """Make the contenders. Each returns the new tokens of all texts."""
    device, generation = setting.device, partial(peers.generation, options.longest_extra)
    nothing = torch.empty(len(prompts), 0, dtype=torch.int64, device=device)
    lengths, rows = torch.zeros(len(prompts), dtype=torch.int64), prompts.tolist()
    on_device, real = prompts.to(device), torch.ones_like(prompts).to(device)

    def run_ours(model: Gpt, precision: str) -> Texts:
        with torch.no_grad(), autocast(device, precision):  # one autocast for all tokens, as in the evaluator
            hypotheses = decode(model, nothing, lengths, options, NO_END, prompts=rows)
        return [text[0].tokens for text in hypotheses]

    def run_theirs(model: Any, cache: str | None) -> Texts:
        with torch.inference_mode():
            generated = model.generate(on_device, attention_mask=real, generation_config=generation(cache))
        texts: Texts = generated[:, prompts.shape[1] :].tolist()
        return texts

    peer_models = {"fp32": theirs.to(device), "bf16": copy.deepcopy(theirs).bfloat16().to(device)}
    # Each copy of our model has its own cache of packed weights.
    our_models = {"fp32": model.to(device), "bf16": copy.deepcopy(model).to(device)}
    contenders: dict[str, Callable[[], Texts]] = {}
    for precision in PRECISIONS:
        for name, cache in CACHES.items():
            contenders[f"{PEER} {precision}{name}"] = partial(run_theirs, peer_models[precision], cache)
        contenders[f"ours {precision}"] = partial(run_ours, our_models[precision], precision)
    return contenders


@torch.no_grad()
def _compare_logits(setting: Setting, model: Gpt, theirs: Any, prompts: Tensor) -> str:
    """Compare the logits of the prompts in fp32, because texts could agree by chance."""
    tolerance = 1e-3 if setting.device.type == "cuda" else 1e-4
    prompts = prompts.to(setting.device)
    return compare_tensors(f"logits of {PEER} fp32", model(prompts), theirs(prompts).logits, tolerance, along=-1)


def _compare_texts(contenders: Mapping[str, Callable[[], Texts]], tokens: int) -> list[str]:
    """Compare the texts of all contenders with those of transformers in fp32.

    Returns a text for each contender, with the number of equal texts. Raises MismatchError if a text does not have
    `tokens` tokens, or if more than one in sixteen texts of an fp32 contender differ. A few may differ, because
    rounding decides between two tokens with nearly equal logits.
    """
    expected = contenders[f"{PEER} fp32"]()
    agreements = [f"{len({token for text in expected for token in text})} different tokens"]
    for name, generate_texts in contenders.items():
        texts = generate_texts()
        if any(len(text) != tokens for text in texts):
            raise MismatchError(f"{name}: not all texts have {tokens} new tokens, so this is not the same work.")
        equal = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=True))
        if "fp32" in name and equal < len(expected) - len(expected) // 16:
            raise MismatchError(
                f"{name}: only {equal} of {len(expected)} texts equal those of {PEER} fp32, so this is not the same "
                "work."
            )
        agreements.append(f"{name} {equal} of {len(expected)} texts equal")
    return agreements


def train(setting: Setting) -> Row:
    """Build a benchmark that times a training step on `setting.batch` (None: 8) texts of 256 tokens.

    The optimizer is AdamW, and gradients are clipped. With `setting.tiny`, there are 2 texts of 16 tokens.
    """
    count, length = (2, 16) if setting.tiny else (setting.batch or 8, 256)
    recipe = peers.config(tiny=setting.tiny)
    model = peers.language_model(recipe, tiny=setting.tiny)
    texts = peers.sample_texts(count, length + 1, tiny=setting.tiny).to(setting.device)
    contenders: dict[str, TrainingContender] = {}
    for precision in PRECISIONS:
        contenders[f"{PEER} {precision}"] = _theirs(setting, recipe, texts, model, precision)
        contenders[f"ours {precision}"] = _ours(setting, recipe, texts, copy.deepcopy(model), precision)
    # If two tensors were swapped, the relative difference of the updates would be at least 0.3. The updates of vectors
    # are not compared: the gradients of key biases are rounding errors, which Adam scales up to updates of the usual
    # size.
    check = partial(
        compare_first_steps,
        gradient_tolerance=1e-3,
        update_tolerance=0.03,
        compares_update=lambda tensor: tensor.ndim > 1,
    )
    operations = count * flops.operations(model, texts[:1, 1:].cpu(), training=True)
    return Row(
        name=f"training step {count}x{length}",
        contenders={name: contender.step for name, contender in contenders.items()},
        pairs=[(f"ours {ours}", f"{PEER} {precision}") for ours, precision in COMPARED_PRECISIONS],
        check=lambda: check(contenders, dict(model.named_parameters())),
        amounts=dict.fromkeys(contenders, (count * length, "tokens")),
        flops=flops.per_contender(contenders, operations),
    )


def _ours(setting: Setting, recipe: dict[str, Any], texts: Tensor, model: Gpt, precision: str) -> TrainingContender:
    """Make our contender, which runs an optimizer step of our trainer."""
    step = stepper(model.train(), recipe, None, setting.device, precision)
    tokens, targets = texts[:, :-1], texts[:, 1:]
    counts = torch.ones_like(targets, dtype=torch.bool)
    batch = {"ids": [*range(len(texts))], "tokens": tokens, "targets": targets, "counts": counts}
    return TrainingContender(model=model, step=lambda: step([batch], 0)["loss"])


def _theirs(setting: Setting, recipe: dict[str, Any], texts: Tensor, ours: Gpt, precision: str) -> TrainingContender:
    """Make transformers' contender, which runs a step of a plain training loop with the optimizer of `recipe`.

    `ours` is our model with the initial weights. As in our optimizer, weight decay applies to matrices only.
    """
    model, adamw = peers.peer(ours, recipe).to(setting.device).train(), recipe["optimizer"]
    parameters = [*model.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": adamw["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=adamw["lr"], betas=tuple(adamw["betas"]), eps=adamw["eps"], fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(setting.device, precision):
            logits = model(texts[:, :-1], use_cache=False).logits.flatten(0, 1)  # (B * N, V)
            loss = F.cross_entropy(logits, texts[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe["trainer"]["clip_norm"])
        optimizer.step()
        return loss.detach()

    return TrainingContender(model=model, step=step, from_ours=peers.to_transformers)


ROWS = {"one": one, "many": many, "train": train}
