"""What a finished cell came out as, in one line, and how long the rest of its study takes."""

from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from statistics import median
from typing import Any

from analysis import numbers, units
from analysis.load import record
from analysis.measures import ACCURACY, GAIN, NATS
from experiments.study import cells, ledger
from experiments.study.lock import Lock

LOST = dict(zip(NATS, ("general text", "KL", "right answers", "margin"), strict=True))


def line(found: Mapping[str, Any]) -> str:
    """Gain and what was forgotten of a cell, from what `analysis.load.record` reads, in the order of the measures."""
    nats, unit = found[GAIN[0]], found["domain_unit"]
    score = f"{units.change(found[GAIN[1]], unit)} {units.named(unit)}"
    gained = score if numbers.missing(nats) else f"{numbers.nats(nats)} nats/token"
    gained += f", {score}" if unit == units.SHARE and not numbers.missing(nats) else ""
    known = {m: name for m, name in LOST.items() if not numbers.missing(found[m.key])}
    lost = ", ".join(f"{name} {measure.show(found[measure.key])}" for measure, name in known.items())
    points = "" if numbers.missing(found[ACCURACY]) else f", accuracy {numbers.points(found[ACCURACY])} points"
    return f"gain {gained}; lost: {lost} nats{points}"


def left(study) -> str:
    """How many cells are scored with the settings of params.yaml, and about how long the others take.

    A cell takes the median time between two cells that this machine finished one after the other; where there are no
    two, what those with results needed to prepare, train and score.
    """
    grid, lock = cells.grid(study), Lock(study)
    scored = [cell for cell in grid if lock.cell(cell)["scored"]]
    if len(scored) == len(grid):
        return complete(len(grid))
    text = f"{len(scored)} of {len(grid)} cells are scored"
    if (seconds := _seconds(study, grid)) is None:
        return f"{text}; how long a cell takes is known after the first"
    rest = len(grid) - len(scored)
    return f"{text}; about {numbers.seconds(seconds * rest)} to go, {numbers.seconds(seconds)} a cell"


def complete(count: int) -> str:
    """What `left` says of a study of so many cells that are all scored."""
    return f"all {count} cells are scored"


def _seconds(study, grid: list) -> float | None:
    """Seconds a cell, as it is estimated in `left`."""
    ends = {entry["cell"]: datetime.fromisoformat(entry["when"]) for entry in ledger.entries(study)}  # a cell's last
    gaps = [(after - before).total_seconds() for before, after in pairwise(sorted(ends.values()))]
    if gaps:
        return median(gaps)
    known = [found for cell in grid if (found := record(study.paths.run(cell))) and found["cost_known"]]
    costs = [sum(found[f"seconds_{stage}"] for stage in ("prepare", "train", "evaluate")) for found in known]
    return sum(costs) / len(costs) if costs else None
