"""A stop by Ctrl-C (SIGINT), or by the system or a scheduler (SIGTERM), which are handled alike."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from methods.errors import UserError


@contextmanager
def heeded() -> Iterator[None]:
    """Inside, both signals raise KeyboardInterrupt, wherever the program is; SIGINT unless it is ignored.

    A library that is at work at that moment may raise an error of its own instead: torch, that a storage has no shape,
    where the stop kept it from asking for its length. That comes out as KeyboardInterrupt, too; a UserError, which says
    what a stop ended, comes out as it is.
    """
    asked: list[int] = []

    def stop(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.SIG_IGN:
        del before[signal.SIGINT]
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
