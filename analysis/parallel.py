"""Work on many parts of a study at once, such as its cells or each (model, domain)."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

_work: list[Callable] = []  # of a forked process, what it does


def each(work: Callable[..., Any], parts: Sequence[tuple], *, at_once: int = 1) -> list[Any]:
    """work(*part) of each part, in order; on Linux every core takes some of them, `at_once` at a time.

    What `work` remembers in its arguments stays in the forked process, and its results come back pickled.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    processes = min(cores, -(-len(parts) // at_once))
    if processes < 2:
        return [work(*part) for part in parts]
    # forked processes have the study's results without a copy
    with ProcessPoolExecutor(processes, get_context("fork"), _work.append, (work,)) as pool:
        return list(pool.map(_of, parts, chunksize=at_once))


def _of(part: tuple) -> Any:
    return _work[-1](*part)
