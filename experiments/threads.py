"""Pieces of a tensor worked on by several threads, each of which computes alone.

torch splits every operation among its threads and waits for all of them after each; on a machine that does other things
besides, most of the time goes into waiting. Here threads meet once for many operations. torch lets go of Python's lock
inside an operation, so they do run at once.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

MOST = 8  # threads: more would wait for Python's lock

Item = TypeVar("Item")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of threads
_kept = threading.local()
os.register_at_fork(after_in_child=_pools.clear)  # a child has no threads but its first


def spread(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[work(item) for item in items], without gradients, on as many threads as torch computes with.

    `work` touches what is the item's own, and what nobody writes. An error in one is raised after all have ended.
    """
    allowed = torch.get_num_threads()
    helpers = min(allowed, MOST, len(items)) - 1
    results: list = [None] * len(items)
    waiting = deque(enumerate(items))

    def take() -> None:
        with torch.no_grad():
            while waiting:
                try:
                    place, item = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                results[place] = work(item)

    if allowed == 1:
        take()
        return results
    others = [_pool(allowed).submit(take) for _ in range(helpers)]
    torch.set_num_threads(1)  # of this thread; also where it works alone, for sums not to depend on it
    try:
        take()
    finally:
        torch.set_num_threads(allowed)
        for other in others:
            if not other.cancel():  # one that never got a processor is not waited for
                other.result()
    return results


def _pool(allowed: int) -> ThreadPoolExecutor:
    if allowed not in _pools:
        helpers = min(allowed, MOST) - 1
        ready = threading.Barrier(helpers + 1)
        _pools[allowed] = ThreadPoolExecutor(helpers, thread_name_prefix="piece", initializer=_alone)
        for _ in range(helpers):
            _pools[allowed].submit(ready.wait)
        ready.wait()
        torch.set_num_threads(allowed)  # what a helper said of itself would hold for threads begun later
    return _pools[allowed]


def _alone() -> None:
    torch.get_num_threads()  # the first question gives a thread torch's general number, also after it was told another
    torch.set_num_threads(1)


def scratch(use: str, entries: int, dtype: torch.dtype) -> Tensor:
    """This thread's own memory on the CPU for `use`: (entries,), of any content, the same again at the next call."""
    held = _kept.__dict__
    if (use, dtype) not in held or held[use, dtype].numel() < entries:
        held[use, dtype] = torch.empty(entries, dtype=dtype)
    return held[use, dtype][:entries]
