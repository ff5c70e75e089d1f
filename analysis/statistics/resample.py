"""What every method gained and lost under the same redrawn items and seeds, for numbers that mix methods and measures.

A number at equal gain, or a front, takes both of its axes from the same runs, and compares methods that answered the
same items and saw the data in the same order. So items are drawn with replacement within each task, the same draw for
every method and measure, and the seeds' part is drawn with one number a seed for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.stats import chi2

from analysis.families import families
from analysis.load import Loaded, retention_tasks
from analysis.measures import ACCURACY, BY_KEY
from analysis.statistics.intervals import GENERAL_TEXT
from analysis.statistics.nats import DOMAIN, Change, Changes

DRAWS = 2000
# (measure, method, variance between seeds, degrees of freedom) -> the same, moderated by other methods
Moderate = Callable[[str, str, float, float], tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """The M methods of one (model, domain).

    values   measure -> (M,) the reported values, means over seeds; DOMAIN is the gain in nats per token, all others are
             losses: those in nats, and ACCURACY as a share of 1. A measure that no method has is missing
    draws    measure -> (draws, M) the same redrawn; NaN for a method without all of its items
    seeds    number of seeds by method
    """

    methods: tuple[str, ...]
    values: dict[str, np.ndarray]
    draws: dict[str, np.ndarray]
    seeds: dict[str, int]

    @property
    def families(self) -> dict[str, list[int]]:
        """Columns by family, in the order of the grid."""
        place = self.methods.index
        return {name: [place(method) for method in blocks] for name, blocks in families(self.methods).items()}

    def seeds_of(self, family: str) -> int:
        """The least number of seeds of a family's settings."""
        return min(self.seeds[self.methods[place]] for place in self.families[family])

    @property
    def losses(self) -> tuple[str, ...]:
        """The measures of forgetting that are known, the most sensitive first."""
        return tuple(key for key in self.values if key != DOMAIN)


def resampled(
    loaded: Loaded,
    *,
    model: str,
    domain: str,
    draws: int = DRAWS,
    seed: int = 0,
    changes: Changes | None = None,
    moderate: Moderate | None = None,
) -> Resampled | None:
    """Redraw items and seeds together for all methods of one comparison; None if no gain in nats is known.

    A mean over tokens is redrawn as the ratio of redrawn sums. For a method with S > 1 seeds their part is added to
    each draw: Σ_s z_s d_s / sqrt(S (S − 1)), with d_s the deviation of seed s from the method's mean and z_s ~ N(0, 1)
    shared by all methods and measures, over sqrt(χ²/df) of S − 1 degrees of freedom. Its covariance is that of the mean
    over seeds and its tails are Student's; drawing 3 seeds out of 3 would make the seeds' part a third too small. What
    differs between items by seed is in both parts, which errs on the wide side. `moderate` replaces a method's own
    variance and degrees of freedom.
    """
    cells = loaded.of(model, domain)
    if cells.empty or not loaded.base_items(model).size:
        return None
    changes = changes or Changes(loaded, cells)
    runs = {method: own.sort_values("seed") for method, own in cells.groupby("method", sort=False)}
    seeds = sorted(cells["seed"].unique())
    rng = np.random.default_rng(seed)
    z, u = rng.standard_normal((draws, len(seeds))), rng.random((draws, 1))
    weights: dict[str, np.ndarray] = {}

    @cache  # methods with as many seeds share their degrees of freedom, and a quantile takes longer than the rest
    def tails(df: float) -> np.ndarray:
        return np.sqrt(df / chi2.ppf(u, df))

    def redrawn(task: str, n: int) -> np.ndarray:
        if task not in weights:
            weights[task] = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float32)
        return weights[task]

    values, again = {}, {}
    for key in (DOMAIN, *BY_KEY, ACCURACY):
        found = {method: change_of(changes, list(own.index), key) for method, own in runs.items()}
        if not any(found.values()):
            continue
        values[key], again[key] = np.full(len(runs), np.nan), np.full((draws, len(runs)), np.nan)
        for column, method in enumerate(runs):
            if found[method] is None:
                continue
            tasks, change = found[method]
            by_seed = np.mean(_means(change), axis=0)
            each = [_drawn(change, k, redrawn(task, change.tasks[k].shape[1])) for k, task in enumerate(tasks)]
            values[key][column], again[key][:, column] = by_seed.mean(), np.mean(each, axis=0)
            if (count := len(by_seed)) > 1:
                shared = z[:, [seeds.index(one) for one in runs[method]["seed"]]]
                scale = _scale(by_seed, tails, key=key, method=method, moderate=moderate) / np.sqrt(count * (count - 1))
                again[key][:, column] += shared @ (by_seed - by_seed.mean()) * scale
    if DOMAIN not in values:
        return None
    return Resampled(
        methods=tuple(runs), values=values, draws=again, seeds={method: len(own) for method, own in runs.items()}
    )


def reversed_interval(value: float, draws: np.ndarray) -> tuple[float | None, float | None]:
    """The reverse percentile ("basic") bootstrap interval, 2 · value − quantiles (Davison and Hinkley 1997, eq. 5.6).

    The best of several noisy settings looks better than it is, and in the redraws once more, so these intervals turn
    the redraws round; simulated for a front of five equally good points, percentiles of the redraws cover 7 to 77 %,
    these intervals 85 to 96 %. None, None if a draw is missing.
    """
    if not len(draws) or np.isnan(draws).any():
        return None, None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(2 * value - high), float(2 * value - low)


def reversed_p(value: float, draws: np.ndarray) -> float | None:
    """Two-sided p of no difference: the level at which `reversed_interval` begins to include 0; None like there."""
    if not len(draws) or np.isnan(draws).any():
        return None
    turned = 2 * value - draws
    least = min((turned <= 0).sum(), (turned >= 0).sum())
    return float(min(1.0, 2 * (least + 1) / (len(draws) + 1)))


def change_of(changes: Changes, runs: list[str], key: str) -> tuple[list[str], Change] | None:
    """The tasks behind a measure, and what `runs` gained of the domain or lost otherwise; None if it is not known."""
    first = changes.first
    if key == DOMAIN:
        tasks, change = [first["domain"]], changes.per_token(first["domain"], runs)
    elif key in BY_KEY:
        measure = BY_KEY[key]
        tasks = [GENERAL_TEXT] if measure.general else changes.tasks(measure, runs)
        change = changes.of(measure, runs)
    else:
        tasks, gained = retention_tasks(first), changes.scored(retention_tasks(first), runs)
        change = None if gained is None else -gained
    return None if change is None else (tasks, change)


def _means(change: Change) -> list[np.ndarray]:
    """Each task's mean by seed."""
    if change.tokens is not None:
        return [task.sum(axis=1) / change.tokens.sum() for task in change.tasks]
    return [task.mean(axis=1) for task in change.tasks]


def _drawn(change: Change, place: int, weights: np.ndarray) -> np.ndarray:
    """A task's redrawn mean, (draws,)."""
    whole = weights @ change.tokens if change.tokens is not None else weights.sum(axis=1)
    return weights @ change.tasks[place].mean(axis=0) / whole


def _scale(by_seed: np.ndarray, tails, *, key: str, method: str, moderate: Moderate | None) -> np.ndarray:
    """What turns normal shifts by seed into Student's, (draws,); tails(df) is √(df/χ²) of each draw."""
    own, df = float(by_seed.var(ddof=1)), float(len(by_seed) - 1)
    variance, df = moderate(key, method, own, df) if moderate else (own, df)
    ratio = np.sqrt(variance / own) if own > 0 else 0.0
    return (ratio * tails(df))[:, 0]
