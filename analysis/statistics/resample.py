"""Gain and forgetting of every method under the same redrawn items and seeds, for numbers that mix methods (fronts)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2

from analysis import units
from analysis.families import families
from analysis.load import Loaded, retention_tasks
from analysis.statistics.intervals import KEYS

DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """The M methods of one (model, domain); every number is a share of 1.

    gain, forgetting      (M,) the reported values, means over seeds
    gains, forgettings    (draws, M) the same redrawn; NaN for a method without all of its items
    seeds                 number of seeds by method
    n_domain, n_retention number of scored rows behind a gain and behind a forgetting
    """

    methods: tuple[str, ...]
    gain: np.ndarray
    forgetting: np.ndarray
    gains: np.ndarray
    forgettings: np.ndarray
    seeds: dict[str, int]
    n_domain: int
    n_retention: int

    @property
    def families(self) -> dict[str, list[int]]:
        """Columns by family, in the order of the grid."""
        place = self.methods.index
        return {name: [place(method) for method in blocks] for name, blocks in families(self.methods).items()}


def resampled(loaded: Loaded, *, model: str, domain: str, draws: int = DRAWS, seed: int = 0) -> Resampled | None:
    """Redraw items and seeds together for all methods of one comparison.

    None if no method has both numbers, or if the gain is not of shares. Items are drawn with replacement within each
    task, the same draw for every method, whose scores are first averaged over its seeds. For a method with S > 1 seeds
    their part is added: Σ_s z_s d_s / sqrt(S (S − 1)), with d_s the deviation of seed s from the method's mean and
    z_s ~ N(0, 1) shared by all methods, over sqrt(χ²/df) of S − 1 degrees of freedom. Its covariance is that of the
    mean over seeds and its tails are Student's; drawing 3 seeds out of 3 would make the seeds' part a third too small.
    What differs between items by seed is in both parts, which errs on the wide side.
    """
    cells = loaded.of(model, domain)
    cells = cells.dropna(subset=["domain_gain", "forgetting"]) if len(cells) else cells
    if cells.empty:
        return None
    first, methods = cells.iloc[0], tuple(dict.fromkeys(cells["method"]))
    if units.of_domain(first) != units.SHARE:  # gain in nats against forgetting in points has no area
        return None
    tasks = retention_tasks(first)
    counts = {task: first["n"].get(task, 0) for task in [domain, *tasks]}
    means = cells.groupby("method")[["domain_gain", "forgetting"]].mean().astype(float).loc[list(methods)]
    rng = np.random.default_rng(seed)
    change = changes(loaded, cells, counts=counts)
    drawn = {task: _redrawn(values, draws=draws, rng=rng) for task, values in change.items()}
    gains, forgettings = drawn[domain], -np.mean([drawn[task] for task in tasks], axis=0)
    shift_gain, shift_forgetting = _seeds_part(cells, methods, draws=draws, rng=rng)
    return Resampled(
        methods=methods,
        gain=means["domain_gain"].to_numpy(),
        forgetting=means["forgetting"].to_numpy(),
        gains=gains + shift_gain,
        forgettings=forgettings + shift_forgetting,
        seeds=cells.groupby("method").size().to_dict(),
        n_domain=counts[domain],
        n_retention=sum(counts[task] for task in tasks),
    )


def reversed_interval(value: float, draws: np.ndarray) -> tuple[float | None, float | None]:
    """The reverse percentile ("basic") bootstrap interval, 2 · value − quantiles (Davison and Hinkley 1997, eq. 5.6).

    A front takes the best of several noisy points, so its redraws lie above it as it lies above the truth; simulated
    for five equally good points, percentiles of the redraws cover 7 to 77 %, these intervals 85 to 96 %. None, None if
    a draw is missing.
    """
    if not len(draws) or np.isnan(draws).any():
        return None, None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(2 * value - high), float(2 * value - low)


def changes(loaded: Loaded, cells: pd.DataFrame, *, counts: dict[str, int]) -> dict[str, np.ndarray]:
    """task -> (items, methods): tuned − base, mean over a method's seeds; NaN for a method without all its items."""
    methods = list(dict.fromkeys(cells["method"]))
    base, tuned = loaded.base_items(cells.iloc[0]["model"]), loaded.items_of(cells)
    absent = {task: np.full((1, len(methods)), np.nan) for task in counts}
    if not len(base) or not len(loaded.items):
        return absent
    tuned = tuned.assign(method=tuned["cell"].map(cells["method"]))
    runs = cells.groupby("method").size()
    made = {}
    for task, n in counts.items():
        before = base[base["task"] == task].set_index(KEYS)["score"]
        own = tuned[tuned["task"] == task].groupby([*KEYS, "method"])["score"].agg(["mean", "count"])
        own = own["mean"].where(own["count"] == runs.loc[own.index.get_level_values("method")].to_numpy())
        wide = own.unstack("method").reindex(index=before.index, columns=methods)
        change = wide.sub(before, axis=0).to_numpy(dtype=float)
        if len(change) != n or not n:
            return absent
        made[task] = np.where(np.isnan(change).any(axis=0), np.nan, change)
    return made


def _redrawn(change: np.ndarray, *, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, methods) means over n items drawn with replacement, the same draw for all methods."""
    n = len(change)
    return rng.multinomial(n, np.full(n, 1 / n), size=draws) @ change / n


def _seeds_part(
    cells: pd.DataFrame, methods: tuple[str, ...], *, draws: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(draws, methods) shifts of gain and of forgetting; zero for a method with one seed."""
    every = sorted(cells["seed"].unique())
    z, u = rng.standard_normal((draws, len(every))), rng.random((draws, 1))
    shifts = np.zeros((2, draws, len(methods)))
    for column, method in enumerate(methods):
        own = cells[cells["method"] == method]
        if (s := len(own)) < 2:
            continue
        scale = np.sqrt((s - 1) / chi2.ppf(u, s - 1)) / np.sqrt(s * (s - 1))
        shared = z[:, [every.index(k) for k in own["seed"]]]
        for measure, key in enumerate(("domain_gain", "forgetting")):
            values = own[key].to_numpy(dtype=float)
            shifts[measure][:, column] = shared @ (values - values.mean()) * scale[:, 0]
    return shifts[0], shifts[1]
