"""What runs lose at the same gain along their training, on probe rows.

A trajectory says something about a method only if its weights in between are what the method would deliver. They are
not where a part changes the weights once training has ended (`finished` in train.json): such methods have a curve
through their settings (analysis/statistics/matched.py) and no trajectory. Of a run, the loss at a gain is read where
its gain first reaches it, on the straight line between the two probes around; later probes do not count. The first
such line begins at the first probe after training began: before it there is no number.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import t as student

from analysis import numbers
from analysis.families import family
from analysis.load import Loaded
from analysis.measures import GENERAL, GOLD
from analysis.statistics.matched import BARELY

LOSSES = (GENERAL.key, GOLD.key)


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """The probes of one comparison's runs, against the bare base.

    points   one row per probed step: cell, method, seed, step, tokens, gain (nats per token of the domain's probe rows)
             and what was lost, by LOSSES: nats per token of the general probe text, and of the right answers of the
             retention probe sets, the mean over sets
    without  method -> why it has no trajectory
    """

    points: pd.DataFrame
    without: dict[str, str]

    @property
    def losses(self) -> list[str]:
        return [key for key in LOSSES if self.points[key].notna().all()]

    @property
    def between(self) -> bool:
        """Whether a run was probed between its start and its end."""
        return self.points.groupby("cell").size().max() > 2


def trajectories(
    loaded: Loaded, *, model: str, domain: str, methods: Collection[str] | None = None
) -> Trajectories | None:
    """The trajectories of one comparison, of all its methods by default; None if no run was probed on its domain and on
    general text."""
    cells, gain = loaded.of(model, domain), f"probe_{domain}_nll"
    cells = cells if methods is None or cells.empty else cells[cells["method"].isin(methods)]
    if loaded.curves.empty or cells.empty or gain not in loaded.curves or "probe_general_nll" not in loaded.curves:
        return None
    kept = [
        f"probe_{task}_nll"
        for task, about in cells.iloc[0]["scores_by_task"].items()
        if about["role"] == "retention" and task not in cells.iloc[0]["at_chance"]
    ]
    kept = [column for column in kept if column in loaded.curves]
    used = [gain, "probe_general_nll", *kept]
    curves = loaded.curves_of(cells)
    curves = curves[["cell", "step", "tokens", *used]].dropna(subset=used[:2]).sort_values(["cell", "step"])
    base = _base(loaded, curves, used, cells=cells)
    without = {method: _why(own, curves) for method, own in cells.groupby("method", sort=False)}
    if base is None:
        without = {method: why or "the base's probes are not recorded" for method, why in without.items()}
    without = {method: why for method, why in without.items() if why}
    curves = curves[~curves["cell"].map(cells["method"]).isin(without)]
    if curves.empty:
        return None
    points = curves[["cell", "step", "tokens"]].copy()
    points.insert(1, "method", points["cell"].map(cells["method"]))
    points.insert(2, "seed", points["cell"].map(cells["seed"]))
    change = curves[used] - base
    points["gain"], points[GENERAL.key] = -change[gain], change["probe_general_nll"]
    points[GOLD.key] = change[kept].mean(axis=1) if kept else np.nan
    order = {name: place for place, name in enumerate(cells.index)}
    points = points.sort_values("cell", key=lambda names: names.map(order), kind="stable").reset_index(drop=True)
    return Trajectories(points=points, without=without)


def _base(loaded: Loaded, curves: pd.DataFrame, used: list[str], *, cells: pd.DataFrame) -> pd.Series | None:
    """The bare base's probes: those at step 0 of a run that starts from it, or the tuning's record of it."""
    firsts = curves[curves["step"] == 0].drop_duplicates("cell").set_index("cell")
    for cell in cells.index.intersection(firsts.index):
        if not loaded.prepared.get(cell, {}).get("bytes_start"):
            return firsts.loc[cell, used].astype(float)
    pair = tuple(cells.iloc[0][["model", "domain"]])
    tuned = (loaded.tuning.get(pair) or {}).get("base") or {}
    values = {column: tuned.get(column.removeprefix("probe_")) for column in used}
    return None if None in values.values() else pd.Series(values, dtype=float)


def _why(cells: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Why the runs of a method have no trajectory; '' if they have one."""
    if not set(cells.index) <= set(curves["cell"]):
        return "not probed"
    if "finished" not in cells or any(isinstance(finished, float) for finished in cells["finished"]):  # missing
        return "whether its weights are changed after training is not recorded"
    parts = [part for finished in cells["finished"] if isinstance(finished, dict) for part in finished["parts"]]
    return f"{', '.join(dict.fromkeys(parts))} changes the weights after training" if parts else ""


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


def level(runs: Trajectories, deciding: Collection[str] | None = None) -> float | None:
    """The largest gain that every seed of every method reaches, but for methods that barely learned; None if none did.

    deciding  families whose methods decide, all by default; of others only if none of these has a trajectory
    A method has barely learned if a seed stays below BARELY of the best method's gain, the mean over its seeds.
    """
    points = runs.points[runs.points["method"].map(family).isin(deciding or ())]
    points = points if len(points) else runs.points
    most = points.groupby(["method", "cell"], sort=False)["gain"].max()
    best, least = float(most.groupby("method").mean().max()), most.groupby("method").min()
    return float(least[least >= BARELY * best].min()) if best > 0 and (least >= BARELY * best).any() else None


def along(runs: Trajectories, deciding: Collection[str] | None = None) -> pd.DataFrame:
    """One row per (measure, method): what is lost at the gain of `level`, the mean over seeds; empty if none learned.

    gain, value, low, high, seeds, why
            low and high are the 95 % interval over seeds alone (Student's t), because curves hold no items; without a
            value, `why` says the reason
    """
    at, rows = level(runs, deciding), []
    for key in runs.losses if at is not None else ():
        for method, own in runs.points.groupby("method", sort=False):
            values, reasons = [], []
            for _, run in own.groupby("cell", sort=False):
                value, why = _at(run, key, at)
                values, reasons = values + [value], reasons + [why]
            row = {"measure": key, "method": method, "gain": at, "seeds": len(values)}
            row |= {"value": None, "low": None, "high": None, "why": next(filter(None, reasons), "")}
            if not row["why"]:
                row |= _interval(np.array(values))
            rows.append(row)
    return pd.DataFrame(rows, columns=["measure", "method", "gain", "seeds", "value", "low", "high", "why"])


def _at(run: pd.DataFrame, key: str, level: float) -> tuple[float | None, str]:
    """What a run lost at a gain, or why there is no number."""
    gain, lost = run["gain"].to_numpy(), run[key].to_numpy()
    place = crossing(gain, level)
    if place is None:
        return None, f"gains at most {numbers.nats(float(gain.max()))}"
    k, w = place
    if k == 0 and gain[0] > level:
        return None, "starts beyond it, with weights of its own preparation"
    if k == 1 and w < 1:
        return None, f"passed it before its first probe (step {int(run['step'].iloc[1])})"
    return float(lost[0] if k == 0 else (1 - w) * lost[k - 1] + w * lost[k]), ""


def _interval(values: np.ndarray) -> dict:
    value, n = float(values.mean()), len(values)
    if n < 2:
        return {"value": value}
    half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return {"value": value, "low": value - half, "high": value + half}
