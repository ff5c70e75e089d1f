"""How long the rest of a launch takes: the plan's seconds of each stage, corrected by what was measured."""

from collections.abc import Mapping

from experiments.launch.schedule import Schedule


class Estimate:
    """Seconds of stages, planned × (measured / planned) of the stages of the same kind that have ended.

    A kind of which nothing was planned (`collect`, `drift`) takes the mean of what was measured; one of which nothing
    was measured is corrected as all others together.
    """

    def __init__(self, planned: Mapping[str, float]):
        self._planned = planned
        self._measured: dict[str, list[float]] = {}  # kind: [planned, measured, number]

    def measured(self, name: str, seconds: float) -> None:
        for kind in (name.partition("@")[0], "") if self._planned.get(name) else (name.partition("@")[0],):
            sums = self._measured.setdefault(kind, [0.0, 0.0, 0])
            sums[0] += self._planned.get(name, 0.0)
            sums[1] += seconds
            sums[2] += 1

    def seconds(self, name: str) -> float:
        planned, kind = self._planned.get(name, 0.0), name.partition("@")[0]
        before, after, count = self._measured.get(kind) or self._measured.get("") or (0.0, 0.0, 0)
        if kind in self._measured and not before:
            return after / count
        return planned * after / before if before else planned

    @property
    def factor(self) -> float | None:
        """Measured seconds over planned ones; None before a planned stage has ended."""
        before, after, _ = self._measured.get("") or (0.0, 0.0, 0)
        return after / before if before else None

    def left(self, schedule: Schedule, *, slots: float, elapsed: Mapping[str, float]) -> float:
        """Seconds until the end: the work over the slots, or the longest way that is left, whichever is more.

        slots    tasks that run at once
        elapsed  seconds for which the running tasks have run
        """
        rest = {name: max(0.0, self.seconds(name) - elapsed.get(name, 0.0)) for name in schedule.open()}
        factor = self.factor or 1.0
        ran = {name: min(elapsed.get(name, 0.0), factor * schedule.tasks[name].seconds) for name in rest}
        longest = max((factor * schedule.path[name] - ran[name] for name in rest), default=0.0)
        return max(sum(rest.values()) / max(slots, 1.0), longest)
