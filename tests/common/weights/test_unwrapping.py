"""Weights out of their wrappers, under plain names, and as floats."""

import pytest
import torch

from common.errors import UserError
from common.weights.unwrapping import floats, unwrap

ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("content", "beside"),
    [
        ({"a": ONE}, []),
        ({"a": ONE, "epoch": 3}, ["epoch"]),
        ({"model": {"a": ONE, "version": "1"}, "epoch": 3}, ["version"]),
        ({"model": {"lr": 0.1}, "state_dict": {"a": ONE}}, []),
        ({"state_dict": {"a": TWO}, "model": {"a": ONE}}, ["state_dict"]),
        ({"module.a": ONE}, []),
        ({"model": {"module._orig_mod.a": ONE}}, []),
        ({"model": None, "a": ONE}, ["model"]),
    ],
    ids=str,
)
def test_weights_come_out_with_what_is_beside_them(content, beside):
    tensors, names = unwrap(content, ("model", "state_dict"), "a file")
    assert tensors == {"a": ONE} and names == beside


def test_a_prefix_is_one_at_the_beginning():
    assert [*unwrap({"my.module.a": ONE, "modules.b": TWO}, (), "a file")[0]] == ["my.module.a", "modules.b"]


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"epoch": 3, "model": {"lr": 0.1}}, {"student": {"a": ONE}}], ids=str
)
def test_a_file_without_weights_is_refused_with_what_is_taken(content):
    sentence = (
        r'^The checkpoint holds no weights, bare or under "model", "a" or "b"; give a ViT, or a file that this pro'
    )
    with pytest.raises(UserError, match=sentence):
        unwrap(content, ("model", "a", "b"), "a ViT")
    with pytest.raises(UserError, match='under "model"; give a ViT'):
        unwrap(content, ("model",), "a ViT")


def test_half_types_become_floats_and_others_stay():
    tensors = {
        "half": torch.tensor([0.1]).half(),
        "bfloat16": torch.tensor([0.1]).bfloat16(),
        "double": torch.zeros(1, dtype=torch.float64),
        "count": torch.zeros(1, dtype=torch.int64),
    }
    raised = floats(tensors)
    assert [raised[name].dtype for name in tensors] == [torch.float32, torch.float32, torch.float64, torch.int64]
    assert all(torch.equal(raised[name], tensor.to(raised[name].dtype)) for name, tensor in tensors.items())
