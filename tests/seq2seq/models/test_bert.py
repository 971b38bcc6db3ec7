"""BERT: sizes as published, padding and other texts change nothing, and mistakes end in one sentence."""

import pytest
import torch
from berts import SHAPE, bert, classifier

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from seq2seq.models.bert import INITIAL_STD, Bert, BertBlockOptions


@pytest.mark.parametrize(
    ("name", "vocabulary", "parameters"), [("bert_base", 30_522, 109_514_298), ("roberta_base", 50_265, 124_697_433)]
)
def test_the_published_models_have_the_published_number_of_parameters(name, vocabulary, parameters):
    """The numbers are those of transformers' BertForMaskedLM and RobertaForMaskedLM."""
    with torch.device("meta"):
        model = build(configure("train", [f"model={name}"])["model"], vocabulary=vocabulary)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator("texts")
    tokens = torch.randint(40, (3, 9), generator=rng)
    real = torch.arange(9) < torch.tensor([[9], [4], [1]])
    return tokens, real


@torch.no_grad()
def test_padding_and_the_other_texts_of_a_batch_change_nothing():
    tokens, real = texts()
    for model in (bert(), classifier()):
        batch = model(tokens, real)
        other = model(tokens.masked_fill(~real, 7), real)
        for i, length in enumerate((9, 4, 1)):
            alone = model(tokens[i : i + 1, :length])[0]
            of_batch = batch[i][:length] if batch.ndim == 3 else batch[i]
            of_other = other[i][:length] if batch.ndim == 3 else other[i]
            torch.testing.assert_close(of_batch, alone, rtol=0, atol=1e-5)  # fp32 sums in another order
            torch.testing.assert_close(of_other, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_token_depends_on_the_tokens_of_both_sides():
    tokens, model = texts()[0][:1], bert()
    changed = [tokens.clone(), tokens.clone()]
    changed[0][0, 0] += 1
    changed[1][0, -1] = (tokens[0, -1] + 1) % 40
    for other in changed:
        assert ((model(other) - model(tokens)).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_selected_tokens_have_the_logits_that_they_have_among_all():
    tokens, real = texts()
    model, selected = bert(), torch.tensor([1, 8, 10, 18])
    expected = model(tokens, real).flatten(0, 1)[selected]
    torch.testing.assert_close(model(tokens, real, selected), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_first_positions_of_roberta_are_unused():
    tokens = texts()[0]
    model = bert(first_position=2)
    expected = model(tokens)
    assert len(model.embeddings.positions.weight) == SHAPE["longest"] + 2
    model.embeddings.positions.weight[:2] = torch.nan
    assert torch.equal(model(tokens), expected)
    model.embeddings.positions.weight[2] = torch.nan
    assert model(tokens).isnan().all()


@torch.no_grad()
def test_types_of_texts_are_zero_unless_they_are_given():
    tokens, model = texts()[0], bert()
    zeros = torch.zeros_like(tokens)
    torch.testing.assert_close(model(tokens, None, None, zeros), model(tokens), rtol=0, atol=1e-6)
    assert not torch.allclose(model(tokens, None, None, zeros + 1), model(tokens), atol=1e-2)
    assert bert(token_types=0).embeddings.types is None


def test_initial_matrices_lie_within_two_standard_deviations():
    torch.manual_seed(0)
    blocks = BertBlockOptions(dropout=0.1, attention_dropout=0.1, norm_eps=1e-12)
    model = Bert(vocabulary=500, **{**SHAPE, "width": 64}, blocks=blocks)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert parameter.abs().max() <= 2 * INITIAL_STD, name
        elif name.endswith("bias"):
            assert not parameter.any(), name
    matrix = model.embeddings.tokens.weight
    assert matrix.std().item() == pytest.approx(0.88 * INITIAL_STD, rel=0.02)  # of a normal cut at 2 sigma


def test_mistakes_end_in_one_sentence():
    with pytest.raises(UserError, match=r"a text has 13 tokens, more than model.longest=12"):
        bert()(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(UserError, match=r"model.width=16 must be divisible by model.heads=3"):
        bert(heads=3)


def test_layers_name_every_parameter_once():
    for model in (bert(), classifier()):
        prefixes = [prefix for layer in model.layers() for prefix in layer]
        for name, _ in model.named_parameters():
            matching = [prefix for prefix in prefixes if name == prefix or name.startswith(f"{prefix}.")]
            assert len(matching) == 1, name
