"""Token embeddings are those of nn.Embedding; those of cut tokens are zero and get no gradient."""

import pytest
import torch
from torch import Tensor, nn

from common.machine.seeds import generator
from common.nn.embedding import TokenEmbedding, cutting

TOKENS = torch.tensor([[3, 0, 5], [5, 1, 1]])
CUT = torch.tensor([[False, True, True], [False, False, True]])


class Model(nn.Module):
    """A model with an embedding in a part of it."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        self.part = nn.ModuleList([embedding])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.part[0](tokens)


@pytest.fixture
def embedding() -> TokenEmbedding:
    torch.manual_seed(0)
    return TokenEmbedding(7, 4)


def test_it_is_an_embedding_with_the_same_values_keys_and_initial_weights(embedding: TokenEmbedding) -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(7, 4)
    assert isinstance(embedding, nn.Embedding) and embedding.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(embedding(TOKENS), plain(TOKENS))
    with cutting(embedding):
        assert torch.equal(embedding(TOKENS), plain(TOKENS)), "ids that are not negative are not cut"


def test_cut_tokens_are_zero_and_get_no_gradient(embedding: TokenEmbedding) -> None:
    factors = torch.randn(2, 3, 4, generator=generator("factors", 0))
    with cutting(embedding):
        x = embedding(torch.where(CUT, ~TOKENS, TOKENS))
    assert torch.equal(x, embedding(TOKENS) * ~CUT[..., None])
    (x * factors).sum().backward()
    expected = torch.zeros(7, 4)
    for b, n in (~CUT).nonzero().tolist():
        expected[TOKENS[b, n]] += factors[b, n]
    torch.testing.assert_close(embedding.weight.grad, expected)


def test_a_token_alone_is_cut_as_in_a_sequence(embedding: TokenEmbedding) -> None:
    """So is a token that a recurrent decoder embeds in its own step."""
    tokens = torch.where(CUT, ~TOKENS, TOKENS)
    with cutting(embedding):
        assert torch.equal(torch.stack([embedding(tokens[:, n]) for n in range(3)], dim=1), embedding(tokens))


def test_negative_ids_are_refused_outside_the_context_even_after_an_error(embedding: TokenEmbedding) -> None:
    model = Model(embedding)
    with pytest.raises(KeyError), cutting(model):
        assert model(~TOKENS).eq(0).all()
        raise KeyError
    with pytest.raises(IndexError):
        model(~TOKENS)


def test_a_compiled_model_distinguishes_the_context(embedding: TokenEmbedding) -> None:
    model = Model(embedding)
    expected = [embedding(TOKENS), embedding(TOKENS) * ~CUT[..., None]]
    model.compile(backend="eager")
    for _ in range(2):
        assert torch.equal(model(TOKENS), expected[0])
        with cutting(model):
            assert torch.equal(model(torch.where(CUT, ~TOKENS, TOKENS)), expected[1])
