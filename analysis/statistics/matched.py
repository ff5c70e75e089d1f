"""Forgetting at the same domain gain: a method that learns nothing forgets nothing, so runs differ at their ends.

Along training: the probes of a run, against the bare base, give its trajectory in the plane of gain and forgetting. Its
forgetting at a gain is read where its gain first reaches it, on the straight line between the two probes around it
(`crossing`). Between swept families, on the scored rows: the mean vertical distance of two curves (`gaps`).
"""

from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations
from math import lcm, sqrt

import numpy as np
import pandas as pd
from scipy.stats import t as student

from analysis import units
from analysis.load import Loaded
from analysis.statistics.crossed import two_more
from analysis.statistics.intervals import Z
from analysis.statistics.resample import Resampled, changes, reversed_interval

PLAIN = "full"
QUARTERS = (0.25, 0.5, 0.75)
BARELY = 0.5  # a method that does not reach this share of the best method's final gain has barely learned
MOST_ROWS = 10_000  # more probe rows than these are not recognised from a share of right answers
POINTS = 33  # gains at which two curves are compared: the trapezoid's error is far below a point
ENOUGH = 0.95  # an interval is given if at least this share of the redraws has a gain in common


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The probes of one comparison's runs.

    points  one row per probed step: cell, method, seed, step, tokens, gain, forgetting, forgetting_nats, and the probes
    gain    "accuracy" (gain is a share of 1), or "nats" if the domain's probes have none (nats per token, base − tuned)
    right   accuracy columns behind `forgetting`, the mean over retention probe sets on which the base is above chance
    nats    columns behind `forgetting_nats`, nats per token of the right answers, tuned − base, over the same sets
    rows    accuracy column -> a lower bound of its probe rows; a column whose rows cannot be inferred is missing
    changed accuracy column -> (items, methods) tuned − base on the task's scored rows after training, mean over seeds
    from_own_start  methods without the base's probes, compared with their own first probe
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
    """The trajectories of one comparison; None if no run was probed on its domain and on retention tasks."""
    if loaded.curves.empty or not len(loaded.cells):
        return None
    cells = loaded.of(model, domain)
    curves = loaded.curves[loaded.curves["cell"].isin(cells.index)]
    probed = [c for c in curves.columns if c.startswith("probe_") and curves[c].notna().any()]
    sets = dict.fromkeys(c.removesuffix("_nll").removeprefix("probe_") for c in probed)
    kept = [
        task
        for task in sets
        if task not in ("perplexity", "general", domain) and _shows_forgetting(cells.iloc[0], task)
    ]
    shares = [task for task in kept if units.of_task(cells.iloc[0], task) == units.SHARE]
    right = tuple(f"probe_{task}" for task in shares if f"probe_{task}" in probed)
    nats = tuple(f"probe_{task}_nll" for task in kept if f"probe_{task}_nll" in probed)
    learned = next((c for c in (f"probe_{domain}", f"probe_{domain}_nll") if c in probed), None)
    if learned is None or not (right or nats):
        return None
    used = [learned, *right, *nats]
    points = curves[["cell", "step", "tokens", *used]].dropna(subset=used)
    points = points.sort_values(["cell", "step"], kind="stable")
    points.insert(1, "method", points["cell"].map(cells["method"]))
    points.insert(2, "seed", points["cell"].map(cells["seed"]))
    if not len(points):
        return None
    base, own = _bases(loaded, points, used, cells=list(cells.index), pair=(model, domain))
    change = points[used] - pd.DataFrame(points["cell"].map(base).tolist(), index=points.index, columns=used)
    points["gain"] = change[learned] if not learned.endswith("_nll") else -change[learned]
    points["forgetting"] = -change[list(right)].mean(axis=1) if right else np.nan
    points["forgetting_nats"] = change[list(nats)].mean(axis=1) if nats else np.nan
    order = {name: place for place, name in enumerate(cells.index)}
    points = points.sort_values("cell", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)
    ran = cells[cells["method"].isin(points["method"])]
    counts = {task: n for c in right if (n := ran.iloc[0]["n"].get(task := c.removeprefix("probe_")))}
    return Trajectories(
        points=points,
        gain="nats" if learned.endswith("_nll") else "accuracy",
        right=right,
        nats=nats,
        from_own_start=own,
        rows={c: n for c in right if (n := rows_behind(curves[c].dropna()))},
        changed={f"probe_{task}": change for task, change in changes(loaded, ran, counts=counts).items()},
    )


def rows_behind(shares) -> int | None:
    """The smallest number of rows that gives all these shares of right answers: the common denominator.

    It divides the true number, so an interval from it is too wide rather than too narrow. None if it exceeds MOST_ROWS
    or a share is not a fraction of whole rows.
    """
    n = 1
    for share in set(map(float, shares)):
        fraction = Fraction(share).limit_denominator(MOST_ROWS)
        n = lcm(n, fraction.denominator)
        if abs(float(fraction) - share) > 1e-12 or n > MOST_ROWS:
            return None
    return n


def crossing(gain: np.ndarray, level: float) -> tuple[int, float] | None:
    """Where a run first reaches `level`: (k, w), a share w of the way from probe k − 1 to probe k, or None if never.

    (0, 1.0) if it begins at or beyond it. Only the first crossing counts: what follows, including a fall back below the
    level, is later training.
    """
    reached = np.flatnonzero(np.asarray(gain) >= level)
    if not len(reached):
        return None
    k = int(reached[0])
    return (0, 1.0) if k == 0 else (k, float((level - gain[k - 1]) / (gain[k] - gain[k - 1])))


def levels(runs: Trajectories) -> dict[str, float]:
    """Gains at which methods are compared: 'matched', and quarters of the best method's final gain; {} if none learned.

    matched: the largest gain that every seed of every method reaches, ignoring methods that barely learned, of which a
    seed stays below BARELY of the best method's final gain (the mean over its seeds of the gain at the last probe).
    """
    by_cell = runs.points.groupby("cell", sort=False)
    ends = by_cell.agg(method=("method", "first"), final=("gain", "last"), most=("gain", "max"))
    best = float(ends.groupby("method")["final"].mean().max())
    if not best > 0:
        return {}
    least = ends.groupby("method")["most"].min()
    quarters = {f"{100 * share:.0f} %": share * best for share in QUARTERS}
    return {"matched": float(least[least >= BARELY * best].min()), **quarters}


def matched(runs: Trajectories) -> pd.DataFrame:
    """One row per (level, measure, method): forgetting at the same gain, and its difference from PLAIN's (or else the
    first method's).

    level, gain, measure, method, reference; seeds, and how many of them `reached` the gain; value, low, high and
    difference, difference_low, difference_high: None if a seed did not reach it
    begins  the first probe of a seed is beyond the gain
    early   a seed reached it before its first probe after training began, so the straight line starts with training
    covers  what the 95 % interval covers, half = sqrt(t(S−1)² s² / S + z² rows): 'seeds' (the first part alone,
            Student's t over S > 1 seeds), 'rows' (the second alone, one seed), 'seeds and rows', or '' (no interval)

    rows = Σ over T sets of v / n over T², with n the probe rows and v the variance by item of the same change (of a
    method from the base, or between two) on the task's scored rows after training, because a curve holds no items;
    earlier in training fewer answers have changed, so it is rather too wide. A difference over seeds is paired by seed.
    """
    records = []
    reference = PLAIN if PLAIN in runs.methods else runs.methods[0]
    for level, gain in levels(runs).items():
        at = {method: _at(runs, method, gain) for method in runs.methods}
        for measure in runs.measures:
            for method in runs.methods:
                row = {"level": level, "gain": gain, "measure": measure, "method": method, "reference": reference}
                row |= _row(runs, at[method], measure, method=method)
                records.append(row | _difference(runs, at, measure, methods=(method, reference)))
    return pd.DataFrame(records)


def _shows_forgetting(cell: pd.Series, task: str) -> bool:
    """Whether a probe set is of a retention task above chance, or is probed and not scored."""
    about = cell["scores_by_task"].get(task)
    return (about is None or about["role"] == "retention") and task not in cell["at_chance"]


def _bases(
    loaded: Loaded, points: pd.DataFrame, used: list[str], *, cells: list[str], pair: tuple[str, str]
) -> tuple[dict[str, list[float]], tuple[str, ...]]:
    """cell -> the bare base's probes, and the methods for which they are unknown.

    They are the run's own probes at step 0, or another run's if it starts from weights of its preparation; if no run
    starts from the base, the tuning's record of it; without one, the run's own first probe.
    """
    firsts = points.drop_duplicates("cell").set_index("cell")

    def values(cell: str) -> list[float]:
        return firsts.loc[cell, used].astype(float).tolist()

    begun = [cell for cell in cells if cell in firsts.index and firsts.at[cell, "step"] == 0]
    bare = [cell for cell in begun if not loaded.prepared.get(cell, {}).get("bytes_start")]
    tuned = (loaded.tuning.get(pair) or {}).get("base") or {}
    recorded = [tuned.get(column.removeprefix("probe_")) for column in used]
    shared = values(bare[0]) if bare else recorded if None not in recorded else None
    base = {cell: values(cell) if cell in bare or shared is None else shared for cell in firsts.index}
    return base, tuple(dict.fromkeys(firsts["method"])) if shared is None else ()


def _at(runs: Trajectories, method: str, gain: float) -> pd.DataFrame:
    """One row per seed of a method: every measure at the gain, NaN if it is not reached."""
    columns, rows = list(runs.measures), []
    for _, run in runs.points[runs.points["method"] == method].groupby("cell", sort=False):
        place, values = crossing(run["gain"].to_numpy(), gain), run[columns].to_numpy(dtype=float)
        k, w = place or (0, np.nan)
        now = values[0] * w if k == 0 else (1 - w) * values[k - 1] + w * values[k]
        begins = place is not None and k == 0 and run["gain"].iloc[0] > gain
        rows.append([int(run["seed"].iloc[0]), place is not None, begins, place is not None and k == 1 and w < 1, *now])
    return pd.DataFrame(rows, columns=["seed", "reached", "begins", "early", *columns]).set_index("seed")


def _row(runs: Trajectories, at: pd.DataFrame, measure: str, *, method: str) -> dict:
    row = {"seeds": len(at), "reached": int(at["reached"].sum())}
    row |= {key: bool(at[key].any()) for key in ("begins", "early")}
    if not at["reached"].all():
        return row | {"value": None, "low": None, "high": None, "covers": ""}
    return row | _interval(runs, at[measure], measure, methods=(method,))


def _difference(runs: Trajectories, at: dict[str, pd.DataFrame], measure: str, *, methods: tuple[str, str]) -> dict:
    first, second = (at[method] for method in methods)
    common = first.index.intersection(second.index)
    own, other = first.loc[common], second.loc[common]
    if methods[0] == methods[1] or not len(common) or not own["reached"].all() or not other["reached"].all():
        return {"difference": None, "difference_low": None, "difference_high": None}
    made = _interval(runs, own[measure] - other[measure], measure, methods=methods)
    return {"difference": made["value"], "difference_low": made["low"], "difference_high": made["high"]}


def _interval(runs: Trajectories, values: pd.Series, measure: str, *, methods: tuple[str, ...]) -> dict:
    """The mean over seeds with its 95 % interval: of one method's change, or of the difference between two methods'."""
    value, n = float(values.mean()), len(values)
    seeds = float(student.ppf(0.975, n - 1) ** 2 * values.var(ddof=1) / n) if n > 1 else 0.0
    rows = _rows_variance(runs, methods) if measure == "forgetting" else None
    if rows is None and not seeds:  # one seed, or seeds that agree on the same few rows
        return {"value": value, "low": None, "high": None, "covers": ""}
    half = sqrt(seeds + Z**2 * (rows or 0.0))
    covers = " and ".join(part for part, known in (("seeds", n > 1), ("rows", rows is not None)) if known)
    return {"value": value, "low": value - half, "high": value + half, "covers": covers}


def _rows_variance(runs: Trajectories, methods: tuple[str, ...]) -> float | None:
    """The variance from other probe rows; None if their number is unknown or the items are missing."""
    if not all(column in runs.rows and column in runs.changed for column in runs.right):
        return None
    columns = [runs.methods.index(method) for method in methods]
    total = 0.0
    for column in runs.right:
        change = runs.changed[column][:, columns]
        of_item = change[:, 0] - (change[:, 1] if len(columns) > 1 else 0.0)
        total += two_more(of_item, step=1.0).var(ddof=1) / runs.rows[column]
    return None if np.isnan(total) else float(total / len(runs.right) ** 2)


def curve(gain: np.ndarray, forgetting: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A family's forgetting at gains `at` (..., P), from its blocks (..., k); NaN outside the gains of its sweep.

    A block counts with the least forgetting of any block that gains as much or more, so that a bad setting does not
    count against its family; between neighbouring blocks the line is straight.
    """
    order = np.argsort(gain, axis=-1, kind="stable")
    g, f = np.take_along_axis(gain, order, -1), np.take_along_axis(forgetting, order, -1)
    f = np.minimum.accumulate(f[..., ::-1], axis=-1)[..., ::-1]
    after = (g[..., None, :] < at[..., :, None]).sum(axis=-1)
    k = np.clip(after, 0, g.shape[-1] - 1)
    before = np.maximum(k - 1, 0)
    g0, g1, f0, f1 = (np.take_along_axis(a, i, -1) for a, i in ((g, before), (g, k), (f, before), (f, k)))
    share = np.divide(at - g0, g1 - g0, out=np.ones_like(at), where=g1 > g0)
    outside = (at < g[..., :1]) | (at > g[..., -1:])
    return np.where(outside, np.nan, (1 - share) * f0 + share * f1)


Family = tuple[np.ndarray, np.ndarray]  # gain and forgetting of its blocks


def gap(first: Family, second: Family) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first family's forgetting minus the second's, averaged over the gains that both reach, and that range's ends.

    Each family is (gain, forgetting) of its blocks, (..., k); results are (...). The mean vertical distance of two
    curves over their shared range is Bjontegaard's (VCEG-M33, 2001), with straight lines for his cubics. A family of
    one block is compared at its own gain. NaN if they share no gain.
    """
    low = np.maximum(first[0].min(axis=-1), second[0].min(axis=-1))
    high = np.minimum(first[0].max(axis=-1), second[0].max(axis=-1))
    at = np.clip(low[..., None] + (high - low)[..., None] * np.linspace(0, 1, POINTS), None, high[..., None])
    distance = curve(*first, at) - curve(*second, at)
    mean = (distance[..., 1:] + distance[..., :-1]).mean(axis=-1) / 2
    return np.where(low <= high, mean, np.nan), low, high


def gaps(draws: Resampled) -> pd.DataFrame:
    """One row per pair of families of which one was swept: a, b, difference (forgetting of a − b, a share), low, high.

    gain_low, gain_high are the ends of the gains they share; all are None if there are none. `shared` is the share of
    redraws with a shared gain. The interval (redrawn items, and seeds if several) is left out if it is below ENOUGH,
    because it would describe the lucky redraws only.
    """
    rows = []
    for (a, first), (b, second) in combinations(draws.families.items(), 2):
        if len(first) < 2 and len(second) < 2:
            continue
        row = {"a": a, "b": b, "shared": 0.0}
        once = [(draws.gain[columns], draws.forgetting[columns]) for columns in (first, second)]
        value, low, high = map(float, gap(*once))
        if value == value:
            again = gap(*[(draws.gains[:, own], draws.forgettings[:, own]) for own in (first, second)])[0]
            kept = again[~np.isnan(again)]
            bounds = reversed_interval(value, kept) if len(kept) >= ENOUGH * len(again) else (None, None)
            row |= {"difference": value, "low": bounds[0], "high": bounds[1], "shared": len(kept) / len(again)}
            row |= {"gain_low": low, "gain_high": high}
        rows.append(row)
    return pd.DataFrame(rows, columns=["a", "b", "difference", "low", "high", "gain_low", "gain_high", "shared"])
