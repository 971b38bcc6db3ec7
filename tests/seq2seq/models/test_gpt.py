"""The decoder-only language model: initial values, invariances, and generation with and without a cache."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.decoding.contract import SpecialIds
from common.decoding.decode import decode
from common.decoding.given import score
from common.errors import UserError
from common.machine.seeds import generator
from seq2seq.models.gpt import Gpt, GptBlockOptions
from tests.searching import BEAM

ENTRIES, WIDTH, HEADS, LAYERS, LONGEST, END = 23, 16, 4, 3, 24, 0
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, three blocks with values of size one
SPECIAL = SpecialIds(END, END, ())
BLOCKS = {"dropout": 0.0, "attention_dropout": 0.0, "norm_eps": 1e-5, "activation": "gelu_tanh"}
GREEDY = replace(BEAM, method="greedy", candidates=1, longest_extra=12, at_limit="cut")
SEARCHES = {
    "greedy": GREEDY,
    "beam": replace(GREEDY, method="beam", beam=3, candidates=3),
    "sample": replace(GREEDY, method="sample", candidates=2, temperature=1.5, top_k=9),
}


def build_model(**changes: Any) -> Gpt:
    blocks = BLOCKS | {key: changes.pop(key) for key in {*changes} & {*BLOCKS}}
    shape = {"vocabulary": ENTRIES, "width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH}
    return Gpt(**{**shape, "longest": LONGEST, **changes}, blocks=GptBlockOptions(**blocks))


def randomised(dtype: torch.dtype = torch.float64, **changes: Any) -> Gpt:
    """A model with random parameters, large enough to distinguish tokens and positions."""
    model = build_model(**changes).to(dtype).eval()
    rng = generator("gpt")
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3, generator=rng)
    return model


def texts(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Random tokens (B, N), right-padded with END, and which of them are real."""
    tokens = torch.randint(1, ENTRIES, (len(lengths), max(lengths)), generator=generator("texts", *lengths))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~real, END), real


def nothing(count: int) -> tuple[Tensor, Tensor]:
    """The empty sources of texts, and their lengths."""
    return torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)


# Initial values.


def test_initial_deviations_are_those_of_the_authors_code_with_scaled_residual_outputs() -> None:
    torch.manual_seed(0)
    model = build_model(vocabulary=400, width=96, layers=4, feedforward=384, longest=400)
    block = model.decoder.blocks[3]
    scaled = 0.02 / math.sqrt(8)
    expected = {
        model.embedding.weight: 0.02,
        model.positions.table.weight: 0.01,
        block.attention.in_proj.weight: 0.02,
        block.attention.out_proj.weight: scaled,
        block.feed_forward.expand.weight: 0.02,
        block.feed_forward.contract.weight: scaled,
    }
    for parameter, std in expected.items():  # of 9,216 numbers or more: within 5 standard errors
        assert float(parameter.detach().std()) == pytest.approx(std, rel=0.04)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == float(name.endswith("norm.weight"))).all(), name


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
    ],
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(preset: str, count: int) -> None:
    """124M, 355M, 774M and 1.5B; counted by hand from the sizes in table 2 of the paper."""
    recipe = configure("train", [f"model={preset}"])["model"]
    width, layers, entries, longest = recipe["width"], recipe["layers"], 50257, 1024
    attention, feed_forward = 4 * (width * width + width), 8 * width * width + 5 * width
    assert (entries + longest) * width + layers * (attention + feed_forward + 4 * width) + 2 * width == count
    with torch.device("meta"):
        model = build(recipe, vocabulary=entries)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_dropout_applies_to_the_embedded_tokens_the_attention_and_every_sublayers_output() -> None:
    model = build_model(dropout=0.5, attention_dropout=0.25).train()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p == 0.5:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    tokens, _ = texts([5, 3])
    model(tokens)
    names = [f"decoder.blocks.{i}.residuals.{j}.dropout" for i in range(LAYERS) for j in range(2)]
    assert calls == dict.fromkeys(["dropout", *names], 1)
    assert {block.attention.dropout for block in model.decoder.blocks} == {0.25}


# Invariances.


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_padding_and_the_rest_of_the_batch_change_nothing(side: str) -> None:
    model, lengths = randomised(), [6, 1, 3, 9]
    tokens, real = texts(lengths)
    if side == "left":
        rows = [tokens[i].roll(9 - n) for i, n in enumerate(lengths)]
        tokens, real = torch.stack(rows), real.flip(1)
    together = model(tokens, real)
    for i, length in enumerate(lengths):
        alone = model(tokens[i][real[i]][None])
        assert alone.shape == (1, length, ENTRIES)
        torch.testing.assert_close(together[i][real[i]], alone[0], **EXACT)
    other = model(tokens.masked_fill(~real, 7), real)
    torch.testing.assert_close(other[real], together[real], **EXACT)
    if side == "right":
        torch.testing.assert_close(model(tokens)[real], together[real], **EXACT)


@torch.no_grad()
def test_a_token_changes_no_logits_before_it_and_all_from_it_on() -> None:
    model, (tokens, _) = randomised(), texts([8, 8])
    before = model(tokens)
    for n in range(8):
        changed = tokens.clone()
        changed[:, n] = 1 + changed[:, n] % (ENTRIES - 1)
        differs = (model(changed) - before).abs().amax(-1) > 1e-6
        assert not differs[:, :n].any() and differs[:, n:].all()


@torch.no_grad()
def test_logits_of_evaluation_are_computed_in_full_precision_under_autocast() -> None:
    """The hidden states are still those of bf16, so both logits are one product apart from them."""
    model, (tokens, _) = randomised(torch.float32), texts([8, 5])
    with torch.autocast("cpu", torch.bfloat16):
        generated = model.step(model.encode(torch.zeros(2, 0), torch.zeros(2)), tokens)
        evaluated, trained = model(tokens), model.train()(tokens)
    assert (generated.dtype, evaluated.dtype, trained.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    exact = model(tokens)
    assert 0 < (evaluated - exact).norm() < 0.05 * exact.norm()


# With a cache and without.


class Uncached:
    """The model without its cache: every step passes all tokens so far through `forward`."""

    def __init__(self, model: Gpt):
        self.model = model

    def encode(self, source: Tensor, lengths: Tensor) -> list[Tensor]:
        return [source]

    def step(self, state: list[Tensor], tokens: Tensor) -> Tensor:
        state[0] = torch.cat([state[0], tokens if tokens.ndim == 2 else tokens[:, None]], 1)
        return self.model(state[0])[:, -1]

    def reorder(self, state: list[Tensor], rows: Tensor) -> list[Tensor]:
        return [state[0][rows]]


@torch.no_grad()
@pytest.mark.parametrize("given", [1, 2, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_cached_steps_give_the_logits_of_the_whole_pass(given: int, dtype: torch.dtype, tolerance: float) -> None:
    model, (tokens, _) = randomised(dtype), texts([12, 12, 12])
    state = model.encode(*nothing(3))
    logits = [model.step(state, tokens[:, 0] if given == 1 else tokens[:, :given])]
    logits += [model.step(state, tokens[:, n]) for n in range(given, 12)]
    expected = model(tokens)[:, given - 1 :]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("given", [1, 5])
def test_hypotheses_may_be_reordered_repeated_and_omitted(given: int) -> None:
    """One to four random hypotheses of each text, many with the same parent; some texts are removed."""
    model, rng = randomised(), generator("hypotheses")
    uncached = Uncached(model)
    count, width = 5, 1
    tokens = torch.randint(ENTRIES, (count, given), generator=rng)
    tokens = tokens[:, 0] if given == 1 else tokens
    state, expected_state = model.encode(*nothing(count)), uncached.encode(*nothing(count))
    for n in range(10):
        expected = uncached.step(expected_state, tokens)
        torch.testing.assert_close(model.step(state, tokens), expected, **EXACT)
        remaining = torch.arange(count)
        if n in (3, 6):
            remaining = remaining[torch.randperm(count, generator=rng)[:-1].sort().values]
        new_width = int(torch.randint(1, 5, (), generator=rng))
        parents = torch.randint(width, (len(remaining), new_width), generator=rng)
        rows = (remaining[:, None] * width + parents).flatten()
        state, expected_state = model.reorder(state, rows), uncached.reorder(expected_state, rows)
        count, width = len(remaining), new_width
        tokens = torch.randint(ENTRIES, (count * width,), generator=rng)
    assert count == 3


@torch.no_grad()
def test_texts_in_another_order_have_their_own_caches() -> None:
    model, (tokens, _) = randomised(), texts([6, 6, 6])
    state = model.encode(*nothing(3))
    model.step(state, tokens[:, :5])
    order = torch.tensor([2, 0, 1])
    logits = model.step(model.reorder(state, order), tokens[order, 5])
    torch.testing.assert_close(logits, model(tokens[order])[:, -1], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("method", SEARCHES)
def test_a_generated_text_depends_neither_on_the_cache_nor_on_its_batch(method: str) -> None:
    model, options = randomised(), SEARCHES[method]
    prompts = [[3, 4, 5], [6], [7, 8, 9], [10, 11], [12]]
    ids = [10 + i for i in range(5)]
    answers = decode(model, *nothing(5), options, SPECIAL, ids, prompts)
    uncached = decode(Uncached(model), *nothing(5), options, SPECIAL, ids, prompts)
    alone = [decode(model, *nothing(1), options, SPECIAL, [ids[i]], [prompts[i]])[0] for i in range(5)]
    for others in (uncached, alone):
        for a, b in zip(itertools.chain(*answers), itertools.chain(*others), strict=True):
            assert a.tokens == b.tokens and a.score == pytest.approx(b.score, abs=1e-10)
    assert len({tuple(answer.tokens) for answer in itertools.chain(*answers)}) > 2


@torch.no_grad()
def test_scores_of_given_texts_are_sums_of_the_log_probabilities_of_forward() -> None:
    model, (tokens, _) = randomised(), texts([7, 7])
    tokens[:, -1] = END
    prompts = [[5, 6], [7, 8]]
    scores = score(model, *nothing(2), tokens, torch.tensor([7, 7]), SPECIAL, prompts)
    logs = model(torch.cat([torch.tensor(prompts), tokens], 1)[:, :-1]).log_softmax(-1)[:, 1:]
    expected = logs.gather(2, tokens[..., None]).sum((1, 2))
    assert scores == [(pytest.approx(float(total), abs=1e-10), 7) for total in expected]


@torch.no_grad()
def test_a_prompt_is_stored_once_for_all_its_hypotheses() -> None:
    model = randomised()
    state = model.encode(*nothing(2))
    model.step(state, torch.tensor([[1, 2, 3], [4, 5, 6]]))
    state = model.reorder(state, torch.tensor([0, 0, 0, 1, 1, 1]))
    model.step(state, torch.tensor([4, 5, 6, 7, 8, 9]))
    assert len(state.caches) == LAYERS and state.tokens == 4
    for cache in state.caches:
        assert [tuple(tensor.shape) for tensor in cache.own.content()] == [(2, HEADS, 3 + 3, WIDTH // HEADS)] * 2


def test_layers_hold_every_parameter_once() -> None:
    model = build_model()
    for name, _ in model.named_parameters():
        groups = [g for g in model.layers() if any(name == p or name.startswith(f"{p}.") for p in g)]
        assert len(groups) == 1, name


# Mistakes.


def test_mistakes_are_refused_with_the_key_to_change() -> None:
    with pytest.raises(UserError, match=r"model.width=16 must be divisible by model.heads=5"):
        build_model(heads=5)
    model = randomised()
    tokens = torch.ones(1, LONGEST + 1, dtype=torch.int64)
    assert model(tokens[:, 1:]).shape == (1, LONGEST, ENTRIES)
    with pytest.raises(UserError, match=r"a text has 25 tokens, more than model.longest=24, the context"):
        model(tokens)
    with pytest.raises(UserError, match=r"a text has 25 tokens"):
        model.step(model.encode(*nothing(1)), tokens)
    state = model.encode(*nothing(1))
    model.step(state, tokens[:, 1:])
    with pytest.raises(UserError, match=r"a prompt and its continuation have 25 tokens, more than model.longest=24"):
        model.step(state, tokens[:, 0])
