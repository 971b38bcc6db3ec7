"""The precision to which auto resolves, and a step without a GPU, which does not copy its batch."""

import pytest
import torch

from common.machine import device as devices


def pretend_processor(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [(["avx512_bf16"], "bf16"), (["amx_bf16"], "bf16"), (["avx2", "avx512_f"], "fp32"), ([], "fp32")],
)
def test_auto_is_bf16_if_the_processor_multiplies_in_it(capabilities, expected, monkeypatch) -> None:
    pretend_processor(monkeypatch, *capabilities)
    assert devices.resolve_precision("auto", torch.device("cpu")) == expected
    for name in ("fp32", "bf16", "fp16"):
        assert devices.resolve_precision(name, torch.device("cpu")) == name


def test_capabilities_are_read_from_older_versions_of_pytorch(monkeypatch) -> None:
    pretend_processor(monkeypatch)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices.resolve_precision("auto", torch.device("cpu")) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert devices.resolve_precision("auto", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_is_bf16_only_if_it_is_not_emulated(supported, expected, monkeypatch) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert devices.resolve_precision("auto", torch.device("cuda")) == expected
    assert devices.resolve_precision("auto", torch.device("mps")) == "fp32"


def test_without_a_gpu_nothing_is_copied() -> None:
    batch = {"images": torch.ones(2), "ids": [0, 1]}
    copier = devices.DeviceCopier(torch.device("cpu"))
    (moved,) = copier([batch])  # an iterator
    assert moved["images"] is batch["images"] and moved["ids"] is batch["ids"]
    on_host, copied = copier.to_host(batch["images"])
    assert on_host is batch["images"] and copied is None
