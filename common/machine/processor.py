"""The maker and the family of the CPU, as far as the operating system says."""

import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")  # where Linux describes the CPU
ZEN_3_AND_4 = "25"  # AMD's number of this family; of its members, only Zen 4 has AVX-512


def is_intel() -> bool:
    """Whether the CPU is made by Intel."""
    # Without Linux's description: such as "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel" on Windows.
    return "Intel" in _first_core().get("vendor_id", platform.processor())


def is_zen_4() -> bool:
    """Whether the CPU is a Zen 4 of AMD; False on systems other than Linux."""
    core = _first_core()
    is_family = core.get("vendor_id") == "AuthenticAMD" and core.get("cpu family") == ZEN_3_AND_4
    return is_family and "avx512f" in core.get("flags", "").split()


def _first_core() -> dict[str, str]:
    """Linux's description of the first core, name -> value; with a name but no maker if it names none."""
    try:
        description = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in description.split("\n\n", 1)[0].splitlines())
    return {"vendor_id": ""} | {name.strip(): value.strip() for name, _, value in lines}
