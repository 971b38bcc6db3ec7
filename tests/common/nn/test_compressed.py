"""Removing heads and neurons equals zeroing their weights, in float64; factors of full rank change nothing."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.config.check import build_model
from common.config.compose import configure
from common.errors import UserError
from common.machine.seeds import generator
from common.nn import compressed
from common.nn.blocks import FeedForward
from common.nn.linear import Factored, FactoredProjections, Linear, opened
from common.train import footprint

Call = Callable[[nn.Module], Tensor]
EXACT = {"rtol": 0, "atol": 1e-9}  # float64, outputs of size ten
SMALL = {
    "vit": ["model.width=16", "model.heads=4", "model.feedforward=24", "model.layers=2"],
    "detr": [
        *("model.width=16", "model.heads=4", "model.feedforward=24", "model.queries=5", "model.encoder_layers=1"),
        *("model.decoder_layers=2", "model.pre_norm=false"),
    ],
    "seq2seq": [
        *("model.width=16", "model.heads=4", "model.feedforward=24", "model.encoder_layers=1"),
        "model.decoder_layers=2",
    ],
}
WINGS = [*SMALL]


class Arguments:
    """A task with the arguments of each wing's models."""

    offered = ("classes", "logits", "channels", "image_size", "vocabularies", "joint")

    def model_arguments(self) -> dict[str, Any]:
        return {
            **{"classes": 10, "logits": 11, "channels": 1, "image_size": (8, 8)},
            **{"vocabularies": (50, 50), "joint": True},
        }


def section(wing: str, **sizes: Any) -> dict[str, Any]:
    """The section `model` of a config with these compressed sizes."""
    config = configure("train", [f"model={wing}", *SMALL[wing]])["model"]
    return {**config, "compressed": {"heads": {}, "neurons": {}, "ranks": {}, **sizes}} if sizes else config


def make_model(wing: str, **sizes: Any) -> nn.Module:
    """A model in float64 with random parameters, none of them zero."""
    model: nn.Module = build_model(section(wing, **sizes), Arguments()).double().eval()
    rng = generator("compressed", wing)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.1)
    return model


def outputs(model: nn.Module, wing: str) -> Tensor:
    """The outputs for random inputs with padding; a translator's also token by token, with its caches."""
    rng = generator("inputs")
    with torch.no_grad():
        if wing == "vit":
            return model(torch.randn(3, 1, 8, 8, generator=rng, dtype=torch.float64))
        if wing == "detr":
            pixels = torch.randn(2, 3, 64, 64, generator=rng, dtype=torch.float64)
            answers = model(pixels, torch.tensor([[64, 64], [40, 64]]))
            return torch.cat([torch.cat([*layer.values()], -1) for layer in answers])
        source, target = (torch.randint(4, 50, (3, length), generator=rng) for length in (7, 5))
        lengths = torch.tensor([7, 3, 1])
        whole, state = model(source, lengths, target), model.encode(source, lengths)
        steps = torch.stack([model.step(state, tokens) for tokens in target.unbind(1)], dim=1)
        torch.testing.assert_close(steps, whole, **EXACT)
        return whole


@pytest.mark.parametrize("wing", WINGS)
def test_removing_heads_equals_zeroing_their_columns_of_the_output_map(wing: str) -> None:
    dense = make_model(wing)
    zeroed, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    kept = [[0, 2, 3], [1], [0, 1, 3], [2, 3], [1, 2]]
    for heads, (name, attention) in zip(kept, compressed.attentions(pruned).items(), strict=False):
        columns = [head * 4 + i for head in {0, 1, 2, 3} - {*heads} for i in range(4)]
        with torch.no_grad():
            zeroed.get_submodule(name).out_proj.weight[:, columns] = 0
        compressed.keep_heads(attention, heads)
        assert (attention.heads, attention.in_proj.weight.shape) == (len(heads), (12 * len(heads), 16))
    expected = outputs(zeroed, wing)
    assert (expected - outputs(dense, wing)).abs().max() > 1e-3
    torch.testing.assert_close(outputs(pruned, wing), expected, **EXACT)


@pytest.mark.parametrize("wing", WINGS)
def test_removing_neurons_equals_zeroing_their_columns_of_the_second_map(wing: str) -> None:
    dense = make_model(wing)
    zeroed, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    for number, (name, feed_forward) in enumerate(compressed.feed_forwards(pruned).items()):
        kept = [*range(number, 24, 2)]
        with torch.no_grad():
            zeroed.get_submodule(name).contract.weight[:, [i for i in range(24) if i not in kept]] = 0
        compressed.keep_neurons(feed_forward, kept)
        assert compressed.neurons_of(feed_forward) == len(kept)
    expected = outputs(zeroed, wing)
    assert (expected - outputs(dense, wing)).abs().max() > 1e-3
    torch.testing.assert_close(outputs(pruned, wing), expected, **EXACT)


def factorise_all(model: nn.Module, rank: int | None = None) -> dict[str, int]:
    """Replace all maps by the factors of their SVD; returns the ranks."""
    ranks = {}
    for name, linear in compressed.linear_maps(model).items():
        u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        ranks[name] = rank or len(s)
        compressed.factorise(model, name, vh[: ranks[name]], (u * s)[:, : ranks[name]])
    return ranks


@pytest.mark.parametrize("wing", WINGS)
def test_factors_of_full_rank_give_the_same_outputs_and_those_of_low_rank_others(wing: str) -> None:
    dense = make_model(wing)
    full, low = copy.deepcopy(dense), copy.deepcopy(dense)
    factorise_all(full)
    factorise_all(low, 3)
    assert not compressed.linear_maps(full), "factors are not factored again"
    torch.testing.assert_close(outputs(full, wing), outputs(dense, wing), **EXACT)
    assert (outputs(low, wing) - outputs(dense, wing)).abs().max() > 1e-3


@pytest.mark.parametrize("wing", WINGS)
def test_a_config_builds_the_sizes_that_pruning_left(wing: str) -> None:
    """Heads and neurons are removed from a model that is already factored, as a second compression would."""
    pruned = make_model(wing)
    ranks = factorise_all(pruned, 5)
    heads = {name: 1 + number % 3 for number, name in enumerate(compressed.attentions(pruned))}
    neurons = {name: 7 + number for number, name in enumerate(compressed.feed_forwards(pruned))}
    for name, attention in compressed.attentions(pruned).items():
        compressed.keep_heads(attention, range(4 - heads[name], 4))
    for name, feed_forward in compressed.feed_forwards(pruned).items():
        compressed.keep_neurons(feed_forward, range(neurons[name]))
    built = make_model(wing, heads=heads, neurons=neurons, ranks=ranks)
    built.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(outputs(built, wing), outputs(pruned, wing), **EXACT)
    measured = footprint.measure(section(wing, heads=heads, neurons=neurons, ranks=ranks), Arguments())  # type: ignore[arg-type]
    elements = sum(tensor.numel() for tensor in (*built.parameters(), *built.buffers()))
    assert measured is not None and measured.all == elements, "also on the device meta"
    torch.testing.assert_close(outputs(opened(built), wing), outputs(built, wing), **EXACT)


def test_a_model_without_compressed_sizes_keeps_its_modules() -> None:
    torch.manual_seed(0)
    plain = build_model(section("vit"), Arguments())
    torch.manual_seed(0)
    same = build_model({**section("vit"), "compressed": None}, Arguments())
    assert [*map(type, plain.modules())] == [*map(type, same.modules())]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


def test_the_type_the_device_and_the_frozen_state_of_a_map_are_kept() -> None:
    model = make_model("vit").bfloat16()
    feed_forward = next(module for module in model.modules() if isinstance(module, FeedForward))
    feed_forward.requires_grad_(False)
    compressed.keep_neurons(feed_forward, range(5))
    linear = feed_forward.expand
    assert linear.weight.dtype == torch.bfloat16 and not linear.weight.requires_grad and not linear.training
    assert type(linear) is Linear and type(linear.weight) is type(model.head.weight)


def test_only_attentions_without_parameters_of_their_heads_are_listed() -> None:
    """Swin has a table of positions for each head, deformable attention has offsets."""
    swin = build_model(configure("train", ["model=swin"])["model"], Arguments())
    assert not compressed.attentions(swin) and compressed.feed_forwards(swin) and compressed.linear_maps(swin)
    deformable = build_model(configure("train", ["model=deformable_detr"])["model"], Arguments())
    assert {name.rpartition(".")[2] for name in compressed.attentions(deformable)} == {"attention"}
    assert all(name.startswith("decoder") for name in compressed.attentions(deformable))


@pytest.mark.parametrize("linear", [Linear(6, 9), Linear(6, 9, bias=False)])
def test_a_rank_saves_if_its_factors_are_smaller(linear: Linear) -> None:
    count = linear.weight.numel()
    for rank in range(1, 7):
        assert compressed.saves(linear, rank) == (
            sum(p.numel() for p in Factored(6, 9, rank, False).parameters()) < count
        )


def test_factored_projections_compute_only_the_rows_that_are_asked_for() -> None:
    module = FactoredProjections(6, 12, 4)
    x = torch.randn(2, 3, 6, generator=generator("rows"))
    torch.testing.assert_close(module(x, rows=slice(4, 12)), module(x)[..., 4:])


MISTAKES = [
    ({"heads": {"encoder.blocks.9.attention": 2}}, r"model.compressed.heads names encoder.blocks.9.attention, which"),
    (
        {"neurons": {"encoder.blocks.0.attention": 2}},
        "model.compressed.neurons names encoder.blocks.0.attention, which",
    ),
    ({"ranks": {"head": 2}}, "model.compressed.ranks names head, which this model does not have"),
    (
        {"heads": {"encoder.blocks.0.attention": 4}},
        r"model.compressed.heads.encoder.blocks.0.attention=4 is not below 4",
    ),
]


@pytest.mark.parametrize(("sizes", "message"), MISTAKES)
def test_sizes_that_do_not_fit_the_model_end_in_one_sentence(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(section("vit", **sizes), Arguments())
