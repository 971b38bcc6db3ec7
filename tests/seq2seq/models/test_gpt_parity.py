"""The decoder-only language model against transformers' GPT-2 with the same random weights."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.decoding.contract import SpecialIds
from common.decoding.decode import decode
from common.decoding.sampling import sample_tokens
from common.machine.seeds import generator
from seq2seq.importing.gpt2 import adopt
from seq2seq.models.gpt import Gpt, GptBlockOptions
from tests.searching import BEAM

transformers = pytest.importorskip("transformers")

ENTRIES, WIDTH, HEADS, LAYERS, LONGEST, END = 23, 24, 3, 3, 40, 0
SPECIAL = SpecialIds(END, END, ())
# float64 with values of size ten; in float32, a rounding error of 2^-24 of such values in each of a dozen operations
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
precisions = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def peer(dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """transformers' model without dropout, and with random values in every parameter."""
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"vocab_size": ENTRIES, "n_positions": LONGEST, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    ids = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
    config = transformers.GPT2Config(**shape, **drop, **ids, attn_implementation=attention)
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    rng = generator("peer")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.empty(parameter.shape, dtype=torch.float64).normal_(std=0.2, generator=rng))
            if "ln_" in name and name.endswith("weight"):
                parameter += 1
    return model


def like(theirs: nn.Module, activation: Any = "gelu_tanh") -> Gpt:
    """Our model with the weights of theirs."""
    blocks = GptBlockOptions(dropout=0.0, attention_dropout=0.0, norm_eps=1e-5, activation=activation)
    shape = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH}
    ours = Gpt(**shape, vocabulary=ENTRIES, longest=LONGEST, blocks=blocks)
    weights = adopt(dict(theirs.state_dict()), None).weights
    ours.to(next(iter(weights.values())).dtype).eval().load_state_dict(weights)
    return ours


def pair(dtype: torch.dtype) -> tuple[Gpt, Any]:
    theirs = peer(dtype)
    return like(theirs), theirs


def texts(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """Random tokens (B, N), padded on the `side`, and which of them are real."""
    tokens = torch.randint(1, ENTRIES, (len(lengths), max(lengths)), generator=generator("texts", *lengths))
    places, counts = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    real = places < counts if side == "right" else places >= max(lengths) - counts
    return tokens.masked_fill(~real, END), real


@precisions
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_and_all_gradients_of_padded_texts_are_those_of_transformers(side: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype)
    tokens, real = texts([9, 1, 6, 4], side)
    positions = (real.cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=real.long(), position_ids=positions, use_cache=False).logits[real]
    logits = ours(tokens, real)[real]
    assert expected.std() > 0.5
    exact = {"rtol": 0, "atol": TOLERANCES[dtype]}
    torch.testing.assert_close(logits, expected, **exact)
    direction = torch.randn(logits.shape, dtype=torch.float64, generator=generator("direction")).to(dtype)
    logits.backward(direction / direction.norm())
    expected.backward(direction / direction.norm())
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert all(gradient.any() for gradient in gradients.values())
    gradients = adopt(gradients, None).weights
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), **exact, msg=name)
    assert not gradients


@torch.no_grad()
def test_exact_gelu_gives_other_logits_and_is_that_of_transformers() -> None:
    theirs = peer(torch.float64)
    tokens, _ = texts([7, 7], "right")
    tanh = like(theirs)(tokens)
    for block in theirs.transformer.h:
        block.mlp.act = nn.GELU()
    expected = theirs(tokens).logits
    torch.testing.assert_close(like(theirs, "gelu")(tokens), expected, rtol=0, atol=1e-10)
    assert (tanh - expected).abs().max() > 1e-4


# Generation.

LENGTHS = [3, 9, 1, 14, 6, 2, 11, 5, 8, 4]
NEW_TOKENS = 12
OPTIONS = replace(BEAM, method="beam", beam=4, candidates=4, longest_extra=NEW_TOKENS, at_limit="cut")


def generated(model: Any, **options: Any) -> Any:
    """transformers' continuations of left-padded prompts."""
    tokens, real = texts(LENGTHS, "left")
    outputs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "do_sample": False}
    return model.generate(
        tokens, attention_mask=real.long(), max_new_tokens=NEW_TOKENS, pad_token_id=END, **outputs, **options
    )


def ours_of(model: Gpt, options: Any) -> list[Any]:
    """Our continuations of the same prompts, one list of all hypotheses."""
    tokens, real = texts(LENGTHS, "left")
    prompts = [row[keep].tolist() for row, keep in zip(tokens, real, strict=True)]
    nothing = torch.zeros(len(prompts), 0, dtype=torch.int64), torch.zeros(len(prompts), dtype=torch.int64)
    return [*itertools.chain(*decode(model, *nothing, options, SPECIAL, prompts=prompts))]


def continuation(row: list[int]) -> list[int]:
    """The tokens after the longest prompt, up to the end."""
    return [*itertools.takewhile(lambda token: token != END, row[max(LENGTHS) :])]


def test_greedy_generation_with_a_cache_finds_what_transformers_finds() -> None:
    ours, theirs = pair(torch.float64)
    answer = generated(theirs, num_beams=1)
    logs = torch.stack(answer.logits, 1).double().log_softmax(-1)  # (B, T, V)
    hypotheses = ours_of(ours, replace(OPTIONS, method="greedy", candidates=1, alpha=0))
    for hypothesis, row, steps in zip(hypotheses, answer.sequences.tolist(), logs, strict=True):
        assert hypothesis.tokens == continuation(row)
        tokens = [*hypothesis.tokens, END][: len(hypothesis.tokens) + hypothesis.ended]
        total = sum(float(steps[n, token]) for n, token in enumerate(tokens))
        assert hypothesis.log_probability == pytest.approx(total, abs=5e-5)  # transformers stores float32
    assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) > 3


@pytest.mark.parametrize(("stop", "early"), [("first", True), ("bound", False)])
def test_four_beams_with_a_cache_find_what_transformers_finds(stop: Any, early: bool) -> None:
    """Tokens and scores of the four best continuations of ten prompts."""
    ours, theirs = pair(torch.float64)
    beams = {"num_beams": 4, "num_return_sequences": 4, "early_stopping": early, "length_penalty": 0.6}
    answer = generated(theirs, **beams)
    expected = [continuation(row) for row in answer.sequences.tolist()]
    hypotheses = ours_of(ours, replace(OPTIONS, alpha=0.6, stop=stop))
    assert [hypothesis.tokens for hypothesis in hypotheses] == expected
    # transformers sums up to 12 log probabilities in float32
    scores = [hypothesis.score for hypothesis in hypotheses]
    assert scores == pytest.approx(answer.sequences_scores.tolist(), abs=5e-5)
    assert {hypothesis.ended for hypothesis in hypotheses} == {True, False}


@torch.no_grad()
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.8, 9, 0.6)]
)
def test_tokens_are_sampled_from_the_distribution_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    """Equally spaced numbers in place of random ones hit each token as often as its probability says, up to one."""
    ours, theirs = pair(torch.float64)
    tokens, _ = texts([6, 6, 6], "right")
    state = ours.encode(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    logits, draws = ours.step(state, tokens), 5000
    warpers = [transformers.TemperatureLogitsWarper(temperature)]
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = theirs(tokens).logits[:, -1]
    for warper in warpers:
        scores = warper(tokens, scores)
    expected = scores.softmax(-1)  # (3, V)
    uniforms = ((torch.arange(draws) + 0.5) / draws).repeat(3)
    options = replace(OPTIONS, method="sample", temperature=temperature, top_k=top_k, top_p=top_p)
    sampled = sample_tokens(logits.repeat_interleave(draws, 0), uniforms, options).view(3, draws)
    shares = torch.stack([row.bincount(minlength=ENTRIES) for row in sampled]) / draws
    torch.testing.assert_close(shares.double(), expected, rtol=0, atol=1.01 / draws)
    assert ((expected > 0).sum(1) < ENTRIES).all() == (top_k > 0 or top_p < 1)
