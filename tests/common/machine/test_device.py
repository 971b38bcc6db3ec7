"""Which precision suits a device, and that copies for a step are the batch itself where there is no GPU."""

import pytest
import torch

from common.machine import device as devices


def on_a_processor_with(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["avx512_bf16"], "bf16"), (["amx_bf16"], "bf16"), (["avx2", "avx512_f"], "fp32"), ([], "fp32")],
)
def test_auto_is_bf16_where_the_processor_multiplies_in_it(names, expected, monkeypatch) -> None:
    on_a_processor_with(monkeypatch, *names)
    assert devices.resolve_precision("auto", torch.device("cpu")) == expected
    for wanted in ("fp32", "bf16", "fp16"):
        assert devices.resolve_precision(wanted, torch.device("cpu")) == wanted


def test_older_versions_of_pytorch_are_asked_in_their_way(monkeypatch) -> None:
    on_a_processor_with(monkeypatch)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices.resolve_precision("auto", torch.device("cpu")) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert devices.resolve_precision("auto", torch.device("cpu")) == "bf16"


@pytest.mark.parametrize(("supported", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_is_bf16_that_is_not_emulated(supported, expected, monkeypatch) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert devices.resolve_precision("auto", torch.device("cuda")) == expected
    assert devices.resolve_precision("auto", torch.device("mps")) == "fp32"


def test_without_a_gpu_nothing_is_copied() -> None:
    batch = {"images": torch.ones(2), "ids": [0, 1]}
    copies = devices.DeviceCopier(torch.device("cpu"))
    (moved,) = copies([batch])  # an iterator
    assert moved["images"] is batch["images"] and moved["ids"] is batch["ids"]
    there, arrived = copies.to_host(batch["images"])
    assert there is batch["images"] and arrived is None
