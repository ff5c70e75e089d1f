"""Where docs/claims.yaml looks for what was measured: the comparison, benchmark records, movement of the weights.

A score comes with its interval over items and seeds. A cost that several seeds measured comes with its lowest and highest; a race
with the ratio of its fastest rounds beside the median of the ratios, so that a verdict has to hold by both.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import units
from analysis.load import Loaded, retention_tasks
from analysis.statistics.comparison import COSTS, mean_if_known
from analysis.statistics.intervals import FIXED, by_run, of_arrays, paired
from methods.errors import UserError
from methods.tools.names import unknown

SCORES = ("forgetting", "domain_gain", "domain_score", "general_score")
DRIFTS = ("distance", "relative")
REUSED = "seconds_prepare"  # cells of one preparation share its timing
KEYS = {
    "table": {"metric", "method", "against", "as"},
    "bench": {"record", "runner", "against"},
    "fact": {"record", "name"},
    "drift": {"metric", "method", "against"},
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was found in one place; value None where nothing was, `why` where it may not be compared or is not there."""

    where: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    ends: str = ""  # what low and high are
    n: str = ""
    model: str = ""
    domain: str = ""
    why: str = ""
    once: bool = False  # seconds of one timing: a busy machine moves them by more than most claims are about


def check(measure: Any, *, where: str, scope: str) -> None:
    """Refuse a measure that does not say where to look, by name."""
    if not isinstance(measure, Mapping) or len(kinds := [key for key in measure if key in KEYS]) != 1:
        raise UserError(f"{where} is {measure!r}: name one place to look, {', '.join(KEYS)}")
    (kind,) = kinds
    for key in measure:
        if key not in (kind, "equal"):
            raise unknown("key", key, [kind, "equal"], where=where)
    for key in measure[kind]:
        if key not in KEYS[kind]:
            raise unknown("key", key, KEYS[kind], where=f"{where}.{kind}")
    way = measure[kind].get("as", "ratio")
    needed = KEYS[kind] - ({"against"} if way == "value" else set())
    if missing := sorted(needed - measure[kind].keys()):
        raise UserError(f"{where}.{kind}: {', '.join(missing)} is missing")
    known = {"table": (*SCORES, *COSTS), "drift": DRIFTS}.get(kind)
    if known and measure[kind]["metric"] not in known:
        raise unknown("metric", measure[kind]["metric"], known, where=f"{where}.{kind}")
    if way not in ("value", "difference", "ratio"):
        raise UserError(f"{where}.{kind}.as is {way!r}: it must be value, difference or ratio")
    if scope == "setting" and kind in ("bench", "fact"):
        raise UserError(
            f"{where}: a benchmark is of no model and domain of a study, so the claim's scope must be `any`"
        )


def look(
    loaded: Loaded, comparison: pd.DataFrame, measures: Sequence[Mapping], *, drift: Mapping[str, dict]
) -> list[Measured]:
    """What all places hold, at least one entry: where none holds anything, why."""
    found = [entry for measure in measures for entry in _look(loaded, comparison, measure, drift)]
    return found or [Measured(where="–")]


def _look(loaded: Loaded, comparison: pd.DataFrame, measure: Mapping, drift: Mapping[str, dict]) -> Iterator[Measured]:
    if "bench" in measure:
        yield _race(loaded, **measure["bench"])
    elif "fact" in measure:
        yield _fact(loaded, **measure["fact"])
    else:
        yield from _cells(loaded, comparison, measure, drift)


def _race(loaded: Loaded, *, record: str, runner: str, against: str) -> Measured:
    """The ratio of a runner's time to another's in the first race that has both."""
    where = f"results/bench/{record}.json: {runner} against {against}"
    for race in _record(loaded, record).get("races", []):
        row = next((row for row in race["rows"] if row["runner"] == runner), None)
        if row and race["against"] == against:
            median, fastest = float(row["ratio_median"]), float(row["ratio_min"])
            both = (
                {"low": min(median, fastest), "high": max(median, fastest), "ends": "fastest rounds and median"}
                if race["rounds"] > 1
                else {}
            )
            return Measured(
                where=where, value=median, n=f"{race['rounds']} round{'s' if race['rounds'] != 1 else ''}", **both
            )
    return Measured(where=where, why=f"`python -m experiments bench {record}` has not measured it")


def _fact(loaded: Loaded, *, record: str, name: str) -> Measured:
    where = f"results/bench/{record}.json: {name}"
    for race in _record(loaded, record).get("races", []):
        if isinstance(value := race["facts"].get(name), int | float):
            return Measured(where=where, value=float(value), n="1 model")
    return Measured(where=where, why=f"`python -m experiments bench {record}` has not measured it")


def _record(loaded: Loaded, name: str) -> dict:
    return next((record for path, record in loaded.bench.items() if path.stem == name), {})


def _cells(loaded: Loaded, comparison: pd.DataFrame, measure: Mapping, drift: Mapping[str, dict]) -> Iterator[Measured]:
    """One entry a (model, domain) that has the methods; one that says so where none has."""
    (kind,) = measure.keys() - {"equal"}
    asked = measure[kind]
    methods = [asked["method"], *([asked["against"]] if "against" in asked else [])]
    what = f"{asked['metric']} of {' against '.join(methods)}"
    compared, timed = 0, set()
    for model, domain in loaded.comparisons if len(loaded.cells) else ():
        cells = loaded.of(model, domain)
        if not set(methods) <= set(cells["method"]):
            continue
        compared += 1
        groups = _paired_seeds(cells, methods)
        place = {"where": f"{model}, {domain}: {what}", "model": model, "domain": domain}
        if groups is None:
            yield Measured(**place, why=f"{methods[0]} and {methods[1]} have no seed in common")
            continue
        if (
            kind != "drift"
            and asked["metric"].startswith("domain_")
            and (unit := units.of_domain(cells.iloc[0])) != units.SHARE
        ):
            yield Measured(**place, why=f"the gain is in {unit}, not in points")
            continue
        if kind == "drift":
            found = _moved(groups, asked["metric"], drift)
        elif asked["as"] == "value":
            found = _value(comparison, groups[0], asked["metric"])
        elif asked["metric"] in SCORES:
            found = _score(loaded, groups, asked["metric"], asked["as"])
        else:
            found = _cost(groups, asked["metric"], asked["as"])
            if asked["metric"] == REUSED and _timings(groups) <= timed:
                continue  # another domain's cells took the same preparation from the store
            timed |= _timings(groups) if asked["metric"] == REUSED else set()
        yield Measured(
            **place | found | ({"why": why} if (why := _unequal(loaded, groups, measure, asked["metric"])) else {})
        )
    if not compared:
        yield Measured(where=what, why=f"no model and domain with finished cells of {' and '.join(methods)}")


def _paired_seeds(cells: pd.DataFrame, methods: list[str]) -> list[pd.DataFrame] | None:
    """Each method's cells by seed, over the seeds that all of them have."""
    own = [cells[cells["method"] == method].sort_values("seed") for method in methods]
    common = set.intersection(*(set(group["seed"]) for group in own))
    return [group[group["seed"].isin(common)] for group in own] if common else None


def _unequal(loaded: Loaded, groups: list[pd.DataFrame], measure: Mapping, metric: str) -> str:
    """What must be equal and is not; times are of one machine."""
    if loaded.not_a_result:
        return "demo or random weights: not a result"
    for key in [*measure.get("equal", ()), *(["hardware"] if metric.startswith("seconds_") else [])]:
        values = list(
            dict.fromkeys(str(value) for group in groups for value in (group[key] if key in group else [None]))
        )
        if len(values) > 1:
            return f"{key.replace('_', ' ')} is not equal: {' and '.join(values)}"
    return ""


def _value(comparison: pd.DataFrame, cells: pd.DataFrame, metric: str) -> dict:
    """The table's own number and interval."""
    first = cells.iloc[0]
    row = comparison[
        (comparison[["model", "domain", "method"]] == (first["model"], first["domain"], first["method"])).all(axis=1)
    ].iloc[0]
    number = lambda key: None if pd.isna(row.get(key)) else float(row[key])
    rows = row["n_domain"] if metric.startswith("domain") else row["n_retention"]
    found = {
        "value": number(metric),
        "low": number(f"{metric}_low"),
        "high": number(f"{metric}_high"),
        "n": _n(int(rows) if metric in SCORES else 0, len(cells)),
    }
    return found | ({"ends": _about(len(cells))} if found["low"] is not None else {})


def _score(loaded: Loaded, groups: list[pd.DataFrame], metric: str, way: str) -> dict:
    """A difference or ratio of two methods' scores over the same items; without all items the value alone."""
    first, seeds = groups[0].iloc[0], len(groups[0])
    tasks = [first["domain"]] if metric.startswith("domain") else retention_tasks(first)
    means = [mean_if_known(group[metric]) for group in groups]
    if None in means or (way == "ratio" and not means[1]):
        return {"why": f"{metric} is not known of all cells"}
    value = means[0] - means[1] if way == "difference" else means[0] / means[1]
    arrays = [_arrays(loaded, group, tasks) for group in groups]
    found = {"value": value, "n": _n(sum(first["n"].get(task, 0) for task in tasks), seeds)}
    if not tasks or None in arrays:
        return found
    if way == "difference":
        sign = -1 if metric == "forgetting" else 1
        interval = of_arrays([sign * (a - b) for a, b in zip(*arrays)])
        return found | (
            {} if interval.low is None else {"low": interval.low, "high": interval.high, "ends": _about(seeds)}
        )
    if metric not in (
        "domain_score",
        "general_score",
    ):  # a change's ratio has no usable interval where the change is near 0
        return found
    whole = of_arrays(arrays[1]).value
    influence = of_arrays(
        [(a - value * b) / whole for a, b in zip(*arrays)], step=1 / whole
    )  # delta method for a ratio of means
    return found | (
        {}
        if influence.low is None
        else {"low": value + influence.low, "high": value + influence.high, "ends": _about(seeds)}
    )


def _arrays(loaded: Loaded, cells: pd.DataFrame, tasks: list[str]) -> list[np.ndarray] | None:
    """Scores of each task, (S seeds, n items), rows in the base's order; None where items are missing."""
    base = loaded.base.get(cells.iloc[0]["model"], {}).get("items", pd.DataFrame())
    if base.empty or loaded.items.empty:
        return None
    items = loaded.items[loaded.items["cell"].isin(cells.index)]
    if items["cell"].nunique() < len(cells):
        return None
    pairs = paired(base, items)[[*FIXED, *cells.index]]  # runs in the order of their seeds
    found = [by_run(pairs[pairs["task"] == task]) for task in tasks]
    return found if all(scores.shape[1] == cells.iloc[0]["n"].get(task) for task, scores in zip(tasks, found)) else None


def _cost(groups: list[pd.DataFrame], metric: str, way: str) -> dict:
    """A cost's ratio or difference, seed by seed."""
    values = [group[metric].astype(float).to_numpy() if metric in group else np.array([np.nan]) for group in groups]
    if any(np.isnan(group).any() for group in values) or (way == "ratio" and not values[1].all()):
        return {"why": f"{metric} is unknown or nothing"}
    each = values[0] / values[1] if way == "ratio" else values[0] - values[1]
    times = len(_timings(groups)) if metric == REUSED else len(each)
    ends = {"low": float(each.min()), "high": float(each.max()), "ends": "lowest and highest seed"} if times > 1 else {}
    n = f"{times} timing{'s' if times != 1 else ''}" if metric == REUSED else _n(0, len(each))
    return {"value": float(each.mean()), "n": n, "once": metric.startswith("seconds_") and times == 1} | ends


def _timings(groups: list[pd.DataFrame]) -> set[tuple[float, ...]]:
    """The preparations' seconds, seed by seed: equal to the last digit they are one that several cells took from the store."""
    return set(zip(*(group[REUSED].astype(float) for group in groups)))


def _moved(groups: list[pd.DataFrame], metric: str, drift: Mapping[str, dict]) -> dict:
    """The ratio of two methods' movements, seed by seed."""
    values = [[(drift.get(cell) or {}).get("overall", {}).get(metric) for cell in group.index] for group in groups]
    if any(value is None for group in values for value in group) or not all(values[1]):
        return {"why": "the movement of these cells is not measured (drift.json)"}
    frames = [group.assign(moved=own) for group, own in zip(groups, values)]
    return _cost(frames, "moved", "ratio")


def _about(seeds: int) -> str:
    return "95 %, other seeds and other items" if seeds > 1 else "95 %, other items: this run, not this method"


def _n(rows: int, seeds: int) -> str:
    return (f"{rows} rows, " if rows else "") + f"{seeds} seed{'s' if seeds != 1 else ''}"
