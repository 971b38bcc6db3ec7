"""The maker of the CPU."""

import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")  # where Linux describes the CPU


def is_intel() -> bool:
    """Whether the CPU is made by Intel, as far as the operating system says."""
    try:
        with CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            vendor = next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        vendor = platform.processor()  # such as "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel" on Windows
    return "Intel" in vendor
