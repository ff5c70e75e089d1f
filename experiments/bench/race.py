"""Ratios of running times that a busy machine cannot fake: the same work several ways, in turn, round after round.

    ratio_min      fastest time of a runner / fastest time of the reference
    ratio_median   median over rounds of (its time in the round / the reference's in the same round)

Neighbours in a round share the state of the machine, so the median of their ratios says more than a ratio of medians.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from methods.tools import garbage


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a runner's ratio is to be: at most `limit` times the reference's time, or at least `limit` times faster."""

    runner: str
    limit: float
    faster: bool = False  # the reference takes at least `limit` times as long

    def text(self) -> str:
        return f"at least {self.limit:g} times faster" if self.faster else f"at most {self.limit:g} times"

    def met(self, ratio: float) -> bool:
        return 1 / ratio >= self.limit if self.faster else ratio <= self.limit


@dataclass(frozen=True, kw_only=True)
class Race:
    """One comparison: what was run, the seconds of every round, and the ratios to `against`."""

    title: str
    against: str
    seconds: dict[str, list[float]]
    goals: tuple[Goal, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # sizes, errors, whatever else the reader needs; JSON values

    def ratio_min(self, runner: str) -> float:
        return min(self.seconds[runner]) / min(self.seconds[self.against])

    def ratio_median(self, runner: str) -> float:
        return median(own / other for own, other in zip(self.seconds[runner], self.seconds[self.against], strict=True))

    def record(self) -> dict[str, Any]:
        """As JSON: one row a runner, in the order they were given."""
        rows = [
            {
                "runner": name,
                "seconds_min": min(times),
                "seconds_median": median(times),
                "ratio_min": self.ratio_min(name),
                "ratio_median": self.ratio_median(name),
            }
            for name, times in self.seconds.items()
        ]
        goals = [
            asdict(goal) | {"text": goal.text(), "met": goal.met(self.ratio_min(goal.runner))} for goal in self.goals
        ]
        return {
            "title": self.title,
            "against": self.against,
            "rounds": len(next(iter(self.seconds.values()))),
            "rows": rows,
            "goals": goals,
            "facts": self.facts,
        }


def race(
    title: str,
    runners: Mapping[str, Callable[[], Any]],
    *,
    against: str,
    rounds: int = 7,
    warm: int = 1,
    own_clock: bool = False,
    goals: Sequence[Goal] = (),
    facts: Mapping[str, Any] | None = None,
) -> Race:
    """Time every runner once a round, after `warm` rounds that do not count; the order turns by one each round.

    own_clock  runners return their seconds: only a part of what they do is compared
    Raises ValueError where `against` or a goal names no runner.
    """
    if unknown := {against, *(goal.runner for goal in goals)} - set(runners):
        raise ValueError(f"{sorted(unknown)[0]!r} is no runner of {title!r}: {', '.join(runners)}")
    names = list(runners)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    with garbage.frozen():  # the libraries' objects are not walked through again by every collection
        for turn in range(warm + rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                gc.collect()
                began = perf_counter()
                returned = runners[name]()
                took = returned if own_clock else perf_counter() - began
                if turn >= warm:
                    seconds[name].append(took)
    return Race(title=title, against=against, seconds=seconds, goals=tuple(goals), facts=dict(facts or {}))
