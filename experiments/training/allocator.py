"""How the process holds CPU memory: what is freed is kept for the next tensor, and large tensors stand on large pages.

The first touch of a page costs more than the arithmetic on it, above all in a virtual machine. glibc gives what is
larger than 32 MB back at every free, and a step of training frees gigabytes.
"""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them, malloc.h


def keep_memory() -> None:
    """Ask glibc and torch for it, before torch is imported; elsewhere nothing happens. What the environment says stays."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if sys.platform == "linux" and not chosen and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
