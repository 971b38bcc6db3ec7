"""The CPU's maker and family, from Linux's description and, without one, from Python's."""

from pathlib import Path

import pytest

from common.machine import processor


@pytest.mark.parametrize(("vendor", "expected"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_the_maker_is_read_from_the_description_of_the_first_core(tmp_path: Path, monkeypatch, vendor, expected):
    (tmp_path / "cpuinfo").write_text(
        f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: of the other, Intel\n\n" * 2
    )
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(processor.platform, "processor", lambda: 1 / 0)  # it starts another process
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


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "expected"),
    [
        ("AuthenticAMD", 25, "fpu avx2 avx512f", True),
        ("AuthenticAMD", 25, "fpu avx2 avx512fake", False),  # Zen 3
        ("AuthenticAMD", 26, "fpu avx2 avx512f", False),  # Zen 5
        ("GenuineIntel", 25, "fpu avx2 avx512f", False),
    ],
)
def test_zen_4_is_the_member_of_its_family_with_avx_512(tmp_path: Path, monkeypatch, vendor, family, flags, expected):
    core = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n\n"
    (tmp_path / "cpuinfo").write_text(core * 2)
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")
    assert processor.is_zen_4() == expected


def test_without_a_description_no_processor_is_taken_for_a_zen_4(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "missing")
    assert not processor.is_zen_4()
