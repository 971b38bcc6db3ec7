"""A checkpoint with any field altered is loaded, or refused in one sentence that names the file."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizing import BYTE_OPTIONS

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint
from common.files.content import TO_RESTORE
from common.train import assembly
from seq2seq.tokenizers.bpe import Tokenizer
from vit.tasks.classification import Classification

SMALL = {
    "vit": ["model=vit", "model.width=16", "model.layers=1", "model.heads=2", "model.feedforward=24"],
    "detr": [
        *("model=detr", "model.width=16", "model.heads=2", "model.feedforward=24", "model.queries=7"),
        *("model.encoder_layers=1", "model.decoder_layers=1"),
    ],
    "seq2seq": [
        *("model=seq2seq", "model.width=16", "model.heads=2", "model.feedforward=24", "model.longest=40"),
        *("model.encoder_layers=1", "model.decoder_layers=1"),
    ],
}
STATES = {
    "vit": {"classes": [str(digit) for digit in range(10)]},
    "detr": {"categories": [{"id": 10 * i, "name": f"thing {i}"} for i in range(3)]},
    "seq2seq": {"tokenizers": [Tokenizer.train([], BYTE_OPTIONS).state()]},
}
DELETED = object()
VALUES = (DELETED, None, 5, "text", [], {}, float("nan"), {3: 2**100})
Keys = tuple[str | int, ...]


def content_of(wing: str) -> dict[str, Any]:
    """A checkpoint as a run with a moving average writes it, after a step of random numbers."""
    config = configure("train", SMALL[wing])
    task = build(config["task"], data=build(config["data"]))
    task.restore(STATES[wing])
    weights = build_model(config["model"], task).state_dict()
    return {
        "step": 7,
        "best": 0.5,
        "ranking": [[0.5, 3], [0.25, 7]],
        "model": weights,
        "average": {"updates": 7, "weights": weights},
        "optimizer": {},
        "scaler": {},
        "overflows": 0,
        "windows": [{"loss": torch.tensor(1.0)}],
        "window_steps": 1,
        "said": ["the loss is high"],
        "task": STATES[wing],
        "samples": 100,
        "fingerprints": {"train": {"images": "abc"}, "val": {}, "test": {}},
        "int8": {"encoder.blocks.0.feed_forward.expand": [-1.0, 2.0]},
        "config": config,
        "format": checkpoint.FORMAT,
    }


@pytest.fixture(scope="module", params=SMALL)
def wing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def content(wing: str) -> dict[str, Any]:
    return content_of(wing)


@pytest.fixture
def restore(content: dict[str, Any], tmp_path: Path) -> Callable[[dict[str, Any]], assembly.Components]:
    """A function that writes a checkpoint and restores it with the unaltered config, as evaluate.py does."""
    file = tmp_path / "a.pt"
    torch.save(content, file)
    config = configure("evaluate", [f"checkpoint={file}"], assembly.stored_config)

    def write_and_restore(altered: dict[str, Any]) -> assembly.Components:
        torch.save(altered, file)
        return assembly.restore(config)

    return write_and_restore


def fields(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """The keys of each field at any depth, except inside the config; of lists and weights the first one."""
    if keys:
        yield keys
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    of_equal_kind = isinstance(value, list) or keys[-1:] in (("model",), ("weights",))
    for key, item in items[:1] if of_equal_kind else [] if keys == ("config",) else items:
        yield from fields(item, (*keys, key))


def altered(content: Any, keys: Keys, value: Any) -> Any:
    """A copy of the content with another value of a field, or without the field; other parts are shared."""
    copied = content.copy()
    if value is DELETED and len(keys) == 1:
        del copied[keys[0]]
    else:
        copied[keys[0]] = altered(content[keys[0]], keys[1:], value) if keys[1:] else value
    return copied


def check_sentence(error: UserError, file: str = ".pt") -> None:
    text = str(error)
    assert file in text and "\n" not in text and text.endswith(".") and len(text) < 700, text


def test_a_checkpoint_with_any_field_altered_is_restored_or_refused_in_one_sentence(wing, content, restore, tmp_path):
    """The outer fields are altered in one wing, because all have the same schema."""
    restore(content)
    refused = set()
    altered_fields = [*fields(content if wing == "vit" else {"task": content["task"]})]
    for keys in altered_fields:
        for value in VALUES:
            try:
                torch.save(altered(content, keys, value), tmp_path / "b.pt")
                checkpoint.load(tmp_path / "b.pt")
                if keys[0] in TO_RESTORE:  # no other field is read
                    restore(altered(content, keys, value))
            except UserError as error:
                check_sentence(error)
                refused.add(keys)
    not_refused = {keys for keys in altered_fields if len(keys) == 1} - refused
    assert not_refused <= {("format",)}, "the type of each field is checked"


def test_a_tokenizer_with_any_field_altered_is_restored_or_refused_in_one_sentence():
    stored = json.loads(STATES["seq2seq"]["tokenizers"][0])
    for keys in fields(stored):
        for value in VALUES[:-1]:
            try:
                Tokenizer.restore(json.dumps(altered(stored, keys, value))).encode("a text")
            except UserError as error:
                check_sentence(error, "tokenizer")


REFUSED = {
    "digits instead of names": (
        "vit",
        ("task", "classes"),
        "0123456789",
        'classes is "0123456789", expected a list',
    ),
    "no classes": ("vit", ("task", "classes"), DELETED, "task.classes is missing"),
    "a number as a name": ("vit", ("task", "classes", 3), 3, "task.classes[3] is 3, expected text"),
    "a category as a name": (
        "detr",
        ("task", "categories", 1),
        "cat",
        '[1] is "cat", expected the keys id, name',
    ),
    "a number as a tokenizer": ("seq2seq", ("task", "tokenizers"), [5], "task.tokenizers[0] is 5, expected text"),
    "a text as a tokenizer": ("seq2seq", ("task", "tokenizers"), ["text"], "was not written by this program"),
    "three tokenizers": (
        "seq2seq",
        ("task", "tokenizers"),
        STATES["seq2seq"]["tokenizers"] * 3,
        "contains 3 tokenizers",
    ),
    "null as a name of a tensor": ("vit", ("model", None), torch.zeros(1), "model has the key null, expected text"),
    "a number as a key of the config": ("vit", ("config", "model", 5), 1, "config.model has the key 5, expected text"),
    "a tensor in the config": ("vit", ("config", "seed"), torch.zeros(1), "config.seed is a Tensor, expected"),
    "a list as weights": (
        "vit",
        ("average", "weights", "head.bias"),
        [0.0] * 10,
        "head.bias is a list of 10",
    ),
    "an enormous step": ("vit", ("step",), 2**100, "step is an integer of 101 bits, expected a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_field_of_another_type_is_refused_with_file_and_field(case, tmp_path):
    wing, keys, value, expected = REFUSED[case]
    torch.save(altered(content_of(wing), keys, value), tmp_path / "a.pt")
    with pytest.raises(UserError) as caught:
        assembly.load(tmp_path / "a.pt")
    check_sentence(caught.value)
    assert expected in str(caught.value)


TENSORS = {
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8),
    "a tensor without content": lambda: torch.empty(2, 2, device="meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_plain_are_refused_by_name(kind, ours, tmp_path):
    torch.save(
        {"model": {"head.weight": TENSORS[kind]()}} | ({"format": checkpoint.FORMAT} if ours else {}), tmp_path / "a.pt"
    )
    with pytest.raises(UserError, match=rf"a\.pt holds model\.head\.weight, {kind}"):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.complex64])
def test_weights_that_no_training_writes_are_refused(kind, content, restore):
    name = next(name for name, tensor in content["model"].items() if tensor.ndim > 1)
    odd = content["model"][name].to(kind)
    with pytest.raises(UserError, match=rf"a\.pt holds {re.escape(name)} as {str(kind)[6:]}, expected float32"):
        restore(altered(content, ("average", "weights", name), odd))
    restore(altered(content, ("average", "weights", name), content["model"][name].double()))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_in_a_warning(number, content, restore, tmp_path):
    assert "warning" not in restore(content).weights_line
    for name in [*content["model"]][:5]:
        content = altered(content, ("average", "weights", name), torch.full_like(content["model"][name], number))
    parts = restore(content)
    names = [*content["model"]]
    assert f"warning   NaN or infinite values are in {', '.join(names[:3])} and 2 more" in parts.weights_line
    assert "warning   NaN or" in assembly.load_initial_weights(parts.model, parts.task, tmp_path / "a.pt")
    with pytest.warns(UserWarning, match=rf"a\.pt: NaN or infinite values are in {re.escape(names[0])}"):
        assembly.load(tmp_path / "a.pt")


class OwnState(Classification):
    """A task of a user's own, whose state is not that of its parent, and which declares none."""

    def state(self) -> dict[str, Any]:
        return {"names": " ".join(self.classes)}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore({"classes": state["names"].split()})


def test_a_task_without_a_declaration_is_judged_by_the_outer_schema_alone():
    config = configure("train", SMALL["vit"])
    options = {key: value for key, value in config["task"].items() if key != "_target_"}
    task = construct(OwnState, options, data=build(config["data"]))
    assembly.restore_task(task, {"names": "a b"}, Path("a.pt"))
    assert task.classes == ["a", "b"]
    with pytest.raises(UserError, match=r"a\.pt .*task\.classes is missing"):
        assembly.restore_task(construct(Classification, options, data=task.data), {"names": "a b"}, Path("a.pt"))


SHAPES = {
    "no axis": lambda tensor: torch.zeros(()),
    "empty": lambda tensor: tensor.new_zeros((0, *tensor.shape[1:])),
    "empty at the end": lambda tensor: tensor.new_zeros((*tensor.shape[:-1], 0)),
    "one axis": lambda tensor: tensor.flatten(),
    "a further axis": lambda tensor: tensor[None],
    "booleans": lambda tensor: tensor.bool(),
    "no tensor": lambda tensor: "text",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_foreign_file_with_the_shapes_of_no_supported_model_is_restored_or_refused_in_one_sentence(shape, tmp_path):
    """Names are timm's. A class token or table of positions may have a further axis, or one less."""
    tensors, file = timm_tensors(), tmp_path / "a.pt"
    torch.save(tensors, file)
    options = ("model=vit_b16", "model.layers=1", "model.width=16", "model.heads=2", "model.feedforward=24")
    data = ("data=imagefolder", "data.image_size=32")
    config = configure("evaluate", [f"checkpoint={file}", *options, *data], assembly.stored_config)
    assembly.restore(config)
    refused = []
    for name in tensors:
        torch.save({**tensors, name: SHAPES[shape](tensors[name])}, file)
        try:
            assembly.restore(config)
        except UserError as error:
            check_sentence(error)
            refused.append(name)
    assert "patch_embed.proj.weight" in refused and "blocks.0.mlp.fc2.weight" in refused


def timm_tensors() -> dict[str, torch.Tensor]:
    """A small ViT of five classes in timm's layout, for images of 32 x 32."""
    block = {"norm1": (16,), "attn.qkv": (48, 16), "attn.proj": (16, 16), "norm2": (16,)}
    block |= {"mlp.fc1": (24, 16), "mlp.fc2": (16, 24)}
    shapes = {"patch_embed.proj": (16, 3, 16, 16), "norm": (16,), "head": (5, 16)}
    shapes |= {f"blocks.0.{name}": shape for name, shape in block.items()}
    tensors = {"cls_token": torch.zeros(1, 1, 16), "pos_embed": torch.zeros(1, 5, 16)}
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": torch.ones(shape), f"{name}.bias": torch.ones(shape[0])}
    return tensors
