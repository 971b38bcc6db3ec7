"""Rename tables: both directions, fields, alternative spellings, and names without a row."""

import pytest
import torch

from common.weights.renaming import Table, identify_format, rename, with_prefixes

NAMES = Table(
    ("cls", "class_token"),
    ("stem.{path}.", "backbone.{path}."),
    ("stem.{path}.running_{statistic}", "backbone.{path}.running_{statistic}"),
    *with_prefixes(
        "{vit.|*.|}layer.{i}.",
        "blocks.{i}.",
        (
            ("attn.{qkv}_proj.", "attention.{qkv}."),
            ("attn.in_proj_", "attention.in_proj."),
            ("{ls1.gamma|gamma_1}", "scale"),
            ("{norm1|layer_norms.0}.", "norm."),
        ),
    ),
)
EQUIVALENTS = {
    "cls": "class_token",
    "stem.layer1.0.bn1.bias": "backbone.layer1.0.bn1.bias",
    "stem.bn1.running_var": "backbone.bn1.running_var",
    "vit.layer.11.attn.k_proj.weight": "blocks.11.attention.k.weight",
    "vit.layer.0.attn.in_proj_bias": "blocks.0.attention.in_proj.bias",
    "vit.layer.0.ls1.gamma": "blocks.0.scale",
    "vit.layer.3.norm1.weight": "blocks.3.norm.weight",
}


@pytest.mark.parametrize(("theirs", "ours"), EQUIVALENTS.items())
def test_a_row_is_read_in_both_directions(theirs, ours):
    assert NAMES.to_ours(theirs) == ours and NAMES.to_theirs(ours) == theirs


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("layer.0.gamma_1", "blocks.0.scale"),
        ("dinov2.layer.0.layer_norms.0.bias", "blocks.0.norm.bias"),
    ],
)
def test_all_spellings_are_read_and_the_first_is_written(theirs, ours):
    assert NAMES.to_ours(theirs) == ours and NAMES.to_theirs(ours) != theirs


@pytest.mark.parametrize(
    "name",
    [
        "clsx",
        "xcls",
        "stem.bn1.num_batches_tracked",
        "stem.weight",
        "vit.layer.one.norm1.weight",
        "vit.layer.0.norm1",
        "vit.layer.0.norm1.scale",
        "vit.layer.0.norm1xweight",
        "vit.layer.0.attn.o_proj.weight",
        "my.vit.layer.0.norm1.weight",
        "layer_norms.0.weight",
    ],
)
def test_a_name_must_match_a_row_as_a_whole(name):
    assert NAMES.to_ours(name) is None


def test_the_first_matching_row_applies():
    names = Table(("head.", "first."), ("head.{path}", "second.{path}"))
    assert names.to_ours("head.weight") == "first.weight" and names.to_ours("head.scale") == "second.scale"


def test_renaming_keeps_the_order_and_records_sources():
    tensors = {name: torch.tensor(float(i)) for i, name in enumerate(reversed(EQUIVALENTS))}
    renamed = rename(tensors, NAMES.to_ours)
    assert [*renamed.tensors] == [EQUIVALENTS[name] for name in tensors]
    assert all(renamed.tensors[EQUIVALENTS[name]] is tensor for name, tensor in tensors.items())
    assert renamed.sources == {ours: theirs for theirs, ours in EQUIVALENTS.items()}
    assert rename(renamed.tensors, NAMES.to_theirs).tensors == tensors
    assert renamed.left_out == renamed.unknown == []


def test_names_without_a_row_are_left_out_or_unknown():
    tensors = {name: torch.zeros(1) for name in ("cls", "epoch", "mask.token", "mask", "cls.more")}
    renamed = rename(tensors, NAMES.to_ours, r"epoch|mask\..*|cls")
    assert [*renamed.tensors] == ["class_token"], "a name with a row is never left out"
    assert renamed.left_out == ["epoch", "mask.token"] and renamed.unknown == ["mask", "cls.more"]


def test_the_first_pattern_in_any_name_identifies_a_file():
    patterns = ((r"^rpn\.", "a detector"), ("layer4", "a ResNet"))
    assert identify_format(["layer4.conv", "rpn.head"], patterns) == "a detector"
    assert identify_format(iter(["x.rpn.head", "layer4.conv"]), patterns) == "a ResNet"
    assert identify_format(["x.rpn.head"], patterns) is None
