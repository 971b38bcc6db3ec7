"""The maker and the family of the CPU, as far as the operating system says."""

import platform
from itertools import takewhile
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")  # where Linux describes the CPU
ZEN_3_AND_4 = "25"  # AMD's number of this family; of its members, only Zen 4 has AVX-512


def is_intel() -> bool:
    """Whether the CPU is made by Intel."""
    core = _first_core()
    # Without a description: such as "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel" on Windows.
    return "Intel" in (core.get("vendor_id", "") if core else platform.processor())


def is_zen_4() -> bool:
    """Whether the CPU is a Zen 4 of AMD; False on systems other than Linux."""
    core = _first_core()
    is_family = core.get("vendor_id") == "AuthenticAMD" and core.get("cpu family") == ZEN_3_AND_4
    return is_family and "avx512f" in core.get("flags", "").split()


def _first_core() -> dict[str, str]:
    """Linux's description of the first core, name -> value; empty on other systems."""
    try:
        with CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            parts = [line.partition(":") for line in takewhile(str.strip, lines)]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in parts}
