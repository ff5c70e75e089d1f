"""Work that pauses after every piece, so that the steps of several fits can take turns."""

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Semaphore, Thread
from typing import Any

from experiments.bench.race import Race, race
from methods.part import Part

Work = Callable[[Callable[[], None]], Any]  # is given `pause`, to be called after each piece


class Stepwise:
    """Runs `work(pause)` up to its next `pause()` at each call of `go`; `result` is what it returned in the end.

    A thread of its own keeps its place, and never runs beside the caller: one of the two waits. `go` raises what `work`
    raised.
    """

    def __init__(self, work: Work):
        self.result: Any = None
        self._error: BaseException | None = None
        self._go, self._back = Semaphore(0), Semaphore(0)
        Thread(target=self._run, args=(work,), daemon=True).start()

    def go(self) -> None:
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, work: Work) -> None:
        self._go.acquire()
        try:
            self.result = work(self._pause)
        except BaseException as error:
            self._error = error
        self._back.release()

    def _pause(self) -> None:
        self._back.release()
        self._go.acquire()


def race_of_steps(title: str, works: Mapping[str, Work], *, against: str, rounds: int) -> tuple[Race, dict[str, Any]]:
    """A race of the works' pieces, the first of each uncounted, and what each work returned after 1 + `rounds`."""
    runs = {name: Stepwise(work) for name, work in works.items()}
    with contextlib.redirect_stderr(io.StringIO()):  # the engine's bars
        for run in runs.values():
            run.go()
        timed = race(title, {name: run.go for name, run in runs.items()}, against=against, rounds=rounds, warm=0)
        for run in runs.values():
            run.go()
    return timed, {name: run.result for name, run in runs.items()}


@dataclass(frozen=True, kw_only=True)
class Pausing(Part):
    """Pauses a fit at the end of each step, behind all other parts."""

    key = "~~ pausing"

    pause: Callable[[], None] = field(repr=False)

    def after_step(self, *, run, state, step, gradient):
        self.pause()
