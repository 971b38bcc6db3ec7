"""Swin files of the official code, timm and torchvision give the logits of these programs, with random tensors."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from foreign_files import (
    CLASSES,
    SWIN_STAGES,
    SWIN_WIDTH,
    SWIN_WINDOW,
    as_official_swin,
    timms_swin,
    torchvisions_swin,
)
from foreign_files import SWIN_SIDE as SIDE
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.task import Adopted
from common.train import assembly
from vit.importing import formats
from vit.importing.swin import recognise
from vit.models.swin import Swin, SwinBlockOptions

pytest.importorskip("timm")

EXACT = {"rtol": 0, "atol": 1e-5}  # fp32 sums of some hundred values of about one, in another order


def build_model(**changed: Any) -> Swin:
    blocks = SwinBlockOptions(dropout=0.0, attention_dropout=0.0, drop_path=0.0, norm_eps=1e-5)
    data = {"classes": CLASSES, "channels": 3, "image_size": (SIDE, SIDE)}
    shape = {"patch_size": 2, "embedding": "multiply", "width": SWIN_WIDTH, "window": SWIN_WINDOW}
    shape |= {"mlp_ratio": 4.0, **SWIN_STAGES}
    return Swin(**{**data, **shape, **changed}, blocks=blocks).eval()  # type: ignore[arg-type]


def adopt(content: dict[str, Any], classes: list[str] | None) -> Adopted:
    return formats.adopt(content, classes, (SIDE, SIDE))


def images(side: int = SIDE) -> Tensor:
    return torch.randn(3, 3, side, side, generator=generator("images"))


FILES = {
    "official": lambda: {"model": as_official_swin(timms_swin().state_dict())},
    "timm": lambda: timms_swin().state_dict(),
    "torchvision": lambda: torchvisions_swin().state_dict(),
}


@torch.no_grad()
@pytest.mark.parametrize("layout", FILES)
def test_a_file_gives_the_logits_of_the_program_that_wrote_it(layout: str, tmp_path: Path) -> None:
    content: dict[str, Any] = FILES[layout]()
    assert recognise(content.get("model", content)) == layout
    if layout == "timm":
        safetensors.torch.save_file(content, tmp_path / "swin.pth")
    else:
        torch.save(content, tmp_path / "swin.pth")
    adopted = adopt(checkpoint.load(tmp_path / "swin.pth"), None)
    assert adopted.left_out == [] and adopted.task_state == {"classes": [f"class {i}" for i in range(CLASSES)]}
    model = build_model()
    model.load_state_dict(adopted.weights)
    expected = (torchvisions_swin() if layout == "torchvision" else timms_swin())(images())
    assert expected.std() > 0.3
    torch.testing.assert_close(model(images()), expected, **EXACT)


@pytest.mark.parametrize("layout", FILES)
def test_every_number_of_a_file_is_used_exactly_once(layout: str) -> None:
    """The elements of a file are the numbers from 0 upwards; the imported elements must be the same numbers."""
    content: dict[str, Any] = FILES[layout]()
    tensors, file, count = content.get("model", content), {}, 0
    for name, tensor in tensors.items():
        file[name] = tensor
        if not name.endswith(("index", "attn_mask")):
            file[name] = torch.arange(count, count + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
            count += tensor.numel()
    numbers = torch.cat([tensor.flatten() for tensor in adopt(file, None).weights.values()])
    assert torch.equal(numbers.sort().values, torch.arange(count, dtype=torch.float64))


class SevenClasses:
    """The members of a task that loading initial weights uses."""

    def state(self) -> dict[str, Any]:
        return {"classes": list("abcdefg")}

    def adopt(self, content: dict[str, Any], folder: Path) -> Any:
        return adopt(content, list("abcdefg"))


@torch.no_grad()
def test_a_head_of_other_classes_is_re_initialised_and_tables_are_resampled(tmp_path: Path) -> None:
    torch.save({"model": as_official_swin(timms_swin(classes=1000).state_dict())}, tmp_path / "swin.pth")
    model = build_model(window=8)
    message = assembly.load_initial_weights(model, SevenClasses(), tmp_path / "swin.pth")  # type: ignore[arg-type]
    first, *notes = message.splitlines()
    assert first.endswith("; re-initialised: head.weight, head.bias")
    assert notes == [
        "note      relative position biases of windows of 4 x 4 tokens are resampled by bicubic interpolation to 8 x 8"
    ]


def test_a_file_without_a_head_is_imported_without_one() -> None:
    adopted = adopt(timms_swin(classes=0).state_dict(), ["a", "b"])
    assert adopted.task_state == {"classes": ["a", "b"]} and not [n for n in adopted.weights if n.startswith("head")]


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("patch_embed.norm.bias", "patch_norm.bias"),
        ("norm.weight", "norm.weight"),
        ("layers.1.downsample.reduction.weight", "mergings.0.reduction.weight"),
        ("layers.2.blocks.1.attn.relative_position_bias_table", "stages.2.blocks.1.attention.table"),
        ("layers.0.blocks.0.mlp.fc2.bias", "stages.0.blocks.0.feed_forward.contract.bias"),
    ],
)
def test_a_file_with_a_missing_tensor_is_refused_with_its_name(name: str, missing: str) -> None:
    file = timms_swin().state_dict()
    file.pop(name)
    with pytest.raises(UserError, match=rf"that is not supported \(it has nothing for {missing}\); give a Swin"):
        adopt(file, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"absolute_pos_embed": torch.zeros(1, 256, 24)}, r"it has absolute_pos_embed \(1, 256, 24\), which a Swin"),
        (
            {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(35, 2)},
            "relative_position_bias_table has 35 rows, which are not those of a square window",
        ),
    ],
)
def test_another_kind_of_swin_is_refused_in_one_sentence(changes: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        adopt({**timms_swin().state_dict(), **changes}, None)
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(".")
