"""The CPU's maker, from Linux's description and, without one, from Python's."""

from pathlib import Path

import pytest

from common.machine import processor


@pytest.mark.parametrize(("vendor", "expected"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_the_maker_is_read_from_the_description_of_the_first_core(tmp_path: Path, monkeypatch, vendor, expected):
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: of the other, Intel\n\n" * 2
    )
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    assert processor.is_intel() == expected


@pytest.mark.parametrize(("name", "expected"), [("Intel64 Family 6, GenuineIntel", True), ("arm", False), ("", False)])
def test_without_a_description_the_name_that_python_knows_decides(tmp_path: Path, monkeypatch, name, expected):
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr(processor.platform, "processor", lambda: name)
    assert processor.is_intel() == expected


def test_a_description_without_a_maker_is_not_of_intel(tmp_path: Path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\n")
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    assert not processor.is_intel()
