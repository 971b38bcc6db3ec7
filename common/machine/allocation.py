"""A setting of the C library's allocator, which makes large tensors on the CPU cheaper.

By default, glibc asks the system for every block of more than 32 MiB, and returns it when it is freed. The system sets
each page of a new block to zero when it is first written, which can take longer than the computation that writes it:
the first convolution of a ResNet-50 at 800 x 1066 pixels in fp32 then takes twice as long. With this setting, glibc
keeps freed blocks for later tensors, as PyTorch's allocator on a GPU does. Like there, freed blocks that do not fit
later tensors cost memory.
"""

import ctypes
import os
from collections.abc import Mapping

# The names of options in glibc's malloc.h; musl and macOS have no function `mallopt`.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MAX_KEPT_BYTES = 2**31 - 1  # at the end of the heap, the largest that the option accepts
PREFIXES = ("MALLOC_", "GLIBC_TUNABLES")  # variables by which a user sets the allocator


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process and its later forks keep freed memory; returns whether the allocator accepted this.

    It is not asked if `environment` has a variable that sets the allocator.
    """
    if any(name.startswith(PREFIXES) for name in environment):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return False
    options = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: MAX_KEPT_BYTES}
    return all([mallopt(option, value) == 1 for option, value in options.items()])
