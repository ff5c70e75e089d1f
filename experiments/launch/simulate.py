"""A launch without its work: the scheduler, given stages that take as long as the plan says, on a clock that jumps."""

import heapq
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from experiments.launch import tasks
from experiments.launch.schedule import Schedule, Task
from experiments.study.cells import grid

SPREAD = 0.2  # standard deviation of the logarithm of actual over planned seconds


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Seconds of a simulated launch.

    bound  that no schedule can be shorter than: the work over the workers, or the longest way, whichever is more
    """

    stages: int
    makespan: float
    bound: float


def simulate(tasks: Iterable[Task], *, workers: int, spread: float = 0.0, seed: int = 0) -> Simulated:
    """Run the tasks on so many equal workers.

    spread  standard deviation of the logarithm of what a stage takes over what the plan says, which the scheduler does
            not know; drawn by `seed`
    """
    draw, schedule = random.Random(seed), Schedule(tasks)
    takes = {name: task.seconds * draw.lognormvariate(0.0, spread) for name, task in schedule.tasks.items()}
    now, running, free = 0.0, [], workers
    while not schedule.ended:
        while free and (name := schedule.take(lambda needs: True)) is not None:
            heapq.heappush(running, (now + takes[name], name))
            free -= 1
        now, name = heapq.heappop(running)
        schedule.finish(name)
        free += 1
    known = Schedule(replace(task, seconds=takes[name]) for name, task in schedule.tasks.items())
    bound = max(sum(takes.values()) / workers, max(known.path.values(), default=0.0))
    return Simulated(stages=len(takes), makespan=now, bound=bound)


def with_seeds(study, *, after: Mapping[str, frozenset[str]], plan: Mapping, cells: int) -> tuple[list[Task], int]:
    """The tasks of the study's grid with as many seeds as give it at least so many cells, and their number of cells.

    after  what the stages of the study's first seed read, which those of every other seed read alike
    plan   what `plan` says of the cells of the first seed
    """
    first = study.grid.seeds[0]
    own = [cell for cell in grid(study) if cell.seed == first]
    seeds = range(-(-cells // len(own)))
    known = tasks.names(study)

    def of(name: str, seed: int) -> str:
        """The stage of another seed; stages that no seed enters are the same."""
        kind = name.partition("@")[0]
        if cell := known.cells.get(name):
            return f"{kind}@{replace(cell, seed=seed).stage}"
        return f"prepare@{cell.model}-{cell.method}-{seed}" if (cell := known.prepared.get(name)) else name

    ours = set(tasks.needed(after, [f"{kind}@{cell.stage}" for cell in own for kind in tasks.ENDS]))
    waits = {of(name, seed): frozenset(of(a, seed) for a in after[name]) for name in ours for seed in seeds}
    larger = study.model_copy(update={"grid": study.grid.model_copy(update={"seeds": list(seeds)})})
    rows = [row | {"cell": f"{row['cell'].rpartition('/')[0]}/seed{seed}"} for row in plan["cells"] for seed in seeds]
    needs = {model: tasks.Needs() for model in study.grid.models}
    made = tasks.build(larger, after=waits, needed=waits, plan={**plan, "cells": rows}, needs=needs)
    return made, len(own) * len(seeds)
