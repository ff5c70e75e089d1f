"""Measure what a claim of docs/claims.yaml is about: in the comparison, benchmark records and movements of the weights.

A score comes with its interval over items and seeds. A cost measured with several seeds comes with its lowest and
highest seed; a race with the ratio of its fastest rounds beside the median of the ratios, so that a verdict has to hold
by both. Seconds count as often as they were measured: a preparation or a training that several cells share was timed
once, and so was a race of one round.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from analysis import units
from analysis.load import Loaded, retention_tasks
from analysis.measures import BY_KEY, NATS
from analysis.statistics.comparison import COSTS, mean_if_known
from analysis.statistics.intervals import FIXED, Interval, by_run, of_arrays, paired
from analysis.statistics.nats import Changes
from methods.tools.names import unknown

SCORES = ("forgetting", "domain_gain", "domain_score", "general_score")
IN_NATS = tuple(measure.key for measure in NATS)
PREPARE, TRAIN = "seconds_prepare", "seconds_train"
ALIKE = 0.01  # two timings, or numbers of tokens, that differ by less than this share of the larger count as one


class Strict(BaseModel):
    """A block of docs/claims.yaml; a key that it does not have is refused with the nearest one that it has."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, block):
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in block if isinstance(block, Mapping) else ():
            if key not in known:
                raise unknown("key", key, known, where=f"a block `{cls.__name__.lower()}` of docs/claims.yaml")
        return block


class Table(Strict):
    """A number of finished cells: of `method`, or its difference from or ratio to that of `against`."""

    metric: Literal[*IN_NATS, *SCORES, *COSTS]
    method: str
    against: str = ""
    way: Literal["value", "difference", "ratio"] = Field(alias="as")

    @model_validator(mode="after")
    def _needs_against(self):
        if self.way != "value" and not self.against:
            raise ValueError("against is missing")
        return self


class Bench(Strict):
    """The time of `runner` over that of `against` in results/bench/RECORD.json: the median of the ratios of a round."""

    record: str
    runner: str
    against: str


class Fact(Strict):
    """A fact of results/bench/RECORD.json by its name."""

    record: str
    name: str


class Drift(Strict):
    """The ratio of two methods' movements from the base, from drift.json."""

    metric: Literal["distance", "relative"]
    method: str
    against: str
    way: str = "ratio"


class Measure(Strict):
    """One place to look at; `equal` names settings that both methods must share."""

    table: Table | None = None
    bench: Bench | None = None
    fact: Fact | None = None
    drift: Drift | None = None
    equal: list[str] = []

    @model_validator(mode="after")
    def _one_place(self):
        if sum(place is not None for place in (self.table, self.bench, self.fact, self.drift)) != 1:
            raise ValueError("name one place to look at: table, bench, fact or drift")
        return self


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one place holds. `value` is None if it holds nothing; `why` says why, or why it may not be compared."""

    where: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    ends: str = ""  # what low and high are
    n: str = ""
    model: str = ""
    domain: str = ""
    why: str = ""
    metric: str = ""
    once: bool = False  # seconds of one timing: a busy machine changes them by more than most claims are about


def measured(loaded: Loaded, comparison: pd.DataFrame, measures: Sequence[Measure]) -> list[Measured]:
    """What all places of a claim hold; at least one entry. `comparison` is `analysis.statistics.comparison`'s table."""
    entries = []
    for measure in measures:
        if measure.bench:
            entries.append(_race(loaded, measure.bench))
        elif measure.fact:
            entries.append(_fact(loaded, measure.fact))
        else:
            entries += _cells(loaded, comparison, measure)
    return entries or [Measured(where="–")]


def _race(loaded: Loaded, place: Bench) -> Measured:
    where = f"results/bench/{place.record}.json: {place.runner} against {place.against}"
    for race in _races(loaded, place.record):
        row = next((row for row in race["rows"] if row["runner"] == place.runner), None)
        if row and race["against"] == place.against:
            median, fastest, rounds = float(row["ratio_median"]), float(row["ratio_min"]), race["rounds"]
            ends = {"low": min(median, fastest), "high": max(median, fastest), "ends": "fastest rounds and median"}
            n = f"{rounds} round{'s' if rounds != 1 else ''}"
            return Measured(where=where, value=median, n=n, once=rounds == 1, **(ends if rounds > 1 else {}))
    return Measured(where=where, why=f"`python -m experiments bench {place.record}` has not measured it")


def _fact(loaded: Loaded, place: Fact) -> Measured:
    where = f"results/bench/{place.record}.json: {place.name}"
    for race in _races(loaded, place.record):
        if isinstance(value := race["facts"].get(place.name), int | float):
            return Measured(where=where, value=float(value), n="1 model")
    return Measured(where=where, why=f"`python -m experiments bench {place.record}` has not measured it")


def _races(loaded: Loaded, name: str) -> list[dict]:
    return next((record["races"] for path, record in loaded.bench.items() if path.stem == name), [])


def _cells(loaded: Loaded, comparison: pd.DataFrame, measure: Measure) -> Iterator[Measured]:
    """One entry per (model, domain) that has the methods, or one that says that none has them."""
    place = measure.table or measure.drift
    metric, methods = place.metric, list(filter(None, (place.method, place.against)))
    what = f"{metric} of {' against '.join(methods)}"
    compared, timed = 0, []
    for model, domain in loaded.comparisons if len(loaded.cells) else ():
        cells = loaded.of(model, domain)
        if not set(methods) <= set(cells["method"]):
            continue
        compared += 1
        about = {"where": f"{model}, {domain}: {what}", "model": model, "domain": domain, "metric": metric}
        own = [cells[cells["method"] == method].sort_values("seed") for method in methods]
        common = set.intersection(*(set(group["seed"]) for group in own))
        groups = [group[group["seed"].isin(common)] for group in own]
        unit = units.of_domain(cells.iloc[0])
        if not common:
            yield Measured(**about, why=f"{methods[0]} and {methods[1]} have no seed in common")
            continue
        if measure.table and metric.startswith("domain_") and unit != units.SHARE:
            yield Measured(**about, why=f"the gain is in {unit}, not in points")
            continue
        if measure.drift:
            entry = _movement(loaded, groups, metric)
        elif place.way == "value":
            entry = _value(comparison, groups[0], metric)
        elif metric in IN_NATS:
            entry = _nats(loaded, groups, metric, place.way)
        elif metric in SCORES:
            entry = _score(loaded, groups, metric, place.way)
        else:
            timings = [_timings(loaded, group, metric) for group in groups]
            entry = _cost(groups, metric, place.way, timings=timings)
            if metric == PREPARE:
                if any(timings == earlier for earlier in timed):
                    continue  # the cells of another domain took the same preparations from the store
                timed.append(timings)
        why = _unequal(loaded, groups, measure.equal, metric)
        yield Measured(**about | entry | ({"why": why} if why else {}))
    if not compared:
        yield Measured(where=what, why=f"no model and domain with finished cells of {' and '.join(methods)}")


def _unequal(loaded: Loaded, groups: list[pd.DataFrame], equal: Sequence[str], metric: str) -> str:
    """What has to be equal and is not; times have to be of one machine."""
    if loaded.not_a_result:
        return "demo or random weights: not a result"
    for key in [*equal, *(["hardware"] if metric.startswith("seconds_") else [])]:
        values = [value for group in groups for value in _settings(group, key)]
        if key.startswith("tokens_") and all(isinstance(value, int | float) for value in values):
            values = _distinct(values)  # parts cut documents in ways of their own
        if len(shown := dict.fromkeys(map(str, values))) > 1:
            return f"{key.replace('_', ' ')} is not equal: {' and '.join(shown)}"
    return ""


def _settings(cells: pd.DataFrame, key: str) -> list:
    """A column of the cells, or else what their parts' blocks say under this name."""
    if key in cells:
        return cells[key].to_list()
    blocks = [block for parts in cells["parts"] for block in parts.values() if isinstance(block, dict)]
    return [block[key] for block in blocks if key in block] or [None]


def _value(comparison: pd.DataFrame, cells: pd.DataFrame, metric: str) -> dict:
    """The comparison's own number and interval."""
    keys, first = ["model", "domain", "method"], cells.iloc[0]
    row = comparison[(comparison[keys] == list(first[keys])).all(axis=1)].iloc[0]
    keys = (metric, f"{metric}_low", f"{metric}_high")
    value, low, high = (None if pd.isna(row.get(key)) else float(row[key]) for key in keys)
    rows = row["n_domain"] if metric.startswith("domain") else row["n_retention"]
    if metric in BY_KEY and BY_KEY[metric].general:
        rows = first["n"].get("general_text", 0)
    n = _n(int(rows) if metric in (*SCORES, *IN_NATS) else 0, len(cells))
    return {"value": value, "n": n} | _ends(Interval(value, low, high, 0), len(cells))


def _nats(loaded: Loaded, groups: list[pd.DataFrame], metric: str, way: str) -> dict:
    """A difference of two methods in a measure in nats over the same items; of a ratio the value alone."""
    changes = [Changes(loaded, group).of(BY_KEY[metric], list(group.index)) for group in groups]
    if None in changes:
        return {"why": f"{metric} is not known of all cells"}
    first, second = (change.interval for change in changes)
    n = _n(first.n, len(groups[0]))
    if way == "ratio":  # of changes, which has no usable interval where the second is near 0
        return {"value": first.value / second.value, "n": n} if second.value else {"why": f"{metric} is zero"}
    difference = (changes[0] - changes[1]).interval
    return {"value": difference.value, "n": n} | _ends(difference, len(groups[0]))


def _score(loaded: Loaded, groups: list[pd.DataFrame], metric: str, way: str) -> dict:
    """A difference or ratio of two methods' scores over the same items; without all items, the value alone."""
    first, seeds = groups[0].iloc[0], len(groups[0])
    tasks = [first["domain"]] if metric.startswith("domain") else retention_tasks(first)
    means = [mean_if_known(group[metric]) for group in groups]
    if None in means or (way == "ratio" and not means[1]):
        return {"why": f"{metric} is not known of all cells"}
    value = means[0] - means[1] if way == "difference" else means[0] / means[1]
    entry = {"value": value, "n": _n(sum(first["n"].get(task, 0) for task in tasks), seeds)}
    scores = [_arrays(loaded, group, tasks) for group in groups]
    if not tasks or None in scores:
        return entry
    if way == "difference":
        sign = -1 if metric == "forgetting" else 1
        return entry | _ends(of_arrays([sign * (a - b) for a, b in zip(*scores)]), seeds)
    if metric not in ("domain_score", "general_score"):
        return entry  # the ratio of a change has no usable interval where the change is near 0
    mean = of_arrays(scores[1]).value
    deviation = of_arrays([(a - value * b) / mean for a, b in zip(*scores)], step=1 / mean)  # delta method
    return entry | _ends(deviation, seeds, shift=value)


def _arrays(loaded: Loaded, cells: pd.DataFrame, tasks: list[str]) -> list[np.ndarray] | None:
    """Scores of each task, (S seeds, n items), in the order of the base's rows; None if items are missing."""
    base, items = loaded.base_items(cells.iloc[0]["model"]), loaded.items_of(cells)
    if base.empty or items.empty or items["cell"].nunique() < len(cells):
        return None
    pairs = paired(base, items)[[*FIXED, *cells.index]]  # runs in the order of their seeds
    arrays = [by_run(pairs[pairs["task"] == task]) for task in tasks]
    complete = all(array.shape[1] == cells.iloc[0]["n"].get(task) for task, array in zip(tasks, arrays))
    return arrays if complete else None


def _cost(groups: list[pd.DataFrame], metric: str, way: str, *, timings: list[list[float]] = ()) -> dict:
    """A cost's ratio or difference, seed by seed; `timings` are the distinct ones of each method, if it is a time."""
    values = [group[metric].astype(float).to_numpy() if metric in group else np.array([np.nan]) for group in groups]
    if any(np.isnan(group).any() for group in values) or (way == "ratio" and not values[1].all()):
        return {"why": f"{metric} is unknown or zero"}
    each = values[0] / values[1] if way == "ratio" else values[0] - values[1]
    if metric == TRAIN and len(groups) > 1 and timings[0] == timings[1]:
        return {"why": "both take the time of one training, from which they begin"}
    timed = metric.startswith("seconds_")
    times = min(map(len, timings)) if timed else len(each)
    ends = {"low": float(each.min()), "high": float(each.max()), "ends": "lowest and highest seed"} if times > 1 else {}
    n = f"{times} timing{'s' if times != 1 else ''}" if timed else _n(0, len(each))
    return {"value": float(each.mean()), "n": n, "once": timed and times == 1} | ends


def _timings(loaded: Loaded, cells: pd.DataFrame, metric: str) -> list[float]:
    """The seconds that were measured: one for all cells that took one preparation from the store, or one training."""
    if metric not in cells:
        return []
    seconds = cells[metric].astype(float)
    if metric == PREPARE:  # a cell's own work before its first step, which is added to it, is timed for each
        stored = [loaded.prepared.get(cell, {}).get(PREPARE) for cell in cells.index]
        seconds = [own if kept is None else kept for own, kept in zip(seconds, stored)]
    return _distinct(seconds)


def _distinct(values: Iterable[float]) -> list[float]:
    """The values in ascending order without those that are ALIKE the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value - kept[-1] > ALIKE * abs(value):
            kept.append(value)
    return kept


def _movement(loaded: Loaded, groups: list[pd.DataFrame], metric: str) -> dict:
    moved = [[loaded.drift.get(cell, {}).get("overall", {}).get(metric) for cell in group.index] for group in groups]
    if any(value is None for values in moved for value in values) or not all(moved[1]):
        return {"why": "the movement of these cells is not measured (drift.json)"}
    return _cost([group.assign(moved=values) for group, values in zip(groups, moved)], "moved", "ratio")


def _ends(interval: Interval, seeds: int, *, shift: float = 0.0) -> dict:
    if interval.low is None:
        return {}
    about = "other seeds and other items" if seeds > 1 else "other items: this run, not this method"
    return {"low": shift + interval.low, "high": shift + interval.high, "ends": f"95 %, {about}"}


def _n(rows: int, seeds: int) -> str:
    return (f"{rows} rows, " if rows else "") + f"{seeds} seed{'s' if seeds != 1 else ''}"
