"""One display of a launch: every cell with what it does, and the time that is left."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from analysis import numbers
from analysis.load import record
from experiments.launch.tasks import OF_CELL
from experiments.study import outcome

STATES = ("running", "set aside", "waiting", "scored", "finished")
INTERVAL, SHARE = 0.5, 0.05  # seconds between two drawings at least, and the share of the time that they may take
QUIET = 300.0  # seconds after which a log says how far the launch is, where no cell has ended meanwhile


class Display:
    """On a terminal one table that is drawn anew; elsewhere a line for each cell that ends, and some between."""

    def __init__(self, study: Any, cells: list):
        self._study, self._cells = study, cells
        self._live: Any = None
        if sys.stdout.isatty():
            from rich.live import Live

            self._live = Live(refresh_per_second=2, transient=False)
            self._live.start()
        self._next = 0.0
        self._quiet = 0.0  # until then a log has no line

    def say(self, line: str) -> None:
        """A line that stays."""
        with suppress(OSError):  # a terminal that is gone
            if self._live:
                self._live.console.print(line, markup=False, highlight=False)
            else:
                print(line, flush=True)

    def done(self, launch: Any, name: str) -> None:
        """A finished cell's gain and loss, in one line."""
        if name.startswith("collect@") and (found := record(self._study.paths.run(launch.names.cells[name]))):
            self.say(f"{launch.names.cells[name].name}: {outcome.line(found)}")
            if not self._live:
                self._draw(lambda: self.say(self.line(launch)))
                self._quiet = time.monotonic() + QUIET

    def update(self, launch: Any) -> None:
        if self._live:
            self._draw(lambda: self._live.update(self._table(launch)))
        elif self._cells and time.monotonic() >= self._quiet:
            self.say(self.line(launch))
            self._quiet = time.monotonic() + QUIET

    def _draw(self, draw: Callable[[], None]) -> None:
        """Draw if it is time: with many cells a drawing takes long, and the driver has other work."""
        if (began := time.monotonic()) >= self._next:
            with suppress(OSError):
                draw()
            self._next = began + max(INTERVAL, (time.monotonic() - began) / SHARE)

    def stopping(self, launch: Any) -> None:
        self.say("stopping: each training that runs ends its step and writes its checkpoint first")

    def close(self, launch: Any) -> None:
        """The last state of all cells."""
        if self._live:
            with suppress(OSError):
                self._live.update(self._table(launch))
                self._live.stop()
            self._live = None
        elif self._cells:
            self.say(self.line(launch))

    def state(self, launch: Any, cell: Any) -> tuple[str, str]:
        """What a cell does: one of STATES, and more in words."""
        schedule = launch.schedule
        own = [name for kind in OF_CELL if (name := f"{kind}@{cell.stage}") in schedule.tasks]
        if all(name in schedule.done for name in own):
            return "finished", ""
        before = [f"prepare@{cell.model}-{cell.method}-{cell.seed}", f"base@{cell.model}"]
        if running := next((name for name in own if name in schedule.running), None):
            return "running", self._running(launch, running)
        if any(name in schedule.aside for name in own):
            reason = next((launch.reasons[name] for name in [*own, *before] if name in launch.reasons), "")
            return "set aside", reason
        if f"collect@{cell.stage}" in schedule.done:
            return "scored", f"{', '.join(name.partition('@')[0] for name in own if name not in schedule.done)} to come"
        shared = next((name for name in before if name in schedule.running), None)
        return "waiting", f"while this runs: {self._running(launch, shared)}" if shared else ""

    def _running(self, launch: Any, name: str) -> str:
        """Which stage runs, for how long, and how long it takes yet."""
        elapsed = time.monotonic() - launch.began.get(name, time.monotonic())
        about = launch.estimate.seconds(name)
        left = f", about {numbers.seconds(max(0.0, about - elapsed))} to go" if about else ""
        return f"{name.partition('@')[0]} for {numbers.seconds(elapsed)}{left}"

    def line(self, launch: Any) -> str:
        """How many cells are in each state, how many stages run that several share, and how long the rest takes."""
        counts = dict.fromkeys(STATES, 0)
        for cell in self._cells:
            counts[self.state(launch, cell)[0]] += 1
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        if shared := sum(name.partition("@")[0] not in OF_CELL for name in launch.schedule.running):
            told += f"; {shared} shared stage{'s' if shared != 1 else ''} running"
        return f"{len(self._cells)} cell{'s' if len(self._cells) != 1 else ''}: {told}{self._left(launch)}"

    def _left(self, launch: Any) -> str:
        if launch.schedule.ended:
            return ""
        now = time.monotonic()
        elapsed = {name: now - launch.began.get(name, now) for name in launch.schedule.running}
        shapes = [task.needs for task in launch.schedule.tasks.values() if not task.needs.here]
        slots = launch.workers.slots(shapes[0]) if shapes else 1.0
        left = launch.estimate.left(launch.schedule, slots=slots, elapsed=elapsed)
        factor = launch.estimate.factor
        return f"; about {numbers.seconds(left)} to go" + (
            f" (measured {factor:.{2 if factor < 10 else 0}f} × the plan)" if factor else ""
        )

    def _table(self, launch: Any) -> Any:
        from rich.table import Table
        from rich.text import Text  # of which nothing is read as markup

        states = {cell.name: self.state(launch, cell) for cell in self._cells}
        order = sorted(self._cells, key=lambda cell: STATES.index(states[cell.name][0]))
        room = max(5, self._live.console.height - 4)
        table = Table(title=Text(self.line(launch)), box=None, title_justify="left", pad_edge=False)
        for heading in ("cell", "state", ""):
            table.add_column(heading, no_wrap=True)
        for cell in order[:room]:
            table.add_row(*map(Text, (cell.name, *states[cell.name])))
        if len(order) > room:
            table.add_row(f"… {len(order) - room} more", "", "")
        return table
