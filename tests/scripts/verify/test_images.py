"""Files of Swin, TNT, ResNet, image GPT and the masked autoencoder: they agree with their programs, or are refused."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from foreign_files import (
    HUB_VIT,
    as_authors_mae,
    as_authors_tnt,
    as_official_swin,
    authors_gpt_arrays,
    randomised_resnet,
    replaced,
    swap_in_import,
    timms_swin,
    timms_tnt,
    torchvisions_swin,
    transformers_gpt,
    transformers_mae,
    write_palette,
)
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

from common.machine.seeds import generator
from common.task import Adopted
from scripts import verify_import
from vit.importing import image_gpt, masked_autoencoder, resnet, swin, tnt

pytest.importorskip("timm")
pytest.importorskip("transformers")

SWIN = ["model=swin", "model.patch_size=2", "model.width=24", "model.depths=[2,2,3]", "model.heads=[2,3,4]"]
TNT = ["model=tnt", "model.patch_size=8", "model.word_stride=4", "model.width=32", "model.heads=2", "model.layers=2"]
TNT += ["model.feedforward=128", "model.inner.width=12", "model.inner.heads=4", "model.inner.feedforward=48"]
RESNET = ["model=resnet18", "model.blocks=[1,1,1,1]"]
GPT = ["model=igpt", "model.width=24", "model.heads=3", "model.layers=2", "model.feedforward=96"]
MAE = ["model=mae", "model.patch_size=4", "model.width=24", "model.heads=3", "model.layers=2", "model.feedforward=96"]
MAE += ["model.decoder.width=16", "model.decoder.heads=2", "model.decoder.layers=2", "model.decoder.feedforward=64"]
EPS = "model.norm_eps=1e-6"
CLASSIFIED = ["features", "logits"]


def of_resnet(block: Any = BasicBlock, **keys: Any) -> dict[str, Tensor]:
    return randomised_resnet(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=7, **keys)).state_dict()


def without(file: dict[str, Tensor], *starts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in file.items() if not name.startswith(starts)}


def gpt(kind: str = "ForCausalImageModeling") -> dict[str, Tensor]:
    return dict(transformers_gpt(kind).state_dict())


def mae() -> dict[str, Tensor]:
    return dict(transformers_mae().state_dict())


def without_start() -> dict[str, np.ndarray]:
    """The authors' arrays of a masked model, without a classifier."""
    return {name: a for name, a in authors_gpt_arrays().items() if not name.endswith(("sos", "wclf"))}


AGREEING: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "Swin, official": (lambda: {"model": as_official_swin(timms_swin().state_dict())}, SWIN, CLASSIFIED),
    "Swin, timm": (lambda: timms_swin().state_dict(), SWIN, CLASSIFIED),
    "Swin, torchvision": (lambda: torchvisions_swin().state_dict(), SWIN, CLASSIFIED),
    "Swin, timm, without a head": (lambda: timms_swin(classes=0).state_dict(), SWIN, ["features"]),
    "Swin, timm, windows cut to the map": (lambda: timms_swin(img_size=16).state_dict(), SWIN, CLASSIFIED),
    "Swin, torchvision, without a head": (
        lambda: without(torchvisions_swin().state_dict(), "head."),
        SWIN,
        ["features"],
    ),
    "TNT, timm": (lambda: timms_tnt().state_dict(), TNT, CLASSIFIED),
    "TNT, authors": (lambda: as_authors_tnt(timms_tnt().state_dict()), TNT, CLASSIFIED),
    "TNT, timm, without a head": (lambda: timms_tnt(num_classes=0).state_dict(), TNT, ["features"]),
    "ResNet": (of_resnet, RESNET, CLASSIFIED),
    "ResNet of bottlenecks": (lambda: of_resnet(Bottleneck), [*RESNET, "model.block=bottleneck"], CLASSIFIED),
    "ResNet in half precision": (
        lambda: {name: t.half() if t.is_floating_point() else t for name, t in of_resnet().items()},
        RESNET,
        CLASSIFIED,
    ),
    "ResNet without a head and counters": (
        lambda: {name: t for name, t in of_resnet().items() if "fc." not in name and "num_batches" not in name},
        RESNET,
        ["features"],
    ),
    "image GPT, transformers": (gpt, GPT, ["features", "colours"]),
    "image GPT, transformers' classifier": (
        lambda: gpt("ForImageClassification"),
        GPT,
        ["features", "classes"],
    ),
    "image GPT, transformers' base model": (lambda: gpt("Model"), GPT, ["features"]),
    "image GPT, authors": (authors_gpt_arrays, GPT, ["features", "colours", "classes"]),
    "image GPT, authors, masked": (without_start, GPT, ["features", "colours"]),
    "MAE, transformers": (mae, [*MAE, EPS], ["features", "pixels"]),
    "MAE, published by transformers": (lambda: replaced(mae(), HUB_VIT), [*MAE, EPS], ["features", "pixels"]),
    "MAE, authors": (lambda: {"model": as_authors_mae(mae())}, [*MAE, EPS], ["features", "pixels"]),
    "MAE, authors, encoder": (
        lambda: {"model": without(as_authors_mae(mae()), "decoder", "mask")},
        [*MAE, EPS],
        ["features"],
    ),
}


def write(folder: Path, content: Any) -> Path:
    write_palette(folder)
    if isinstance(next(iter(content.values())), np.ndarray):
        np.savez(folder / "file.npz", **content)
        return folder / "file.npz"
    torch.save(content, folder / "file.pth")
    return folder / "file.pth"


def differences(printed: str) -> dict[str, float]:
    """The relative difference of each compared output."""
    found = re.findall(r"^(\w+) +differ by \S+ at most, (\S+) of", printed, re.MULTILINE)
    return {name: float(number) for name, number in found}


@pytest.mark.parametrize("case", AGREEING)
def test_a_file_gives_the_outputs_of_its_own_program(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, keys, compared = AGREEING[case]
    code = verify_import.main([f"checkpoint={write(tmp_path, make())}", *keys])
    printed = capsys.readouterr()
    assert code == 0, printed.err + printed.out
    assert [*differences(printed.out)] == compared and max(differences(printed.out).values()) < 3e-5
    assert printed.out.splitlines()[-1].startswith("outputs agree: the limit is 0.0001")


NORM = "residuals.0.norm.weight"
SWAPPED: dict[str, tuple[Any, str, str]] = {
    "Swin, official": (swin, "stages.0.blocks.0.attention.table", "stages.0.blocks.1.attention.table"),
    "Swin, torchvision": (swin, f"stages.1.blocks.0.{NORM}", f"stages.1.blocks.1.{NORM}"),
    "TNT, authors": (tnt, f"inner.blocks.0.{NORM}", f"inner.blocks.1.{NORM}"),
    "ResNet": (resnet, "layer2.0.bn1.running_mean", "layer2.0.bn2.running_mean"),
    "image GPT, transformers": (image_gpt, f"decoder.blocks.0.{NORM}", f"decoder.blocks.1.{NORM}"),
    "image GPT, authors": (
        image_gpt,
        "decoder.blocks.0.attention.out_proj.weight",
        "decoder.blocks.1.attention.out_proj.weight",
    ),
    "MAE, authors": (masked_autoencoder, f"decoder.blocks.0.{NORM}", f"decoder.blocks.1.{NORM}"),
    "MAE, authors, encoder": (masked_autoencoder, f"encoder.blocks.0.{NORM}", f"encoder.blocks.1.{NORM}"),
}


@pytest.mark.parametrize("case", SWAPPED)
def test_two_tensors_swapped_by_the_import_are_noticed(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    swap_in_import(monkeypatch, *SWAPPED[case])
    make, keys, _ = AGREEING[case]
    assert verify_import.main([f"checkpoint={write(tmp_path, make())}", *keys]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "OUTPUTS DIFFER: the limit is 0.0001"


@pytest.mark.parametrize(
    ("case", "preset", "undecided"),
    [
        ("Swin, timm", "swin", []),
        ("Swin, timm, windows cut to the map", "swin_t", []),
        ("TNT, authors", "tnt_s", [key for key in TNT if "heads" in key or "patch" in key]),
        ("ResNet of bottlenecks", "cnn", []),
        ("image GPT, authors", "igpt", []),
        ("image GPT, transformers", "igpt_s", ["model.heads=3"]),
        ("MAE, authors", "mae_b16", ["model.heads=3", "model.decoder.heads=2"]),
    ],
)
def test_a_model_that_differs_from_the_configs_is_refused_with_the_keys_to_override(
    case: str, preset: str, undecided: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [f"checkpoint={write(tmp_path, AGREEING[case][0]())}", f"model={preset}", *undecided]
    assert verify_import.main(line) == 2
    message = capsys.readouterr().err
    assert "holds another model than the config describes; give model." in message and message.count("\n") == 1
    overrides = shlex.split(message.partition("; give ")[2].strip().removesuffix("."))
    assert verify_import.main([*line, *overrides]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("Swin, official", "model.blocks.norm_eps=1e-05"),
        ("TNT, timm", "model.patch_size=8, model.word_stride=4, model.heads=2, model.inner.heads=4, model.blocks.nor"),
        ("image GPT, transformers", "model.heads=3, model.norm_eps=1e-05"),
        ("image GPT, authors", "model.norm_eps=1e-05"),
        ("MAE, authors", "model.heads=3, model.decoder.heads=2, model.norm_eps=1e-06"),
    ],
)
def test_the_verdict_names_the_options_that_a_file_does_not_decide(
    case: str, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, keys, _ = AGREEING[case]
    assert verify_import.main([f"checkpoint={write(tmp_path, make())}", *keys]) == 0
    assert f"provided that the original model has {options}" in capsys.readouterr().out.splitlines()[-1]


def test_everything_is_known_of_a_resnet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_import.main([f"checkpoint={write(tmp_path, of_resnet())}", *RESNET]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("outputs agree: the limit is 0.0001\n") and "resnetblur50, which are not noticed" in printed


@pytest.mark.parametrize("keys", [SWIN, TNT, RESNET, GPT, MAE], ids=["swin", "tnt", "resnet", "igpt", "mae"])
def test_a_file_of_another_model_is_refused_in_one_sentence(
    keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"encoder.pos_embedding": torch.zeros(1, 5, 8), "conv_proj.weight": torch.zeros(8, 3, 2, 2)}
    assert verify_import.main([f"checkpoint={write(tmp_path, other)}", *keys]) == 2
    message = capsys.readouterr().err
    assert re.search(r"does not hold a vit\.models\.\w+\.\w+; name the model|is not a masked autoencoder", message)
    assert message.count("\n") == 1


def test_windows_that_no_map_fits_are_refused_since_the_other_programs_attend_to_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, timms_swin(img_size=24).state_dict())
    assert verify_import.main([f"checkpoint={path}", *SWIN]) == 2
    assert "has windows of [4, 4, 3] tokens, which no image fits without padding" in capsys.readouterr().err


def test_a_file_that_the_peer_cannot_read_is_refused_in_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ResNet of three stages, which our model has and torchvision's has not."""
    path = write(tmp_path, without(of_resnet(), "layer4.", "fc."))
    keys = ["model=resnet18", "model.blocks=[1,1,1]", "model.widths=[64,128,256]"]
    assert verify_import.main([f"checkpoint={path}", *keys]) == 2
    message = capsys.readouterr().err
    assert message.startswith("torchvision ") and message.count("\n") == 1
    assert message.endswith("although our code can; so nothing can be compared.\n")


def test_colours_of_the_start_token_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the first pixel depend on the start token alone."""
    original = image_gpt.adopt

    def patched(*arguments: Any) -> Adopted:
        adopted = original(*arguments)
        table = adopted.weights["embedding.weight"].clone()
        table[-1] = torch.randn(table.shape[1], generator=generator("start"))
        return adopted._replace(weights={**adopted.weights, "embedding.weight": table})

    monkeypatch.setattr(image_gpt, "adopt", patched)
    assert verify_import.main([f"checkpoint={write(tmp_path, gpt())}", *GPT]) == 1
