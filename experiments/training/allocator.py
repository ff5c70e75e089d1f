"""Keep freed CPU memory for the next tensor, and put large tensors on large pages.

The first access to a page costs more than the arithmetic on it, above all in a virtual machine. By default glibc
returns blocks of more than 32 MB to the system whenever they are freed, and a training step frees gigabytes. Blocks of
512 MiB and more are returned all the same: such a block often finds no gap that is as large, and is kept beside the
next one, by which a step took up to 5 % more memory.
"""

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h


def keep_memory() -> None:
    """Set glibc's and torch's allocators, before torch is imported; settings in the environment take precedence."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if sys.platform == "linux" and not chosen and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, 1 << 29)
        library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back() -> None:
    """Return freed memory to the system: between two phases, when the next one needs other sizes."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
