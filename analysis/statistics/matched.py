"""Forgetting at the same domain gain: a method that learns nothing forgets nothing, so ends of runs are not alike.

The probes of a run, all against the bare base, give its trajectory in the plane of gain and forgetting. A method's forgetting at a
gain is read where the run's gain first reaches it, by a straight line between the two probes around it (`crossing`).
"""

from dataclasses import dataclass, field
from fractions import Fraction
from math import lcm, sqrt

import numpy as np
import pandas as pd
from scipy.stats import t as student

from analysis import units
from analysis.load import Loaded
from analysis.statistics.crossed import two_more
from analysis.statistics.intervals import Z
from analysis.statistics.resample import changes

PLAIN = "full"
QUARTERS = (0.25, 0.5, 0.75)
BARELY = 0.5  # a method that does not reach this share of the best method's final gain has barely learned
MOST_ROWS = 10_000  # a share of more probe rows than these is not told from one of no whole number of rows


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The probes of one comparison's runs.

    points  a row a probed step: cell, method, seed, step, tokens, gain, forgetting, forgetting_nats, and the probes' own columns
    gain    "accuracy" (gain is a share of 1), or "nats" where the domain's probes have no accuracy (nats per token, base minus tuned)
    right   columns of accuracy behind `forgetting`, a mean over retention probe sets above chance in the base
    nats    columns behind `forgetting_nats`, nats per token of the right answers, tuned minus base, over the same sets
    rows    column of accuracy -> at least so many probe rows; a column whose rows cannot be told is missing
    changed column of accuracy -> (items, methods) tuned minus base on the task's scored rows at the end of training, the mean over seeds
    from_own_start  methods whose base could not be had: they are set against their own first probe
    """

    points: pd.DataFrame
    gain: str
    right: tuple[str, ...]
    nats: tuple[str, ...]
    rows: dict[str, int] = field(default_factory=dict)
    changed: dict[str, np.ndarray] = field(default_factory=dict)
    from_own_start: tuple[str, ...] = ()

    @property
    def measures(self) -> tuple[str, ...]:
        return (("forgetting",) if self.right else ()) + (("forgetting_nats",) if self.nats else ())

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.points["method"]))


def trajectories(loaded: Loaded, *, model: str, domain: str) -> Trajectories | None:
    """The trajectories of one comparison; None where no run was probed on its domain and on retention tasks."""
    if loaded.curves.empty or not len(loaded.cells):
        return None
    cells = loaded.of(model, domain)
    curves = loaded.curves[loaded.curves["cell"].isin(cells.index)]
    probed = [c for c in curves.columns if c.startswith("probe_") and curves[c].notna().any()]
    first = cells.iloc[0] if len(cells) else {}
    sets = [
        c
        for c in dict.fromkeys(c.removesuffix("_nll") for c in probed)
        if c not in ("probe_perplexity", f"probe_{domain}")
    ]
    kept = [c for c in sets if _retention(first, c.removeprefix("probe_"))]
    right, nats = (
        tuple(c for c in kept if c in probed and units.of_task(first, c.removeprefix("probe_")) == units.SHARE),
        tuple(f"{c}_nll" for c in kept if f"{c}_nll" in probed),
    )
    learned = next((c for c in (f"probe_{domain}", f"probe_{domain}_nll") if c in probed), None)
    if learned is None or not (right or nats):
        return None
    asked = [learned, *right, *nats]
    points = (
        curves[["cell", "step", "tokens", *asked]].dropna(subset=asked).sort_values(["cell", "step"], kind="stable")
    )
    points.insert(1, "method", points["cell"].map(cells["method"]))
    points.insert(2, "seed", points["cell"].map(cells["seed"]))
    if not len(points):
        return None
    base, own = _bases(loaded, points, asked, cell_names=list(cells.index), pair=(model, domain))
    against = points["cell"].map(base)
    change = points[asked] - pd.DataFrame(against.tolist(), index=points.index, columns=asked)
    points["gain"] = change[learned] if not learned.endswith("_nll") else -change[learned]
    points["forgetting"] = -change[list(right)].mean(axis=1) if right else np.nan
    points["forgetting_nats"] = change[list(nats)].mean(axis=1) if nats else np.nan
    order = {name: place for place, name in enumerate(cells.index)}
    points = points.sort_values("cell", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)
    return Trajectories(
        points=points,
        gain="nats" if learned.endswith("_nll") else "accuracy",
        right=right,
        nats=nats,
        from_own_start=own,
        rows={c: n for c in right if (n := rows_behind(curves[c].dropna()))},
        changed=_changed(loaded, cells[cells["method"].isin(points["method"])], right),
    )


def rows_behind(shares) -> int | None:
    """The least number of rows that gives all these shares of right answers: the common denominator of their fractions.

    It divides the true number, so an interval from it is too wide rather than too narrow. None where it exceeds MOST_ROWS
    or a share is no fraction of whole rows.
    """
    n = 1
    for share in set(map(float, shares)):
        fraction = Fraction(share).limit_denominator(MOST_ROWS)
        if abs(float(fraction) - share) > 1e-12:
            return None
        n = lcm(n, fraction.denominator)
        if n > MOST_ROWS:
            return None
    return n


def crossing(gain: np.ndarray, level: float) -> tuple[int, float] | None:
    """Where a run first reaches `level`: (k, w), a share w of the way from probe k - 1 to probe k; (0, 1.0) if it begins at or beyond it.

    Only the first crossing counts: what a run does after it reached the gain, falls back from it included, is later training.
    None where it never reaches it.
    """
    reached = np.flatnonzero(np.asarray(gain) >= level)
    if not len(reached):
        return None
    k = int(reached[0])
    return (0, 1.0) if k == 0 else (k, float((level - gain[k - 1]) / (gain[k] - gain[k - 1])))


def levels(found: Trajectories) -> dict[str, float]:
    """Gains at which methods are compared: 'matched', and quarters of the best method's final gain; empty where none learned.

    matched: the largest gain that every seed of every method reaches, but for the methods that barely learned, of which some
    seed stays below BARELY of the best method's final gain (the mean over its seeds of the gain at the last probe).
    """
    by_cell = found.points.groupby("cell", sort=False)
    ends = pd.DataFrame(
        {"method": by_cell["method"].first(), "final": by_cell["gain"].last(), "most": by_cell["gain"].max()}
    )
    best = float(ends.groupby("method")["final"].mean().max())
    if not best > 0:
        return {}
    least = ends.groupby("method")["most"].min()
    return {
        "matched": float(least[least >= BARELY * best].min()),
        **{f"{100 * share:.0f} %": share * best for share in QUARTERS},
    }


def matched(found: Trajectories) -> pd.DataFrame:
    """A row a (level, measure, method): forgetting at the same gain, and its difference to PLAIN's (else the first method's).

    level, gain, measure, method, reference; seeds and how many of them `reached` the gain; value, low, high and difference,
    difference_low, difference_high: None where a seed did not reach it; begins: a seed's first probe lies beyond the gain already;
    early: a seed reached it before its first probe after training began, so that the line starts where training did;
    covers: what the 95 % interval is of, half = sqrt(t(S-1)^2 s^2 / S + z^2 rows). 'seeds': the first part alone, Student's t over S > 1
    seeds. 'rows': the second alone, one seed; 'seeds and rows': both. rows = sum over T sets of v / n over T^2, n the probe rows and v the
    variance by item of the same change (a method's against the base, or between two) on the task's scored rows at the end of training, for
    a curve holds no items; earlier on fewer answers have turned, so it is rather too wide. '': no interval.
    A difference over seeds pairs them by number, over the seeds both methods have.
    """
    records = []
    reference = PLAIN if PLAIN in found.methods else found.methods[0]
    for level, gain in levels(found).items():
        for measure in found.measures:
            at = {method: _at(found, method, gain) for method in found.methods}
            for method in found.methods:
                difference = _difference(found, at[method], at[reference], measure, methods=(method, reference))
                row = {"level": level, "gain": gain, "measure": measure, "method": method, "reference": reference}
                records.append(row | _row(found, at[method], measure, method=method) | difference)
    return pd.DataFrame(records)


def _retention(cell, name: str) -> bool:
    """Whether a probe set shows forgetting: a retention task above chance, or a set that is probed and not scored."""
    about = cell["scores_by_task"].get(name)
    return (about is None or about["role"] == "retention") and name not in cell["at_chance"]


def _bases(
    loaded: Loaded, points: pd.DataFrame, asked: list[str], *, cell_names: list[str], pair: tuple[str, str]
) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """cell -> the bare base's probes: the run's own at step 0; of a run that starts from weights of its preparation, another run's.

    Where no run starts from the base, the tuning's record of it; where there is none, the own first probe, and the method is named.
    """
    firsts = points.drop_duplicates("cell").set_index("cell")
    bare = lambda name: firsts.at[name, "step"] == 0 and not loaded.prepared.get(name, {}).get("bytes_start")
    shared = next(
        (firsts.loc[name, asked].astype(float).tolist() for name in cell_names if name in firsts.index and bare(name)),
        None,
    )
    tuned = (loaded.tuning.get(pair) or {}).get("base") or {}
    recorded = [tuned.get(column.removeprefix("probe_")) for column in asked]
    shared = shared or (recorded if None not in recorded else None)
    base, own = {}, []
    for name in firsts.index:
        base[name] = firsts.loc[name, asked].astype(float).tolist() if bare(name) or shared is None else shared
        own += [firsts.at[name, "method"]] if shared is None else []
    return base, tuple(dict.fromkeys(own))


def _at(found: Trajectories, method: str, gain: float) -> pd.DataFrame:
    """A row a seed of a method: every column of its trajectory at the gain; NaN where it is not reached."""
    columns, rows = list(found.measures), []
    for _, run in found.points[found.points["method"] == method].groupby("cell", sort=False):
        place, values = crossing(run["gain"].to_numpy(), gain), run[columns].to_numpy(dtype=float)
        k, w = place or (0, np.nan)
        now = values[0] * w if k == 0 else (1 - w) * values[k - 1] + w * values[k]
        begins = place is not None and k == 0 and run["gain"].iloc[0] > gain
        rows.append([int(run["seed"].iloc[0]), place is not None, begins, place is not None and k == 1 and w < 1, *now])
    return pd.DataFrame(rows, columns=["seed", "reached", "begins", "early", *columns]).set_index("seed")


def _row(found: Trajectories, at: pd.DataFrame, measure: str, *, method: str) -> dict:
    row = {
        "seeds": len(at),
        "reached": int(at["reached"].sum()),
        "begins": bool(at["begins"].any()),
        "early": bool(at["early"].any()),
    }
    row |= {"value": None, "low": None, "high": None, "covers": ""}
    if not at["reached"].all():
        return row
    return row | _interval(found, at[measure], measure, methods=(method,))


def _difference(
    found: Trajectories, at: pd.DataFrame, reference: pd.DataFrame, measure: str, *, methods: tuple[str, str]
) -> dict:
    row = {"difference": None, "difference_low": None, "difference_high": None}
    common = at.index.intersection(reference.index)
    own, other = at.loc[common], reference.loc[common]
    if methods[0] == methods[1] or not len(common) or not own["reached"].all() or not other["reached"].all():
        return row
    made = _interval(found, own[measure] - other[measure], measure, methods=methods)
    return {"difference": made["value"], "difference_low": made["low"], "difference_high": made["high"]}


def _interval(found: Trajectories, values: pd.Series, measure: str, *, methods: tuple[str, ...]) -> dict:
    """The mean over seeds with its 95 % interval: of one method's change, or of the difference of two methods' changes."""
    value, n = float(values.mean()), len(values)
    seeds = float(student.ppf(0.975, n - 1) ** 2 * values.var(ddof=1) / n) if n > 1 else 0.0
    rows = _rows_variance(found, methods) if measure == "forgetting" else None
    if rows is None and not seeds:  # one seed, or seeds that agree on the same few rows
        return {"value": value, "low": None, "high": None, "covers": ""}
    half = sqrt(seeds + Z**2 * (rows or 0.0))
    covers = " and ".join(part for part, there in (("seeds", n > 1), ("rows", rows is not None)) if there)
    return {"value": value, "low": value - half, "high": value + half, "covers": covers}


def _rows_variance(found: Trajectories, methods: tuple[str, ...]) -> float | None:
    """What other probe rows would change, as a variance; None where the probe rows are not known or the items are not there."""
    if not all(column in found.rows and column in found.changed for column in found.right):
        return None
    columns = [found.methods.index(method) for method in methods]
    total = 0.0
    for column in found.right:
        change = found.changed[column][:, columns]
        of_item = change[:, 0] - (change[:, 1] if len(columns) > 1 else 0.0)
        total += two_more(of_item, step=1.0).var(ddof=1) / found.rows[column]
    return None if np.isnan(total) else float(total / len(found.right) ** 2)


def _changed(loaded: Loaded, cells: pd.DataFrame, right: tuple[str, ...]) -> dict[str, np.ndarray]:
    counts = {task: n for c in right if (n := cells.iloc[0]["n"].get(task := c.removeprefix("probe_")))}
    return {f"probe_{task}": change for task, change in changes(loaded, cells, counts=counts).items()}
