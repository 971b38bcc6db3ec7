"""Benchmark decoding with the base-size translator against transformers' Marian and CTranslate2.

All contenders run Marian's variant of the Transformer (scripts/benchmarks/seq2seq_peers.py). All translations have the
maximum length, since a bias on the logits excludes the end token. transformers uses PyTorch's fused attention and
transformers' own key-value cache. For bf16, the weights of transformers' model are converted to bf16. Our model in int8
is calibrated on the row's own sentences. CTranslate2 runs a converted copy of transformers' model, on the CPU only and
in a process of its own (scripts/benchmarks/ctranslate2_engine.py). It is timed in each of COMPUTE_TYPES that it
supports on this CPU; the others would be computed in another type.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.config.check import construct
from common.decoding.decode import decode
from common.decoding.options import DecodingOptions
from common.machine.device import autocast, to_device
from scripts.benchmarks import quantised
from scripts.benchmarks import seq2seq_peers as peers
from scripts.benchmarks.ctranslate2_engine import Engine
from scripts.benchmarks.timing import MismatchError, Row, Setting, compare_tensors
from seq2seq.criterion.cross_entropy import token_losses
from seq2seq.models.transformer import Transformer
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL

Translations = list[list[int]]
Pairs = list[tuple[str, str | tuple[str, ...]]]
BEAM = 4
COMPUTE_TYPES = {  # names of contenders -> CTranslate2's compute types
    "CTranslate2 fp32": "float32",
    "CTranslate2 bf16": "bfloat16",
    "CTranslate2 int8": "int8",
    "CTranslate2 int8 and bf16": "int8_bfloat16",
}
# The largest accepted difference of logits or log probabilities from fp32, relative to their deviation from the mean.
# Random weights differ more than trained ones. The numbers of another model differ by more than 1.
LIMITS = {"bf16": 0.3, "int8": 0.6}


def compiled(model: Transformer) -> Transformer:
    """Copy a model, and compile the feed-forward layers of the copy's decoder, with their weights as constants.

    The other parts run in eager mode, where linear layers use packed weights on the CPU (common/nn/kernels.py). These
    parts are not known to be faster when compiled. To compile some of them, change this function.
    """
    model = copy.deepcopy(model)
    blocks: list[Any] = [*model.decoder.blocks]
    for block in blocks:
        block.feed_forward.compile(dynamic=True, options={"freezing": True})
    return model


def greedy(setting: Setting) -> Row:
    """Build a benchmark that times greedy decoding."""
    return search(setting, beam=1)


def beam(setting: Setting) -> Row:
    """Build a benchmark that times beam search with four hypotheses."""
    return search(setting, beam=BEAM)


def decoding(setting: Setting) -> Row:
    """Build a benchmark that times beam search in bf16 on a large batch.

    The batch has `setting.batch` sentences; the default is 512 on CUDA, which keeps the GPU busy, and 32 on other
    devices.
    """
    row = search(setting, beam=BEAM, count=4 if setting.tiny else setting.batch_size(32, 512))
    return replace(
        row.select(
            [name for name in row.contenders if name.endswith(("bf16", "bf16 compiled")) and "int8" not in name]
        ),
        name=f"decoding, {row.name}",
    )


def search(setting: Setting, *, beam: int, count: int | None = None) -> Row:
    """Build a benchmark that times the translation of `count` sentences (None: 32).

    Each source has 20 tokens, and each translation has 32. With `setting.tiny`, there are 4 sources of 6 tokens, and
    each translation has 8. If `beam` is 1, decoding is greedy; otherwise it is beam search with `beam` hypotheses.
    """
    recipe, entries = peers.marian_config(tiny=setting.tiny), peers.vocabulary_size(tiny=setting.tiny)
    count, length, tokens = (4, 6, 8) if setting.tiny else (count or 32, 20, 32)
    model = peers.translator(recipe, entries).eval()
    marian = peers.marian(model, recipe, entries).eval()
    batch = peers.sample_pairs(count, length, tokens, entries)
    options = _options(setting, beam, tokens)
    models = _our_models(setting, model, batch, options)
    contenders = _our_contenders(setting.device, models, batch, options)
    contenders |= _transformers_contenders(setting.device, marian, batch, beam, tokens, entries)
    pairs: Pairs = [
        ("ours fp32", "transformers fp32"),
        ("ours bf16", "transformers fp32"),
        ("ours bf16", "transformers bf16"),
    ]
    bf16 = [name for name in models if "bf16" in name]  # eager, and compiled if that is timed
    pairs += [pair for name in bf16[1:] for pair in ((name, "transformers bf16"), (name, "ours bf16"))]
    notes = ["CTranslate2 is not installed, so it was not timed (pip install ctranslate2)"]
    engines: dict[str, Engine] = {}
    if setting.device.type == "cuda":
        notes = ["CTranslate2 is timed on the CPU only"]
    elif peers.has_ctranslate2():
        notes, engines = [], _ctranslate2_engines(setting, marian, entries)
        words = peers.to_words(batch["source"])
        contenders |= {name: _ctranslate2_contender(engine, words, beam, tokens) for name, engine in engines.items()}
        pairs += [("ours fp32", "CTranslate2 fp32"), *((name, tuple(engines)) for name in bf16)]
        if quantised.NAME in models:
            pairs.append((quantised.NAME, tuple(name for name in engines if "int8" in name)))

    def check() -> str:
        differences = _compare_probabilities(setting.device, models, marian, engines, batch, entries)
        return "; ".join([*notes, *differences, *_compare_translations(contenders, tokens)])

    name = f"{'greedy' if beam == 1 else f'beam-{beam}'} {count}x{length}, {tokens} new tokens"
    amounts = dict.fromkeys(contenders, (count, "sentences"))
    return Row(name=name, contenders=contenders, pairs=pairs, check=check, amounts=amounts)


def _options(setting: Setting, beam: int, tokens: int) -> DecodingOptions:
    options: DecodingOptions = construct(DecodingOptions, peers.marian_config(tiny=setting.tiny)["task"]["predict"])
    return replace(
        options,
        method="greedy" if beam == 1 else "beam",
        beam=beam,
        penalty="average",  # the length penalty of transformers and CTranslate2
        alpha=1.0,
        longest_factor=0.0,
        longest_extra=tokens,
        at_limit="cut",
    )


def _our_models(
    setting: Setting, model: Transformer, batch: dict[str, Any], options: DecodingOptions
) -> dict[str, tuple[Transformer, str]]:
    """Copies of our model by the contenders' names, each with its precision; each has its own packed weights."""
    fp32 = model.to(setting.device)
    models = {"ours fp32": (fp32, "fp32"), "ours bf16": (copy.deepcopy(fp32), "bf16")}
    if quantised.is_supported(setting.device):
        int8 = quantised.quantised(fp32, lambda copied: _translate(setting.device, copied, "fp32", batch, options))
        models[quantised.NAME] = int8, "int8"
    if setting.compile:
        models["ours bf16 compiled"] = compiled(fp32), "bf16"
    return models


def _our_contenders(
    device: torch.device,
    models: Mapping[str, tuple[Transformer, str]],
    batch: dict[str, Any],
    options: DecodingOptions,
) -> dict[str, Callable[[], Translations]]:
    """A function for each of our models that returns the token ids of all translations."""
    batch = to_device(batch, device)
    return {
        name: partial(_translate, device, model, precision, batch, options)
        for name, (model, precision) in models.items()
    }


def _translate(
    device: torch.device, model: Transformer, precision: str, batch: dict[str, Any], options: DecodingOptions
) -> Translations:
    with torch.no_grad(), autocast(device, precision):  # one autocast for all tokens, as in the evaluator
        hypotheses = decode(model, batch["source"], batch["source_lengths"], options, SPECIAL)
    return [sentence[0].tokens for sentence in hypotheses]


def _transformers_contenders(
    device: torch.device, marian: Any, batch: dict[str, Any], beam: int, tokens: int, entries: int
) -> dict[str, Callable[[], Translations]]:
    """A function for each precision of transformers' model that returns all translations, as our token ids."""
    order = torch.tensor(peers.marian_order(entries))
    source = peers.marian_ids(entries)[batch["source"]].to(device)
    generation = peers.generation(beam, tokens, entries)
    real = torch.ones_like(source)  # no padding

    def run(model: Any) -> Translations:
        with torch.inference_mode():
            tokens = model.generate(source, attention_mask=real, generation_config=generation)
        translations: Translations = order[tokens[:, 1:].cpu()].tolist()  # without BOS
        return translations

    fp32, bf16 = marian.to(device), copy.deepcopy(marian).bfloat16()
    return {"transformers fp32": partial(run, fp32), "transformers bf16": partial(run, bf16)}


def _ctranslate2_engines(setting: Setting, marian: Any, entries: int) -> dict[str, Engine]:
    options = {"threads": torch.get_num_threads(), "in_process": setting.in_process}
    supported = peers.ctranslate2_types()
    return {
        name: peers.ctranslate2_model(marian, entries, setting.scratch, compute=compute, **options)
        for name, compute in COMPUTE_TYPES.items()
        if compute in supported
    }


def _ctranslate2_contender(
    engine: Engine, words: list[list[str]], beam: int, tokens: int
) -> Callable[[], Translations]:
    def search() -> Translations:
        return [peers.to_ids(translation) for translation in engine.translate(words, beam=beam, tokens=tokens)]

    return search


@torch.no_grad()
def _compare_probabilities(
    device: torch.device,
    models: Mapping[str, tuple[Transformer, str]],
    marian: Any,
    engines: dict[str, Engine],
    batch: dict[str, Any],
    entries: int,
) -> list[str]:
    """Compare the models' outputs for given targets; returns a text for each difference.

    Our logits in fp32 are compared with transformers' in fp32 and with ours in bf16 and int8. Our log probabilities of
    the target tokens are compared with those of each of the CTranslate2 `engines`. This check is needed because
    translations could agree by chance. Raises MismatchError if a difference is too large.
    """

    def logits(name: str) -> Tensor:
        model, precision = models[name]
        with autocast(device, precision):
            outputs: Tensor = model(on_device["source"], on_device["source_lengths"], on_device["target_in"])
        return outputs.float().cpu()

    tolerance = 1e-3 if device.type == "cuda" else 1e-4
    order, marian_ids = peers.marian_order(entries), peers.marian_ids(entries)
    on_device = to_device(batch, device)
    our_logits = logits("ours fp32")
    their_logits = marian(
        input_ids=marian_ids[batch["source"]].to(device),
        decoder_input_ids=marian_ids[batch["target_in"]].to(device),
    ).logits.cpu()
    # PAD, BOS and EOS are not compared. Relative to their large negative logits, all differences would look small.
    columns = [i for i, word in enumerate(order) if word not in (PAD, BOS, EOS)]
    our_columns = [order[i] for i in columns]
    ours = our_logits[..., our_columns]
    differences = [
        compare_tensors("logits of transformers fp32", ours, their_logits[..., columns], tolerance, along=-1)
    ]
    for name in ("ours bf16", quantised.NAME):
        if name in models:
            limit = LIMITS[models[name][1]]
            differences.append(
                compare_tensors(f"logits of {name}", logits(name)[..., our_columns], ours, limit, along=-1)
            )
    words = batch["target_out"][:, :-1]  # (B, T - 1), without EOS
    expected = -token_losses(our_logits[:, :-1], words)
    for name, engine in engines.items():
        scored = engine.log_probabilities(peers.to_words(batch["source"]), peers.to_words(words))
        log_probabilities = torch.tensor([sentence[: words.shape[1]] for sentence in scored])
        limit = tolerance if "fp32" in name else 1.0 if "int8" in name else LIMITS["bf16"]
        differences.append(
            compare_tensors(f"log probabilities of {name}", expected, log_probabilities, limit, along=-1)
        )
    return differences


def _compare_translations(contenders: Mapping[str, Callable[[], Translations]], tokens: int) -> list[str]:
    """Compare the translations of all contenders with those of transformers in fp32, or in bf16 if fp32 is not timed.

    Returns a text for each contender, with the number of its translations that are equal to those of transformers.
    Raises MismatchError if a translation does not have `tokens` tokens, or if more than one in sixteen of an fp32
    contender's translations differ. A few may differ, because rounding decides between two tokens with nearly equal
    scores.
    """
    agreements = []
    reference = "transformers fp32" if "transformers fp32" in contenders else "transformers bf16"
    expected = contenders[reference]()
    for name, search in contenders.items():
        translations = search()
        if any(len(translation) != tokens for translation in translations):
            raise MismatchError(f"{name}: not all translations have {tokens} tokens, so this is not the same work.")
        equal = sum(ours == theirs for ours, theirs in zip(translations, expected, strict=True))
        if "fp32" in name and equal < len(expected) - len(expected) // 16:
            raise MismatchError(
                f"{name}: only {equal} of {len(expected)} translations equal those of transformers fp32, so this is "
                "not the same work."
            )
        agreements.append(f"{name} {equal} of {len(expected)} translations equal")
    return agreements
