"""The translator with BERT's encoder: the same encoder as BERT's, and decoding as in the Transformer."""

from typing import Any

import pytest
import torch
from berts import bert, redrawn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from seq2seq.models.bert import BertBlockOptions

SMALL = ["width=16", "heads=2", "feedforward=24", "encoder_layers=2", "decoder_layers=2", "longest=11"]
SMALL += ["blocks.dropout=0"]


def translator(*changes: str) -> Any:
    keys = [f"model.{key}" for key in (*SMALL, *changes)]
    section = configure("train", ["model=bert_translator", *keys])["model"]
    return redrawn(build(section, vocabularies=(40, 30), joint=False))


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = generator("pairs")
    return (
        torch.randint(5, 40, (3, 7), generator=rng),
        torch.tensor([7, 3, 1]),
        torch.randint(4, 30, (3, 5), generator=rng),
    )


@torch.no_grad()
def test_the_encoder_computes_what_bert_computes_after_its_first_token():
    """The first token of BERT, [CLS], is hidden from the others by a mask, since a source has no such token."""
    blocks = BertBlockOptions(dropout=0.0, attention_dropout=0.0, norm_eps=1e-12)
    masked, model = bert(blocks=blocks), translator()
    shared = {name: tensor for name, tensor in masked.state_dict().items() if name in model.state_dict()}
    model.load_state_dict(shared, strict=False)
    left_out = {"transform.weight", "transform.bias", "transform_norm.weight", "transform_norm.bias", "output_bias"}
    assert masked.state_dict().keys() - shared.keys() == left_out
    source, lengths, _ = batch()
    memory, _ = model._encode(source, lengths)
    tokens = torch.cat([torch.zeros(3, 1, dtype=torch.int64), source], dim=1)
    real = torch.arange(8) < lengths[:, None] + 1
    real[:, 0] = False
    features = masked.features(tokens, real)[:, 1:]
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(memory[row, :length], features[row, :length], rtol=0, atol=1e-5)


@torch.no_grad()
def test_stepwise_logits_are_those_of_teacher_forcing():
    model = translator()
    source, lengths, target = batch()
    expected = model(source, lengths, target)
    state = model.encode(source, lengths)
    for position in range(target.shape[1]):
        logits = model.step(state, target[:, position])
        torch.testing.assert_close(logits, expected[:, position], rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing():
    model = translator()
    source, lengths, target = batch()
    expected = model(source, lengths, target)
    for row, length in enumerate(lengths.tolist()):
        alone = model(source[row : row + 1, :length], lengths[row : row + 1], target[row : row + 1])
        torch.testing.assert_close(alone[0], expected[row], rtol=0, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    model = translator("output_bias=true")
    model(*batch()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_mistakes_end_in_one_sentence():
    with pytest.raises(UserError, match=r"model.blocks.pre_norm=true: the encoder of a masked language model"):
        translator("blocks.pre_norm=true")
    source = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(UserError, match=r"a source sentence has 12 tokens, more than model.longest=11"):
        translator()(source, torch.tensor([12]), source)
