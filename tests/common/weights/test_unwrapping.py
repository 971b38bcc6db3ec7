"""Foreign weights without wrappers, prefixes and half precision."""

import pytest
import torch

from common.errors import UserError
from common.weights.unwrapping import EMA_KEYS, floats, select_kind, unwrap

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


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": WEIGHT}},
        {"module": {"a": WEIGHT}, "optimizer": {}},
        {"model_state_dict": {"module.a": WEIGHT}},
        {"state_dict": {"net.a": WEIGHT}},
        {"state_dict": {"model._orig_mod.a": WEIGHT}},
        {"net._orig_mod.module.a": WEIGHT},
        {"state_dict": {"model": {"a": WEIGHT}}},
        {"model": {"module": {"a": WEIGHT}}},
    ],
    ids=str,
)
def test_wrappers_of_training_programs_are_known_to_every_importer(content):
    assert unwrap(content, ("model",), "a file")[0] == {"a": WEIGHT}


def test_the_attribute_model_is_removed_on_request_and_if_all_names_begin_with_it():
    whole = {"model.a": WEIGHT, "model.net.b": OTHER_WEIGHT, "criterion.c": WEIGHT}
    assert [*unwrap(whole, (), "a file")[0]] == [*whole]
    assert [*unwrap(whole, (), "a file", ("model", "net"))[0]] == ["a", "net.b", "criterion.c"]
    part = {"model.a": WEIGHT, "head": WEIGHT}
    assert [*unwrap(part, (), "a file", ("model", "net"))[0]] == [*part]


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


@pytest.mark.parametrize("key", EMA_KEYS)
def test_the_requested_kind_of_weights_is_taken_where_a_file_holds_both(key):
    file = {"model": {"a": WEIGHT}, key: {"a": OTHER_WEIGHT}, "args": {"lr": 0.1}}
    averaged, notes = select_kind(file, "ema")
    assert averaged == {"model": {"a": OTHER_WEIGHT}, "args": {"lr": 0.1}} and f'under "{key}"' in notes[0]
    assert select_kind(file, "raw") == ({"model": {"a": WEIGHT}, "args": {"lr": 0.1}}, [])
    unchanged, notes = select_kind(file, "auto")
    assert unchanged == file and notes == [
        f'the file also holds averaged weights under "{key}"; weights=ema takes them'
    ]


@pytest.mark.parametrize("content", [{"a": WEIGHT}, {"model": {"a": WEIGHT}}, {"model": {"a": WEIGHT}, "ema": None}])
def test_averaged_weights_that_a_foreign_file_lacks_are_refused(content):
    with pytest.raises(
        UserError, match=r'^weights=ema, but this file of another program holds no averaged .*"model_ema"'
    ):
        select_kind(content, "ema")
    assert select_kind(content, "raw") == select_kind(content, "auto") == (content, [])


def test_raw_weights_that_a_foreign_file_lacks_are_refused():
    with pytest.raises(UserError, match=r"^weights=raw, but this file holds averaged weights only"):
        select_kind({"state_dict_ema": {"a": WEIGHT}, "epoch": 3}, "raw")
    assert select_kind({"state_dict_ema": {"a": WEIGHT}}, "auto")[1] == []
