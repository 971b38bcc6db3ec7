"""A decoder-only model of Stack and learned positions against transformers' GPT-2, with random weights."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from common.machine.seeds import generator
from common.nn import attention
from common.nn.blocks import BlockCache, BlockOptions, Stack
from common.nn.linear import Tied
from common.nn.positions import Learned1d

transformers = pytest.importorskip("transformers")

VOCABULARY, WIDTH, HEADS, LAYERS, LONGEST = 97, 48, 4, 3, 32
EXACT = {"rtol": 0, "atol": 1e-10}  # float64, three blocks with logits of size ten
OUR_NAMES = {
    "transformer.wte.": "embedding.",
    "transformer.wpe.": "positions.table.",
    "transformer.ln_f.": "decoder.norm.",
    "transformer.h.": "decoder.blocks.",
    "ln_1.": "residuals.0.norm.",
    "ln_2.": "residuals.1.norm.",
    "attn.c_attn.": "attention.in_proj.",
    "attn.c_proj.": "attention.out_proj.",
    "mlp.c_fc.": "feed_forward.expand.",
    "mlp.c_proj.": "feed_forward.contract.",
}


class LanguageModel(nn.Module):
    """Tokens to logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), Learned1d(WIDTH, LONGEST)
        options = BlockOptions(
            width=WIDTH,
            heads=HEADS,
            feedforward=4 * WIDTH,
            pre_norm=True,
            activation=partial(nn.GELU, approximate="tanh"),
        )
        self.decoder = Stack(options, layers=LAYERS, final_norm=True)
        self.output = Tied(self.embedding)

    def forward(self, tokens: Tensor, caches: list[BlockCache] | None = None, real: Tensor | None = None) -> Tensor:
        """Tokens (B, N), real (B, M) False where a prompt is padded on its left -> logits (B, N, V)."""
        start = caches[0].own.length if caches else 0
        padding = None if real is None else (~real).sum(1)
        x = self.embedding(tokens) + self.positions(tokens.shape[1], start, padding)
        may_look = None if real is None else real[:, None, None]
        return self.output(self.decoder(x, causal=True, may_look=may_look, caches=caches))


def our_name(name: str) -> str:
    for theirs, ours in OUR_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def transposed(name: str, tensor: Tensor) -> Tensor:
    """Their matrices are (in, out)."""
    return tensor.t() if name.endswith("weight") and ".c_" in name else tensor


@pytest.fixture(params=["materialised", "fused"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[LanguageModel, nn.Module]:
    """Both with the same random weights, for both implementations of attention."""
    if request.param == "fused":
        monkeypatch.setattr(attention, "MAX_MATERIALISED_WEIGHTS", 0)
    else:
        monkeypatch.setattr(attention, "_FUSED_INFERENCE_DTYPES", ())
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    dimensions = {"vocab_size": VOCABULARY, "n_positions": LONGEST, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    config = transformers.GPT2Config(**dimensions, **drop, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    rng = generator("gpt2")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2, generator=rng)
    ours = LanguageModel().double().eval()
    tensors = {our_name(name): transposed(name, value).contiguous() for name, value in theirs.named_parameters()}
    ours.load_state_dict(tensors)
    return ours, theirs


def words(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=generator("words", *shape))


def test_logits_and_all_gradients_are_those_of_transformers(pair: tuple[LanguageModel, nn.Module]) -> None:
    ours, theirs = pair
    tokens = words(3, 20)
    logits, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, **EXACT)
    direction = torch.randn(logits.shape, dtype=logits.dtype, generator=generator("direction"))
    logits.backward(direction)
    expected.backward(direction)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    compared = 0
    for name, parameter in theirs.named_parameters():
        expected_gradient = transposed(name, parameter.grad)
        assert expected_gradient.any()
        torch.testing.assert_close(gradients[our_name(name)], expected_gradient, rtol=1e-10, atol=1e-9)
        compared += 1
    assert compared == len(gradients)


@torch.no_grad()
def test_a_prompt_a_chunk_and_single_tokens_through_a_cache_are_one_whole_pass(
    pair: tuple[LanguageModel, nn.Module],
) -> None:
    ours, theirs = pair
    tokens = words(3, 20)
    caches = ours.decoder.caches()
    logits = torch.cat([ours(piece, caches) for piece in tokens.split([7, 5, *[1] * 8], dim=1)], dim=1)
    torch.testing.assert_close(logits, ours(tokens), **EXACT)
    torch.testing.assert_close(logits, theirs(tokens).logits, **EXACT)
    assert {cache.own.length for cache in caches} == {20} and {cache.memory for cache in caches} == {None}


@torch.no_grad()
@pytest.mark.parametrize("padding", [[0, 0, 0], [0, 2, 4]], ids=["equal", "left-padded"])
def test_greedy_tokens_are_those_of_generate(pair: tuple[LanguageModel, nn.Module], padding: list[int]) -> None:
    ours, theirs = pair
    prompts, count = words(3, 6), 15
    real = torch.arange(6) >= torch.tensor(padding)[:, None]  # (B, 6)
    expected = theirs.generate(
        prompts, attention_mask=real.long(), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    caches, tokens, new = ours.decoder.caches(), prompts, prompts
    for _ in range(count):
        new = _next_tokens(ours, new, caches, real)
        tokens, real = torch.cat([tokens, new], 1), torch.cat([real, torch.ones(3, 1, dtype=torch.bool)], 1)
    assert torch.equal(tokens, expected)


def _next_tokens(model: LanguageModel, tokens: Tensor, caches: list[BlockCache], real: Tensor) -> Tensor:
    """The likeliest next token of each row, (B, 1)."""
    return model(tokens, caches, real)[:, -1].argmax(-1, keepdim=True)


def test_left_padded_prompts_have_the_logits_of_transformers_and_of_each_alone(
    pair: tuple[LanguageModel, nn.Module],
) -> None:
    ours, theirs = pair
    tokens, padding = words(3, 12), torch.tensor([0, 3, 7])
    real = torch.arange(12) >= padding[:, None]
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    logits = ours(tokens, real=real)
    expected = theirs(tokens, attention_mask=real.long(), position_ids=positions).logits
    torch.testing.assert_close(logits[real], expected[real], **EXACT)
    assert logits.isfinite().all(), "also where everything is padding"
    for row, count in enumerate(padding):
        torch.testing.assert_close(logits[row, count:], ours(tokens[row : row + 1, count:])[0], **EXACT)


def test_a_sequence_longer_than_the_positions_is_refused(pair: tuple[LanguageModel, nn.Module]) -> None:
    ours, _ = pair
    with pytest.raises(UserError, match="33 tokens does not fit 32 learned positions"):
        ours(words(1, LONGEST + 1))
    caches = ours.decoder.caches()
    ours(words(1, LONGEST), caches)
    with pytest.raises(UserError, match="33 tokens"):
        ours(words(1, 1), caches)
