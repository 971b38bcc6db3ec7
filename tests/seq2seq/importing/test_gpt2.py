"""GPT-2 files of transformers and OpenAI give our model's weights with their tokenizer, or are refused."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from seq2seq.importing.gpt2 import adopt
from seq2seq.models.gpt import Gpt, GptBlockOptions
from seq2seq.tokenizers.stored import restore
from tests.gpt2_files import ENTRIES, HEADS, LAYERS, LONGEST, VOCABULARY, WIDTH, state_dict, write_tokenizer


def masks(prefix: str) -> dict[str, Tensor]:
    """The buffers of older files."""
    tensors = {f"{prefix}h.{i}.attn.bias": torch.ones(1, 1, LONGEST, LONGEST).tril() for i in range(LAYERS)}
    return tensors | {f"{prefix}h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}


def build_model(entries: int = ENTRIES) -> Gpt:
    blocks = GptBlockOptions(dropout=0.0, attention_dropout=0.0, norm_eps=1e-5, activation="gelu_tanh")
    shape = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH, "longest": LONGEST}
    return Gpt(**shape, vocabulary=entries, blocks=blocks).eval()


def text() -> Tensor:
    return torch.randint(ENTRIES, (2, LONGEST), generator=generator("text"))


# Files.


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["OpenAI's names", "transformers' names"])
@pytest.mark.parametrize("older", [False, True], ids=["as saved now", "with the masks and the head of older files"])
@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_a_file_gives_all_weights_and_its_tokenizer(kind: str, older: bool, prefix: str, tmp_path: Path) -> None:
    tensors = state_dict(prefix)
    if older:
        tensors |= {**masks(prefix), "lm_head.weight": tensors[f"{prefix}wte.weight"].clone()}
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    write_tokenizer(tmp_path, kind)
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), tmp_path)
    build_model().load_state_dict(adopted.weights)
    assert len(adopted.left_out) == (2 * LAYERS if older else 0) and not adopted.notes
    (state,) = adopted.task_state["tokenizers"]
    tokenizer = restore(state)
    ids = tokenizer.encode("the the\u00e9")
    assert [VOCABULARY[i] for i in ids] == ["the", "\u0120the", "\u00c3", "\u00a9"]
    assert tokenizer.decode(ids) == "the the\u00e9" and tokenizer.special.end == ENTRIES - 1


@torch.no_grad()
def test_a_folder_of_transformers_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": ENTRIES, "n_positions": LONGEST, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    rng = generator("theirs")
    for parameter in theirs.parameters():
        parameter.normal_(std=0.2, generator=rng)
    theirs.save_pretrained(tmp_path)
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), tmp_path)
    model = build_model()
    model.load_state_dict(adopted.weights)
    expected = theirs(text()).logits
    assert expected.std() > 0.2
    torch.testing.assert_close(model(text()), expected, rtol=0, atol=1e-5)
    assert adopted.task_state == {} and len(adopted.notes) == 1
    for value in ("model.heads=3", "model.blocks.activation=gelu_tanh", "model.blocks.norm_eps=1e-05"):
        assert value in adopted.notes[0]


# Refusals.


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_a_tokenizer_of_another_size_is_refused(kind: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, kind)
    with pytest.raises(
        UserError, match=rf"{kind} is the tokenizer of another model: it has {ENTRIES} entries, and .* 300 rows"
    ):
        adopt(state_dict(entries=300), tmp_path)


def test_another_tokenizer_beside_the_file_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "vocab.json", [entry for entry in VOCABULARY if entry != "a"] + ["aa"])
    with pytest.raises(UserError, match="is not a byte-level BPE"):
        adopt(state_dict(), tmp_path)


def test_an_output_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"output, lm_head.weight, is not the embedding wte.weight"):
        adopt(state_dict("transformer.") | {"lm_head.weight": torch.zeros(ENTRIES, WIDTH)}, None)


def test_matrices_stored_the_other_way_round_are_refused() -> None:
    tensors = {name: t.T if ".c_" in name and t.ndim == 2 else t for name, t in state_dict("transformer.").items()}
    with pytest.raises(UserError, match=r"as \(out, in\) \(72 x 24\), as nanoGPT does"):
        adopt({"model": {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}}, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "transformer.h.0.crossattention.c_attn.weight",
            r"has transformer\.h\.0\.crossattention\.c_attn\.weight, which",
        ),
        ("score.weight", r"has score\.weight, which GPT-2 lacks"),
    ],
)
def test_files_with_other_tensors_are_refused(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        adopt(state_dict("transformer.") | {name: torch.zeros(2, 2)}, None)


def test_files_of_other_models_and_without_an_embedding_are_refused() -> None:
    with pytest.raises(UserError, match=r"has bert\.pooler\.bias and is no GPT-2; give a GPT-2"):
        adopt({"bert.pooler.bias": torch.zeros(1)}, None)
    tensors = state_dict()
    del tensors["wte.weight"]
    with pytest.raises(UserError, match=r"has no wte\.weight"):
        adopt(tensors, None)


@pytest.mark.parametrize("option", ["scale_attn_by_inverse_layer_idx", "add_cross_attention"])
def test_options_that_change_the_model_are_refused(option: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({option: True}))
    with pytest.raises(UserError, match=f"says {option}=True"):
        adopt(state_dict(), tmp_path)
