"""Queries, keys and values, joined and split."""

import pytest
import torch

from common.errors import UserError
from common.weights.projections import join, split


def projections(attention: str, *leaves: str) -> dict[str, torch.Tensor]:
    shapes = {"weight": (4, 3), "bias": (4,)}
    names = [(part, leaf) for leaf in leaves for part in "vkq"]
    return {f"{attention}.{p}.{leaf}": torch.full(shapes[leaf], float("qkv".index(p))) for p, leaf in names}


def test_rows_are_those_of_queries_keys_and_values_in_this_order():
    joined = join(
        projections("blocks.0.attention", "weight", "bias") | projections("blocks.0.cross_attention", "weight")
    )
    assert {*joined} == {
        "blocks.0.attention.in_proj.weight",
        "blocks.0.attention.in_proj.bias",
        "blocks.0.cross_attention.in_proj.weight",
    }
    assert joined["blocks.0.attention.in_proj.bias"].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert joined["blocks.0.cross_attention.in_proj.weight"][:, 2].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_other_tensors_are_unchanged():
    names = ("attention.q_norm.weight", "attention.out_proj.weight", "attention.in_proj.weight", "q.weight")
    tensors = {name: torch.zeros(3, 1) for name in names}
    assert join(tensors) == tensors


def test_splitting_and_joining_is_exact():
    tensors = {
        f"{x}attention.in_proj.{leaf}": torch.randn(12, 3) for x in ("", "cross_") for leaf in ("weight", "bias")
    }
    tensors["attention.out_proj.weight"] = torch.randn(4, 4)
    parts = split(tensors)
    assert len(parts) == 13
    keys, rows = parts["cross_attention.k.bias"], tensors["cross_attention.in_proj.bias"][4:]
    assert keys.data_ptr() == rows.data_ptr(), "views"
    joined = join(parts)
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors.items())


def test_where_one_of_three_is_missing_none_is_joined():
    tensors = projections("attention", "weight", "bias")
    tensors.pop("attention.k.weight")
    assert [*join(tensors)] == ["attention.in_proj.bias"]


def test_zero_biases_are_added_only_where_there_is_none():
    tensors = projections("0.attention", "weight") | projections("1.attention", "weight", "bias")
    tensors |= {"2.attention.in_proj.weight": torch.ones(6, 2)} | projections("3.attention", "weight")
    tensors["3.attention.q.bias"] = torch.ones(4)
    assert not any("0.attention.in_proj.bias" in name for name in join(tensors))
    joined = join(tensors, zero_biases=True)
    assert torch.equal(joined["0.attention.in_proj.bias"], torch.zeros(12))
    assert joined["1.attention.in_proj.bias"].any()
    assert torch.equal(joined["2.attention.in_proj.bias"], torch.zeros(6))
    assert "3.attention.in_proj.bias" not in joined, "a bias of queries alone is left incomplete"


def test_a_part_that_is_not_of_floats_is_refused_instead_of_converted():
    parts = {f"attention.{part}.weight": torch.ones(2, 2) for part in "qkv"}
    with pytest.raises(UserError, match=r"holds attention\.k\.weight as torch\.bool"):
        join({**parts, "attention.k.weight": torch.ones(2, 2, dtype=torch.bool)})
