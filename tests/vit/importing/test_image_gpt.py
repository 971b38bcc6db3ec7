"""Files of transformers and arrays of the authors give the logits of their own models, or are refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from foreign_files import COLOURS, PIXELS, authors_gpt_arrays, transformers_gpt, write_palette
from foreign_files import GPT_CLASSES as CLASSES
from foreign_files import GPT_HEADS as HEADS
from foreign_files import GPT_LAYERS as LAYERS
from foreign_files import GPT_SIZE as SIZE
from foreign_files import GPT_WIDTH as WIDTH
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from vit.importing.image_gpt import adopt, read_palette
from vit.models.image_gpt import ImageGpt, Outputs

EXACT = {"rtol": 0, "atol": 1e-5}  # fp32 with values of about one


def build_model(classes: int) -> ImageGpt:
    shape = {"width": WIDTH, "heads": HEADS, "layers": LAYERS, "feedforward": 4 * WIDTH}
    return ImageGpt(**shape, colours=COLOURS, classes=classes, image_size=SIZE, norm_eps=1e-5, dropout=0.0).eval()


@torch.no_grad()
def outputs(folder: Path, name: str, masked: Tensor | None = None) -> tuple[Outputs, Any]:
    """The outputs of our model with the weights of a file, which must fit exactly."""
    adopted = adopt(checkpoint.load(folder / name), ["a", "b"], folder)
    model = build_model(CLASSES if "head.weight" in adopted.weights else 0)
    model.load_state_dict(adopted.weights)
    return model(images(), masked), adopted


def images() -> Tensor:
    return torch.randint(COLOURS, (2, PIXELS), generator=generator("pixels"))


# The authors' arrays, and a plain computation with them in NumPy.


def normed(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain


def plain_outputs(arrays: dict[str, np.ndarray], masked: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The logits of colours and classes, by the formulas of the authors' code."""
    tokens, get = images().numpy(), lambda name: arrays[f"model/{name}"].astype(np.float64)
    x = get("wte")[tokens]
    if masked is None:
        x = np.concatenate([np.broadcast_to(get("sos"), (2, 1, WIDTH)), x[:, :-1]], 1)
    else:
        x = x * ~masked[:, :, None]
    x = x + get("wpe")
    for i in range(LAYERS):
        y = normed(x, get(f"h{i}/ln_1/g"))
        q, k, v = (np.einsum("bsf,hef->bhse", y, get(f"h{i}/attn/{part}_proj")) for part in "qkv")
        scores = np.einsum("bhse,bhte->bhst", q, k) / math.sqrt(WIDTH // HEADS)
        if masked is None:
            scores = np.where(np.tril(np.ones((PIXELS, PIXELS), bool)), scores, -1e10)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        attended = np.einsum("bhst,bhte->bhse", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("bhse,hef->bsf", attended, get(f"h{i}/attn/c_proj"))
        hidden = normed(x, get(f"h{i}/ln_2/g")) @ get(f"h{i}/mlp/c_fc/w")
        x = x + (hidden / (1 + np.exp(-1.702 * hidden))) @ get(f"h{i}/mlp/c_proj/w")
    x = normed(x, get("ln_f/g"))
    return x @ get("wtet").T, x.mean(1) @ get("clf/wclf").T


@pytest.mark.parametrize("objective", ["autoregressive", "masked"])
def test_the_authors_arrays_give_the_logits_of_their_formulas(objective: str, tmp_path: Path) -> None:
    masked = torch.rand(2, PIXELS, generator=generator("m")) < 0.3 if objective == "masked" else None
    arrays, centres = authors_gpt_arrays(), write_palette(tmp_path)
    np.savez(tmp_path / "igpt.npz", **arrays, global_step=np.array(1.0))
    (colours, classes), adopted = outputs(tmp_path, "igpt.npz", masked)
    expected, expected_classes = plain_outputs(arrays, None if masked is None else masked.numpy())
    assert expected.std() > 0.5 and classes is not None
    np.testing.assert_allclose(colours.numpy(), expected, **EXACT)
    np.testing.assert_allclose(classes.numpy(), expected_classes, **EXACT)
    assert adopted.left_out == ["global_step"]
    assert adopted.task_state["classes"] == [f"class {i}" for i in range(CLASSES)]
    np.testing.assert_allclose(adopted.task_state["palette"], centres, atol=1e-7)


def test_a_masked_models_file_without_a_start_token_is_read_with_a_note(tmp_path: Path) -> None:
    write_palette(tmp_path)
    arrays = authors_gpt_arrays()
    del arrays["model/sos"], arrays["model/clf/wclf"]
    np.savez(tmp_path / "bert.npz", **arrays)
    masked = torch.rand(2, PIXELS, generator=generator("m")) < 0.3
    (colours, classes), adopted = outputs(tmp_path, "bert.npz", masked)
    arrays["model/clf/wclf"] = np.zeros((1, WIDTH), np.float32)
    np.testing.assert_allclose(colours.numpy(), plain_outputs(arrays, masked.numpy())[0], **EXACT)
    assert classes is None and "cannot sample" in adopted.notes[0] and adopted.task_state["classes"] == ["a", "b"]


# Files of transformers.


@torch.no_grad()
@pytest.mark.parametrize("older", [False, True], ids=["as saved now", "with the masks of older files"])
def test_transformers_files_give_the_logits_of_transformers(older: bool, tmp_path: Path) -> None:
    theirs = transformers_gpt("ForCausalImageModeling")
    tensors = dict(theirs.state_dict())
    if older:
        tensors |= {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 2, 2) for i in range(LAYERS)}
        tensors |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    clusters = np.random.default_rng(0).uniform(-1, 1, (COLOURS, 3)).astype(np.float32).tolist()
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"clusters": clusters, "size": 32}))
    (colours, classes), adopted = outputs(tmp_path, "model.safetensors")
    start = torch.full((2, 1), COLOURS)
    expected = theirs(torch.cat([start, images()[:, :-1]], 1)).logits
    assert expected.std() > 0.5 and classes is None
    torch.testing.assert_close(colours, expected, **EXACT)
    assert adopted.task_state == {"palette": clusters, "lossless": False, "classes": ["a", "b"]}
    assert len(adopted.left_out) == (2 * LAYERS if older else 0)


@torch.no_grad()
def test_transformers_classifiers_give_its_class_logits(tmp_path: Path) -> None:
    theirs = transformers_gpt("ForImageClassification")
    write_palette(tmp_path)
    adopted = adopt(dict(theirs.state_dict()), None, tmp_path)
    model = build_model(CLASSES)
    assert model.load_state_dict(adopted.weights, strict=False).missing_keys == ["output.weight"]
    start = torch.full((2, 1), COLOURS)
    expected = theirs(torch.cat([start, images()[:, :-1]], 1)).logits
    torch.testing.assert_close(model(images()).classes, expected, **EXACT)


# Refusals.


def test_biases_that_are_not_zero_are_refused(tmp_path: Path) -> None:
    write_palette(tmp_path)
    tensors = dict(transformers_gpt("ForCausalImageModeling").state_dict())
    tensors["transformer.h.1.mlp.c_fc.bias"] = torch.ones(4 * WIDTH)
    with pytest.raises(UserError, match=r"has biases \(decoder\.blocks\.1\.feed_forward\.expand\.bias"):
        adopt(tensors, None, tmp_path)


@pytest.mark.parametrize("count", [None, COLOURS - 1], ids=["none", "another"])
def test_a_file_without_its_palette_is_refused(count: int | None, tmp_path: Path) -> None:
    if count:
        write_palette(tmp_path, count)
    content = {name: torch.from_numpy(array) for name, array in authors_gpt_arrays().items()}
    with pytest.raises(UserError, match="has 11 colours" if count else "put kmeans_centers.npy"):
        adopt(content, None, tmp_path)


@pytest.mark.parametrize("name", ["kmeans_centers.npy", "preprocessor_config.json"])
def test_a_damaged_palette_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(UserError, match="the palette cannot be read"):
        read_palette(tmp_path)
    np.save(tmp_path / "kmeans_centers.npy", np.zeros((4, 2)))
    with pytest.raises(UserError, match=r"an array of shape \(4, 2\)"):
        read_palette(tmp_path)


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has cls_token and is no image GPT"):
        adopt({"cls_token": torch.zeros(1)}, None, tmp_path)
    with pytest.raises(UserError, match=r"has transformer\.h\.0\.crossattention\.c_attn\.weight, which"):
        adopt(
            {
                "transformer.wte.weight": torch.zeros(2, 2),
                "transformer.h.0.crossattention.c_attn.weight": torch.zeros(2),
            },
            None,
            tmp_path,
        )
