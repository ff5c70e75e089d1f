"""A stop by Ctrl-C (SIGINT), or by the system or a scheduler (SIGTERM), which are handled alike."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from methods.errors import UserError


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, both signals raise KeyboardInterrupt, wherever the program is; SIGINT unless it is ignored.

    A library that is at work at that moment may raise an error of its own instead: torch, that a storage has no shape,
    where the stop kept it from asking for its length. That comes out as KeyboardInterrupt, too; a UserError, which says
    what a stop ended, comes out as it is. Python lets no error out of a finalizer: a stop that meets one comes again.
    """
    asked: list[int] = []
    again: list[threading.Timer] = []
    show = sys.unraisablehook

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    def ignored(error: Any) -> None:
        if asked and error.exc_type is KeyboardInterrupt:
            again.append(threading.Timer(0.01, os.kill, (os.getpid(), asked[-1])))
            again[-1].start()
        else:
            show(error)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.SIG_IGN:
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, stop)
    sys.unraisablehook = ignored
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = show
        for number, handler in before.items():
            signal.signal(number, handler)
