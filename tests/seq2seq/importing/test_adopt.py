"""The program that a file comes from, and the refusal of unsupported ones."""

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from seq2seq.importing.adopt import adopt, unwrap


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(4, 4) for name in names}


UNSUPPORTED = {
    "ours": (named("embedding.weight", "encoder.blocks.0.attention.in_proj.weight"), "this program's own, without"),
    "pytorch": (nn.Transformer(4, 1, 1, 1, 4).state_dict(), "is a torch.nn.Transformer and neither a Marian"),
    "t5": (named("encoder.block.0.layer.0.SelfAttention.q.weight"), "is a T5 and neither"),
    "marian's own": (named("Wemb", "encoder_l1_self_Wq"), "is a file of Marian's own; convert it to transformers'"),
    "gpt": (named("transformer.wte.weight"), "is a language model and neither"),
    "vit": (named("patch_embed.proj.weight"), "is a model of images and neither"),
    "anything": (
        named("what.ever"),
        "is something else and neither a Marian of transformers nor a fairseq .*what.ever",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_an_unsupported_file_is_refused_and_its_format_named(tensors, message):
    with pytest.raises(UserError, match=message):
        adopt(tensors, None)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3, "model": {"lr": 0.1}}])
def test_a_file_without_weights_is_refused(content):
    with pytest.raises(UserError, match="holds no weights"):
        adopt(content, None)


def test_wrappers_and_prefixes_are_removed_and_half_types_converted():
    half = torch.ones(2, dtype=torch.bfloat16)
    for content in ({"module.a": half}, {"model": {"_orig_mod.a": half}}, {"state_dict": {"a": half}, "epoch": 1}):
        tensors, left_out = unwrap(content)
        assert tensors["a"].dtype == torch.float32 and [*tensors] == ["a"] and not left_out
    assert unwrap({"a": half, "epoch": 1})[1] == ["epoch"]
