"""Work that goes on piece by piece as it is asked to, so that the steps of several fits can take turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Semaphore, Thread
from typing import Any

from methods.part import Part


class Stepwise:
    """Runs `work(pause)` up to its next `pause()` at each call of `go`; `result` is what it returned in the end.

    A thread of its own keeps its place, and never runs beside the caller: one of the two waits. `go` raises what `work`
    raised.
    """

    def __init__(self, work: Callable[[Callable[[], None]], Any]):
        self.result: Any = None
        self._error: BaseException | None = None
        self._go, self._back = Semaphore(0), Semaphore(0)
        Thread(target=self._run, args=(work,), daemon=True).start()

    def go(self) -> None:
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, work: Callable[[Callable[[], None]], Any]) -> None:
        self._go.acquire()
        try:
            self.result = work(self._pause)
        except BaseException as error:
            self._error = error
        self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._go.acquire()


@dataclass(frozen=True, kw_only=True)
class Pausing(Part):
    """Pauses a fit at the end of each step, behind all other parts."""

    key = "~~ pausing"

    pause: Callable[[], None] = field(repr=False)

    def after_step(self, *, run, state, step, gradient):
        self.pause()
