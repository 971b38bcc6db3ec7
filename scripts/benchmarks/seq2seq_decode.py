"""Benchmark decoding with the base-size translator against transformers' Marian and CTranslate2.

All contenders run Marian's variant of the Transformer (scripts/benchmarks/seq2seq_peers.py). All translations have the
maximum length, since a bias on the logits excludes the end token. transformers uses PyTorch's fused attention and
transformers' own key-value cache. For bf16, the weights of transformers' model are converted to bf16. CTranslate2 runs
a converted copy of transformers' model, on the CPU only. It is timed in fp32 and in int8, the type for which it is
optimised.
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
from scripts.benchmarks import quantised
from scripts.benchmarks import seq2seq_peers as peers
from scripts.benchmarks.timing import MismatchError, Row, Setting, compare_tensors
from seq2seq.criterion.cross_entropy import token_losses
from seq2seq.models.transformer import Transformer
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL

Translations = list[list[int]]
Pairs = list[tuple[str, str | tuple[str, ...]]]
BEAM = 4


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
    return replace(row.select([name for name in row.contenders if "bf16" in name]), name=f"decoding, {row.name}")


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
    contenders = _torch_contenders(setting, model, marian, batch, beam, tokens, entries)
    pairs: Pairs = [
        ("ours fp32", "transformers fp32"),
        ("ours bf16", "transformers fp32"),
        ("ours bf16", "transformers bf16"),
    ]
    ours_bf16 = ["ours bf16", *(["ours bf16 compiled"] if setting.compile else [])]
    if setting.compile:
        pairs += [(ours_bf16[1], "transformers bf16"), (ours_bf16[1], "ours bf16")]
    notes = ["CTranslate2 is not installed, so it was not timed (pip install ctranslate2)"]
    engines: dict[str, Any] = {}
    if setting.device.type == "cuda":
        notes = ["CTranslate2 is timed on the CPU only"]
    elif peers.has_ctranslate2():
        notes, engines = [], _ctranslate2_engines(setting, marian, entries)
        words = peers.to_words(batch["source"])
        contenders |= {name: _ctranslate2_contender(engine, words, beam, tokens) for name, engine in engines.items()}
        ours_fast = [*ours_bf16, *({quantised.NAME} & contenders.keys())]
        pairs += [("ours fp32", "CTranslate2 fp32"), *((name, "CTranslate2 int8") for name in ours_fast)]

    def check() -> str:
        differences = _compare_probabilities(setting.device, model, marian, engines, batch, entries)
        return "; ".join([*notes, *differences, *_compare_translations(contenders, tokens)])

    name = f"{'greedy' if beam == 1 else f'beam-{beam}'} {count}x{length}, {tokens} new tokens"
    amounts = dict.fromkeys(contenders, (count, "sentences"))
    return Row(name=name, contenders=contenders, pairs=pairs, check=check, amounts=amounts)


def _torch_contenders(
    setting: Setting, model: Transformer, marian: Any, batch: dict[str, Any], beam: int, tokens: int, entries: int
) -> dict[str, Callable[[], Translations]]:
    """Make the contenders that run in PyTorch: our model and transformers' model.

    Each contender returns the token ids of all translations. transformers' ids are converted to ours.
    """
    device = setting.device
    order = torch.tensor(peers.marian_order(entries))
    source, lengths = batch["source"].to(device), batch["source_lengths"].to(device)
    marian_source = peers.marian_ids(entries)[batch["source"]].to(device)
    options = replace(
        construct(DecodingOptions, peers.marian_config(tiny=setting.tiny)["task"]["predict"]),
        method="greedy" if beam == 1 else "beam",
        beam=beam,
        penalty="average",  # the length penalty of transformers and CTranslate2
        alpha=1.0,
        longest_factor=0.0,
        longest_extra=tokens,
        at_limit="cut",
    )
    generation = peers.generation(beam, tokens, entries)
    real = torch.ones_like(marian_source)  # no padding

    def run_ours(model: Transformer, precision: str) -> Translations:
        with torch.no_grad(), autocast(device, precision):  # one autocast for all tokens, as in the evaluator
            hypotheses = decode(model, source, lengths, options, SPECIAL)
        return [sentence[0].tokens for sentence in hypotheses]

    def run_theirs(model: Any) -> Translations:
        with torch.inference_mode():
            tokens = model.generate(marian_source, attention_mask=real, generation_config=generation)
        translations: Translations = order[tokens[:, 1:].cpu()].tolist()  # without BOS
        return translations

    theirs_fp32, theirs_bf16 = marian.to(device), copy.deepcopy(marian).bfloat16()
    ours_fp32, ours_bf16 = model.to(device), copy.deepcopy(model)  # the copy has its own cache of packed weights
    contenders = {
        "transformers fp32": lambda: run_theirs(theirs_fp32),
        "transformers bf16": lambda: run_theirs(theirs_bf16),
        "ours fp32": lambda: run_ours(ours_fp32, "fp32"),
        "ours bf16": lambda: run_ours(ours_bf16, "bf16"),
    }
    if quantised.is_supported(device):
        ours_int8 = quantised.quantised(model, lambda model: run_ours(model, "fp32"))
        contenders[quantised.NAME] = lambda: run_ours(ours_int8, "int8")
    if setting.compile:
        ours_compiled = compiled(ours_fp32)
        contenders["ours bf16 compiled"] = lambda: run_ours(ours_compiled, "bf16")
    return contenders


def _ctranslate2_engines(setting: Setting, marian: Any, entries: int) -> dict[str, Any]:
    compute_types = {"CTranslate2 fp32": "float32", "CTranslate2 int8": "int8"}
    return {
        name: peers.ctranslate2_model(
            marian, entries, setting.scratch, compute=compute, threads=torch.get_num_threads()
        )
        for name, compute in compute_types.items()
    }


def _ctranslate2_contender(engine: Any, words: list[list[str]], beam: int, tokens: int) -> Callable[[], Translations]:
    def search() -> Translations:
        results = engine.translate_batch(
            words, beam_size=beam, length_penalty=1.0, max_decoding_length=tokens, min_decoding_length=tokens
        )
        return [peers.to_ids(result.hypotheses[0]) for result in results]

    return search


@torch.no_grad()
def _compare_probabilities(
    device: torch.device, model: Transformer, marian: Any, engines: dict[str, Any], batch: dict[str, Any], entries: int
) -> list[str]:
    """Compare the models' outputs for given targets; returns a text for each difference.

    Our logits in fp32 are compared with transformers' in fp32 and with ours in bf16. Our log probabilities of the
    target tokens are compared with those of each of the CTranslate2 `engines`. This check is needed because
    translations could agree by chance. Raises MismatchError if a difference is too large.
    """
    tolerance = 1e-3 if device.type == "cuda" else 1e-4
    order, marian_ids = peers.marian_order(entries), peers.marian_ids(entries)
    on_device = to_device(batch, device)
    our_logits = model(on_device["source"], on_device["source_lengths"], on_device["target_in"]).cpu()
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
    with autocast(device, "bf16"):
        ours_bf16 = model(on_device["source"], on_device["source_lengths"], on_device["target_in"]).float().cpu()
    differences.append(compare_tensors("logits of ours bf16", ours_bf16[..., our_columns], ours, 0.3, along=-1))
    words = batch["target_out"][:, :-1]  # (B, T - 1), without EOS
    expected = -token_losses(our_logits[:, :-1], words)
    for name, engine in engines.items():
        scored = engine.score_batch(peers.to_words(batch["source"]), peers.to_words(words))
        log_probabilities = torch.tensor([sentence.log_probs[: words.shape[1]] for sentence in scored])
        limit = tolerance if "fp32" in name else 1.0
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
