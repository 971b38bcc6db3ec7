"""Translations by the model of base size against transformers' Marian and CTranslate2.

They are looked for in Marian's form of the model, which all can take, and are exactly as long as they may be, since an
end's bias keeps it from being chosen. transformers attends by PyTorch's fused kernel, with its cache, and runs in bf16
with converted weights; CTranslate2 takes the model that transformers holds, and runs on the CPU alone, in fp32 and,
what it is made for, int8.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from common.config.check import construct
from common.decoding.decode import decode
from common.decoding.options import DecodingOptions
from common.machine.device import autocast, to_device
from scripts.benchmarks import seq2seq_peers as peers
from scripts.benchmarks.timing import Disagreement, Row, Setting, near
from seq2seq.criterion.cross_entropy import token_losses
from seq2seq.models.transformer import Transformer
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL

Translations = list[list[int]]
Pairs = list[tuple[str, str | tuple[str, ...]]]
BEAM = 4


def compiled(model: Transformer) -> Transformer:
    """A copy of ours with compiled feed-forwards, their bf16 weights folded in: the one place that chooses the parts.

    None is known that pays: what is not compiled has its weights in the kernel's order already (common/nn/linear.py).
    """
    model = copy.deepcopy(model)
    blocks: list[Any] = [*model.decoder.blocks]
    for block in blocks:
        block.feed_forward.compile(dynamic=True, options={"freezing": True})
    return model


def greedy(setting: Setting) -> Row:
    """Translations by the likeliest token."""
    return search(setting, beam=1)


def beam(setting: Setting) -> Row:
    """Translations by beam search with four hypotheses."""
    return search(setting, beam=BEAM)


def decoding(setting: Setting) -> Row:
    """Sentences per second by beam search in bf16, on as many as keep a GPU busy."""
    row = search(setting, beam=BEAM, count=4 if setting.tiny else setting.at_once(32, 512))
    return replace(row.only([name for name in row.contenders if "bf16" in name]), name=f"decoding, {row.name}")


def search(setting: Setting, *, beam: int, count: int | None = None) -> Row:
    """Translations of `count` sentences of 20 tokens, 32 new tokens each; with a beam of 1 by the likeliest token."""
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
    amounts = dict.fromkeys(contenders, (count, "sentences"))
    return Row(name=name, contenders=contenders, pairs=pairs, check=check, amounts=amounts)


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
            found = decode(model, source, lengths, options, SPECIAL)
        return [hypotheses[0].tokens for hypotheses in found]

    def their(model: Any) -> Translations:
        with torch.inference_mode():
            found = model.generate(theirs_source, attention_mask=attend, generation_config=generation)
        translations: Translations = order[found[:, 1:].cpu()].tolist()  # without the start
        return translations

    plain, half = marian.to(device), copy.deepcopy(marian).bfloat16()
    ours, rounded = model.to(device), copy.deepcopy(model)  # each keeps weights in its precision
    searches = {
        "transformers fp32": lambda: their(plain),
        "transformers bf16": lambda: their(half),
        "ours fp32": lambda: our(ours, "fp32"),
        "ours bf16": lambda: our(rounded, "bf16"),
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
