"""Work on many parts of a study at once, such as its cells or each (model, domain)."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any

from methods.errors import UserError
from methods.tools import garbage

PR_SET_PDEATHSIG = 1

_work: list[Callable] = []  # of a forked process, what it does
_now = {"busy": False, "stopped": False}  # of a forked process


def each(work: Callable[..., Any], parts: Sequence[tuple], *, at_once: int = 1) -> list[Any]:
    """work(*part) of each part, in order; on Linux every core takes some of them, `at_once` at a time.

    What `work` remembers in its arguments stays in the forked process, and its results come back pickled. Raises
    UserError where one of the processes is killed.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    processes = min(cores, -(-len(parts) // at_once))
    if processes < 2:
        return [work(*part) for part in parts]
    # forked processes have the study's results without a copy; what is garbage here is not theirs to collect: an object
    # that waits for a thread of this process as it goes would end them
    with garbage.frozen(), ProcessPoolExecutor(processes, get_context("fork"), _begin, (work, os.getpid())) as pool:
        try:
            return list(pool.map(_of, parts, chunksize=at_once))
        except BrokenProcessPool:
            raise UserError(
                "a process that this command had started was killed, perhaps by the system for want of memory: run the "
                "same command again while nothing else runs, or on a machine with more memory"
            ) from None
        except BaseException:  # bad input or Ctrl-C: nobody waits for the other parts
            for process in active_children():
                os.kill(process.pid, signal.SIGUSR1)
            raise


def _begin(work: Callable[..., Any], parent: int) -> None:
    """Of a forked process: leave Ctrl-C to the parent, and end when that ends, with the locks that were inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, _stop)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    _work.append(work)


def _stop(*_: Any) -> None:
    """End the part at work and begin no other; a process that is killed would leave the pool to print its errors."""
    _now["stopped"] = True
    if _now["busy"]:
        raise KeyboardInterrupt


def _of(part: tuple) -> Any:
    if _now["stopped"]:
        raise KeyboardInterrupt
    _now["busy"] = True
    try:
        return _work[-1](*part)
    finally:
        _now["busy"] = False
