"""The translator of base size against transformers' Marian, CTranslate2 and torch.nn.Transformer.

Translations are looked for in Marian's form of the model, which all can take, and are exactly as long as they may be,
since an end's bias keeps it from being chosen. transformers attends by PyTorch's fused kernel, with its cache, and runs
in bf16 with converted weights; CTranslate2 takes the model that transformers holds, and runs on the CPU alone. PyTorch
trains by a plain loop with a fused Adam, and spares itself the masks of padding that ours makes in any case.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import optim
from common.config import build, construct
from common.device import autocast, to_device
from common.optim import OptimizerOptions
from common.step import Stepper
from scripts.benchmarks import seq2seq_peers as peers
from scripts.benchmarks.timing import Disagreement, Row, Setting, alike, near
from seq2seq.decoding import DecodingOptions, decode
from seq2seq.loss import token_losses
from seq2seq.tokenizer import BOS, EOS, PAD, UNK
from seq2seq.transformer import Transformer

Translations = list[list[int]]
Pairs = list[tuple[str, str | tuple[str, ...]]]
BEAM = 4


@dataclass(frozen=True, kw_only=True)
class Counted(Row):
    """A row that also says how much of what a contender gets through in a second: name -> (how much at once, unit)."""

    amounts: Mapping[str, tuple[float, str]] = field(default_factory=dict)


# Decoding.


def compiled(model: Transformer) -> Transformer:
    """A copy of ours with compiled feed-forwards, their bf16 weights folded in: the one place that chooses the parts.

    None is known that pays: what is not compiled has its weights in the kernel's order already (common/linear.py).
    """
    model = copy.deepcopy(model)
    blocks: list[Any] = [*model.decoder.blocks]
    for block in blocks:
        block.feed_forward.compile(dynamic=True, options={"freezing": True})
    return model


def greedy(setting: Setting) -> Row:
    """Translations by the likeliest token."""
    return _search(setting, beam=1)


def beam(setting: Setting) -> Row:
    """Translations by beam search with four hypotheses."""
    return _search(setting, beam=BEAM)


def decoding(setting: Setting) -> Row:
    """Sentences per second by beam search in bf16, on as many as keep a GPU busy."""
    count = setting.batch or (512 if setting.device.type == "cuda" else 32)
    count = 4 if setting.tiny else count
    row = _search(setting, beam=BEAM, count=count)
    names = [name for name in row.contenders if "bf16" in name]
    return Counted(
        name=f"decoding, {row.name}",
        contenders={name: row.contenders[name] for name in names},
        pairs=[pair for pair in row.pairs if pair[0] in names and pair[1] in names],
        check=row.check,
        amounts={name: (float(count), "sentences") for name in names},
    )


def _search(setting: Setting, *, beam: int, count: int | None = None) -> Row:
    recipe, entries = peers.marian_form(tiny=setting.tiny), peers.vocabulary(tiny=setting.tiny)
    count, length, tokens = (4, 6, 8) if setting.tiny else (count or 32, 20, 32)
    model = peers.translator(recipe, entries).eval()
    marian = peers.marian(model, recipe, entries).eval()
    batch = peers.pairs(count, length, tokens, entries)
    contenders = _torch_searches(setting, model, marian, batch, beam, tokens, entries)
    pairs: Pairs = [
        ("ours fp32", "transformers fp32"),
        ("ours bf16", "transformers fp32"),
        ("ours bf16", "transformers bf16"),
    ]
    best = ["ours bf16", *(["ours bf16 compiled"] if setting.compile else [])]
    if setting.compile:
        pairs += [(best[1], "transformers bf16"), (best[1], "ours bf16")]
    said = ["CTranslate2 is not installed and has no times (pip install ctranslate2)"]
    engines: dict[str, Any] = {}
    if setting.device.type == "cuda":
        said = ["CTranslate2 is timed on the CPU alone"]
    elif peers.has_ctranslate2():
        said, engines = [], _engines(setting, marian, entries)
        words = peers.in_words(batch["source"])
        contenders |= {name: _ctranslate2_search(one, words, beam, tokens) for name, one in engines.items()}
        pairs += [("ours fp32", "CTranslate2 fp32"), *((name, "CTranslate2 int8") for name in best)]

    def check() -> str:
        compared = _same_probabilities(setting.device, model, marian, engines, batch, entries)
        return "; ".join([*said, *compared, *_same_translations(contenders, tokens)])

    name = f"{'greedy' if beam == 1 else f'beam-{beam}'} {count}x{length}, {tokens} new tokens"
    return Row(name=name, contenders=contenders, pairs=pairs, check=check)


def _torch_searches(
    setting: Setting, model: Transformer, marian: Any, batch: dict[str, Any], beam: int, tokens: int, entries: int
) -> dict[str, Callable[[], Translations]]:
    """Ours and transformers', as functions that give the tokens of each sentence in our ids."""
    device = setting.device
    order = torch.tensor(peers.marian_order(entries))
    source, lengths = batch["source"].to(device), batch["source_lengths"].to(device)
    theirs_source = peers.marian_ids(entries)[batch["source"]].to(device)
    options = replace(
        construct(DecodingOptions, peers.marian_form(tiny=setting.tiny)["task"]["predict"]),
        method="greedy" if beam == 1 else "beam",
        beam=beam,
        penalty="average",  # transformers' and CTranslate2's
        alpha=1.0,
        longest_factor=0.0,
        longest_extra=tokens,
        at_limit="cut",
    )
    generation = peers.generation(beam, tokens, entries)
    attend = torch.ones_like(theirs_source)

    def our(model: Transformer, precision: str) -> Translations:
        with torch.no_grad(), autocast(device, precision):  # one for all tokens, as in the evaluator
            found = decode(model, source, lengths, options)
        return [hypotheses[0].tokens for hypotheses in found]

    def their(model: Any) -> Translations:
        with torch.inference_mode():
            found = model.generate(theirs_source, attention_mask=attend, generation_config=generation)
        translations: Translations = order[found[:, 1:].cpu()].tolist()  # without the start
        return translations

    ours, plain = model.to(device), marian.to(device)
    half = copy.deepcopy(marian).bfloat16()
    searches = {
        "transformers fp32": lambda: their(plain),
        "transformers bf16": lambda: their(half),
        "ours fp32": lambda: our(ours, "fp32"),
        "ours bf16": lambda: our(ours, "bf16"),
    }
    if setting.compile:
        quick = compiled(ours)
        searches["ours bf16 compiled"] = lambda: our(quick, "bf16")
    return searches


def _engines(setting: Setting, marian: Any, entries: int) -> dict[str, Any]:
    computed = {"CTranslate2 fp32": "float32", "CTranslate2 int8": "int8"}
    return {
        name: peers.ctranslate2_model(
            marian, entries, setting.scratch, compute=compute, threads=torch.get_num_threads()
        )
        for name, compute in computed.items()
    }


def _ctranslate2_search(engine: Any, words: list[list[str]], beam: int, tokens: int) -> Callable[[], Translations]:
    def search() -> Translations:
        found = engine.translate_batch(
            words, beam_size=beam, length_penalty=1.0, max_decoding_length=tokens, min_decoding_length=tokens
        )
        return [peers.in_ids(result.hypotheses[0]) for result in found]

    return search


@torch.no_grad()
def _same_probabilities(
    device: torch.device, model: Transformer, marian: Any, engines: dict[str, Any], batch: dict[str, Any], entries: int
) -> list[str]:
    """Compare logits, or where there are none the log probabilities of given tokens: words alone hide small changes."""
    exact = 1e-3 if device.type == "cuda" else 1e-4
    order, theirs = peers.marian_order(entries), peers.marian_ids(entries)
    on_device = to_device(batch, device)
    ours = model(on_device["source"], on_device["source_lengths"], on_device["target_in"]).cpu()
    logits = marian(
        input_ids=theirs[batch["source"]].to(device), decoder_input_ids=theirs[batch["target_in"]].to(device)
    ).logits.cpu()
    chosen = [i for i, word in enumerate(order) if word not in (PAD, BOS, EOS)]  # those would hide all others
    one, other = ours[..., [order[i] for i in chosen]], logits[..., chosen]
    said = [near("logits of transformers fp32", one, other, exact, along=-1)]
    with autocast(device, "bf16"):
        half = model(on_device["source"], on_device["source_lengths"], on_device["target_in"]).float().cpu()
    said.append(near("logits of ours bf16", half[..., [order[i] for i in chosen]], one, 0.3, along=-1))
    words = batch["target_out"][:, :-1]  # (B, T - 1), without the end
    expected = -token_losses(ours[:, :-1], words)
    for name, engine in engines.items():
        scored = engine.score_batch(peers.in_words(batch["source"]), peers.in_words(words))
        found = torch.tensor([one.log_probs[: words.shape[1]] for one in scored])
        said.append(near(f"log probabilities of {name}", expected, found, exact if "fp32" in name else 1.0, along=-1))
    return said


def _same_translations(searches: Mapping[str, Callable[[], Translations]], tokens: int) -> list[str]:
    """Compare every token. In fp32 one sentence in sixteen may differ, where two hypotheses are as good."""
    said = []
    truth = searches["transformers fp32"]() if "transformers fp32" in searches else searches["transformers bf16"]()
    for name, search in searches.items():
        found = search()
        if any(len(translation) != tokens for translation in found):
            raise Disagreement(f"{name}: not all translations have {tokens} tokens, so this is not the same work.")
        same = sum(one == other for one, other in zip(found, truth, strict=True))
        if "fp32" in name and same < len(truth) - len(truth) // 16:
            raise Disagreement(
                f"{name}: {same} of {len(truth)} translations are those of transformers fp32, so this is not the same "
                "work."
            )
        said.append(f"{name} {same} of {len(truth)} translations alike")
    return said


# Training.


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model, ours or PyTorch's, and what takes a step with it and returns the loss."""

    model: nn.Module
    step: Callable[[], Tensor]
    ours: bool


def train(setting: Setting) -> Row:
    """A training step of 32 sentence pairs of 25 tokens a side: forward, smoothed cross-entropy, backward, Adam."""
    recipe, batch, model = _lesson(setting, None)
    learners: dict[str, Learner] = {}
    for precision in ("fp32", "bf16"):
        learners[f"torch.nn.Transformer {precision}"] = _theirs(recipe, batch, model, precision)
        learners[f"ours {precision}"] = _ours(recipe, batch, copy.deepcopy(model), precision)
        if setting.compile:
            learners[f"ours {precision} compiled"] = _ours(recipe, batch, copy.deepcopy(model), precision, compile=True)
    pairs: Pairs = []
    for kind in ("", " compiled") if setting.compile else ("",):
        for one, other in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
            pairs.append((f"ours {one}{kind}", f"torch.nn.Transformer {other}"))
    count, length = batch["source"].shape
    return Row(
        name=f"training step {count}x({length}+{length})",
        contenders={name: learner.step for name, learner in learners.items()},
        pairs=pairs,
        check=lambda: _same_step(learners, dict(model.named_parameters())),
    )


def throughput(setting: Setting) -> Row:
    """A training step in bf16 on as many sentence pairs as keep a GPU busy, beside one large matrix product.

    The product shows what the device can do; operations are those of the model's products, counted by PyTorch; tokens
    are those of the targets.
    """
    device = setting.device
    recipe, batch, model = _lesson(setting, setting.batch or (1024 if device.type == "cuda" else 32))
    count, length = batch["source"].shape
    ours = _ours(recipe, batch, copy.deepcopy(model), "bf16", compile=setting.compile)
    theirs = _theirs(recipe, batch, model, "bf16", compile=setting.compile)
    side = 8192 if device.type == "cuda" else 512 if setting.tiny else 2048
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops, name = count * operations(model, length), "torch.nn.Transformer"
    return Counted(
        name=f"throughput {count}x({length}+{length}), bf16{', compiled' if setting.compile else ''}",
        contenders={"ours": ours.step, name: theirs.step, "matrix product": lambda: one @ other},
        pairs=[("ours", name)],
        check=lambda: alike("loss", ours.step(), theirs.step(), 0.02),
        flops={"ours": flops, name: flops, "matrix product": 2.0 * side**3},
        limit="matrix product",
        amounts=dict.fromkeys(("ours", name), (float(count * length), "target tokens")),
    )


def operations(model: Transformer, length: int) -> float:
    """Floating-point operations of the products in a training step on one pair, which needs no memory to count."""
    tokens = torch.full((1, length), UNK, device="meta")
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(model).to("meta")(tokens, torch.full((1,), length, device="meta"), tokens).sum().backward()
    return float(counter.get_total_flops())


def _lesson(setting: Setting, count: int | None) -> tuple[dict[str, Any], dict[str, Any], Transformer]:
    """The recipe, a batch on the device, and the model with its first weights."""
    recipe, entries = peers.config(tiny=setting.tiny), peers.vocabulary(tiny=setting.tiny)
    count, length = (4, 6) if setting.tiny else (count or 32, 25)
    batch = to_device(peers.pairs(count, length, length, entries), setting.device)
    return recipe, batch, peers.translator(recipe, entries)


def _ours(
    recipe: dict[str, Any], batch: dict[str, Any], model: Transformer, precision: str, compile: bool = False
) -> Learner:
    """The trainer's own step."""
    device = batch["source"].device
    model.to(device).train()
    optimizer = optim.build(model, construct(OptimizerOptions, recipe["optimizer"]))
    if compile:
        model.compile()
    task = build(recipe["task"], data=None)
    stepper = Stepper(task, model, optimizer, device, precision, recipe["trainer"]["clip_norm"])
    return Learner(model=model, step=lambda: stepper([batch], 0)["loss"], ours=True)


def _theirs(
    recipe: dict[str, Any], batch: dict[str, Any], ours: Transformer, precision: str, compile: bool = False
) -> Learner:
    """A plain loop. It clips nothing, as the recipe says."""
    device, adam = batch["source"].device, recipe["optimizer"]
    model = peers.torch_peer(ours, recipe).to(device).train()
    smoothing, targets = recipe["task"]["loss"]["smoothing"], batch["target_out"].flatten()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=adam["lr"], betas=tuple(adam["betas"]), eps=adam["eps"], fused=True
    )
    if compile:
        model.compile()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            logits = model(batch["source"], batch["target_in"]).flatten(0, 1)  # (B * T, V)
            loss = F.cross_entropy(logits, targets, ignore_index=PAD, label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Learner(model=model, step=step, ours=False)


def _same_step(learners: dict[str, Learner], before: dict[str, Tensor]) -> str:
    """Take every learner's first step, and compare losses, gradients and updates with those of ours in fp32."""
    losses = {name: learner.step() for name, learner in learners.items()}
    truth, said = learners["ours fp32"], []
    gradients, weights = _gradients(truth), _weights(truth.model)
    for name, learner in learners.items():
        if learner is truth:
            continue
        rounded = "bf16" in name
        said.append(alike(f"{name} loss", losses[name], losses["ours fp32"], 0.02 if rounded else 1e-4))
        expected = _flat(_placed(gradients, learner))
        # A swapped pair of tensors is 0.3 or more apart.
        said.append(near(f"{name} gradient", _flat(_gradients(learner)), expected, 0.2 if rounded else 1e-3))
        if not rounded:  # Adam's first step goes by the gradient's sign, and small ones' would be bf16's
            start, ours, theirs = _placed(before, learner), _placed(weights, learner), _weights(learner.model)
            tables = [key for key in start if start[key].ndim > 1]  # key biases have gradients of nothing but rounding
            one, other = (
                _flat({key: of[key].detach().cpu() - start[key].detach().cpu() for key in tables})
                for of in (theirs, ours)
            )
            said.append(near(f"{name} update", one, other, 0.03))
    return "; ".join(said)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def _gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: p.grad.cpu() for name, p in learner.model.named_parameters() if p.grad is not None}


def _placed(tensors: dict[str, Tensor], learner: Learner) -> dict[str, Tensor]:
    return tensors if learner.ours else peers.in_layout(tensors, "torch")


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


ROWS = {"greedy": greedy, "beam": beam, "train": train, "throughput": throughput, "decoding": decoding}
