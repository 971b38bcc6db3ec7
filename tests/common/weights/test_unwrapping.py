"""Foreign weights without wrappers, prefixes and half precision."""

import pytest
import torch

from common.errors import UserError
from common.weights.unwrapping import floats, unwrap

WEIGHT, OTHER_WEIGHT = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("content", "left_out"),
    [
        ({"a": WEIGHT}, []),
        ({"a": WEIGHT, "epoch": 3}, ["epoch"]),
        ({"model": {"a": WEIGHT, "version": "1"}, "epoch": 3}, ["version"]),
        ({"model": {"lr": 0.1}, "state_dict": {"a": WEIGHT}}, []),
        ({"state_dict": {"a": OTHER_WEIGHT}, "model": {"a": WEIGHT}}, ["state_dict"]),
        ({"module.a": WEIGHT}, []),
        ({"model": {"module._orig_mod.a": WEIGHT}}, []),
        ({"model": None, "a": WEIGHT}, ["model"]),
    ],
    ids=str,
)
def test_weights_are_unwrapped_and_other_keys_listed(content, left_out):
    tensors, names = unwrap(content, ("model", "state_dict"), "a file")
    assert tensors == {"a": WEIGHT} and names == left_out


def test_prefixes_are_removed_at_the_beginning_only():
    assert [*unwrap({"my.module.a": WEIGHT, "modules.b": OTHER_WEIGHT}, (), "a file")[0]] == [
        "my.module.a",
        "modules.b",
    ]


@pytest.mark.parametrize(
    "content", [{}, {"model": {}}, {"epoch": 3, "model": {"lr": 0.1}}, {"student": {"a": WEIGHT}}], ids=str
)
def test_a_file_without_weights_is_refused_and_supported_files_are_named(content):
    message = (
        r'^The checkpoint holds no weights, bare or under "model", "a" or "b"; give a ViT, or a file that this pro'
    )
    with pytest.raises(UserError, match=message):
        unwrap(content, ("model", "a", "b"), "a ViT")
    with pytest.raises(UserError, match='under "model"; give a ViT'):
        unwrap(content, ("model",), "a ViT")


def test_half_types_become_float32_and_others_stay():
    tensors = {
        "half": torch.tensor([0.1]).half(),
        "bfloat16": torch.tensor([0.1]).bfloat16(),
        "double": torch.zeros(1, dtype=torch.float64),
        "count": torch.zeros(1, dtype=torch.int64),
    }
    converted = floats(tensors)
    assert [converted[name].dtype for name in tensors] == [torch.float32, torch.float32, torch.float64, torch.int64]
    assert all(torch.equal(converted[name], tensor.to(converted[name].dtype)) for name, tensor in tensors.items())
