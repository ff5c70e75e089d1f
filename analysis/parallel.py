"""Work on several comparisons at once: most of what a summary of many takes is done for each (model, domain) alone."""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

_work: list[Callable] = []  # of a forked process, what it does


def each(work: Callable[[str, str], Any], comparisons: Sequence[tuple[str, str]]) -> list[Any]:
    """work(model, domain) of each comparison, in order; on Linux every core takes some of them.

    What `work` remembers in its arguments stays in the forked process, and its results come back pickled.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    if min(cores, len(comparisons)) < 2:
        return [work(*pair) for pair in comparisons]
    # forked processes have the study's results without a copy
    with ProcessPoolExecutor(min(cores, len(comparisons)), get_context("fork"), _work.append, (work,)) as pool:
        return list(pool.map(_of, comparisons))


def _of(pair: tuple[str, str]) -> Any:
    return _work[-1](*pair)
