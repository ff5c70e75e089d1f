"""The variance of a mean over items that every seed answers: seeds and items are crossed, and both are random.

d[s, i] = mean + seed_s + item_i + rest_si, with T tasks of n_t items each and one seed shifting all tasks together. The
estimate is the mean over tasks, with equal weight, of a task's mean over seeds and items. Its variance has two parts:

    items   Σ_t MS_item,t / (S n_t) / T²                     what other items would change (rest included)
    seeds   Var_s(F_s) / S − Σ_t MS_rest,t / (S n_t) / T²    what other seeds would change; F_s is seed s's own estimate

For one task this is (MS_seed + MS_item − MS_rest) / (S n), two-way random effects (Searle, Casella and McCulloch 1992,
ch. 4). A negative seeds' part is set to 0, so that an interval is never narrower than one over items alone. In place of
Var_s(F_s) stands the moderated variance where other methods say how much seeds usually differ (seeds.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtridf
from scipy.stats import t as student


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean, its standard error, half the interval and the degrees of freedom, over the input's leading axes.

    df is that of the t which makes half = t(df) · error, so that a p value from it agrees with the interval. All but
    `value` are NaN if a task has fewer than two items.
    """

    value: np.ndarray
    error: np.ndarray
    half: np.ndarray
    df: np.ndarray


def crossed(
    tasks: Sequence[np.ndarray],
    *,
    level: float = 0.95,
    step: float = 0.0,
    moderated: tuple[np.ndarray, np.ndarray] | None = None,
) -> Estimate:
    """The mean over `tasks`, arrays (..., S seeds, n_t items) in any unit, with its interval at `level`.

    moderated: the variance between seeds and its degrees of freedom, in place of Var_s(F_s) and S − 1.

    Half the interval is the larger of t(df) · error, with Satterthwaite's df of the mean squares (Satterthwaite 1946;
    the negative one counts too), and sqrt(t(S−1)² · seeds + t(df_items)² · items), each part with the t of its own
    degrees of freedom (after Cochran 1964). Satterthwaite's alone covers .91 to .93 with three seeds that differ much:
    if they lie close together by chance, the error is small and the df large at once. His df are never taken to be
    fewer than the smaller of those of seeds (moderated) and of items: where seeds move items in opposite ways, MS_item
    is near 0, and the formula gives a fraction of one and an interval of any width. With one seed there is only the
    items' part, with t.

    step > 0 is for answers that are right or wrong: how far one item moves if its answer changes. MS_item is then that
    of the items and two more per task, one moved up and one down (as for paired proportions: Bonett and Price 2012),
    because answers that did not change do not show that none can; the plain interval covers 60 to 90 % if one item in a
    hundred changes (simulated in tests/analysis/test_coverage.py).

    Raises ValueError if there is no task, or if the tasks have different numbers of seeds.
    """
    if not tasks:
        raise ValueError("there is no task to average over")
    seeds = tasks[0].shape[-2]
    if any(scores.shape[-2] != seeds for scores in tasks):
        raise ValueError(f"tasks have different numbers of seeds: {[scores.shape[-2] for scores in tasks]}")
    by_seed = np.mean([scores.mean(axis=-1) for scores in tasks], axis=0)
    squared = [parts(scores, step) for scores in tasks]
    share = 1 / len(tasks) ** 2
    items = share * sum(item for item, _, _ in squared)
    rest = share * sum(rest for _, rest, _ in squared)
    squares_items = share**2 * sum(item**2 / df for item, _, df in squared)
    squares = squares_items
    between, fewest = np.zeros_like(items), np.zeros_like(items)
    if seeds > 1:
        variance, df_seeds = moderated or (by_seed.var(axis=-1, ddof=1), seeds - 1)
        whole = variance / seeds
        between = np.maximum(whole - rest, 0)
        fewest = np.minimum(df_seeds, min(df for _, _, df in squared)) + fewest
        squares = squares + whole**2 / df_seeds
        squares = squares + share**2 * sum(rest**2 / (df * (seeds - 1)) for _, rest, df in squared)
    point = (1 + level) / 2
    error = np.sqrt(items + between)
    df = np.maximum(_degrees(items + between, squares), fewest)
    half = student.ppf(point, df) * error
    if seeds > 1:
        by_seeds = student.ppf(point, df_seeds) ** 2 * between
        by_items = student.ppf(point, _degrees(items, squares_items)) ** 2 * items
        wider = np.sqrt(by_seeds + by_items)
        with np.errstate(divide="ignore", invalid="ignore"):
            df = np.where(wider > half, stdtridf(point, wider / error), df)
        half = np.maximum(half, wider)
    return Estimate(value=by_seed.mean(axis=-1), error=error, half=half, df=df)


def two_more(values: np.ndarray, *, step: float) -> np.ndarray:
    """(..., n items) and two more items, moved up and down by `step`; unchanged if it is 0."""
    moved = np.broadcast_to(np.array([step, -step]), (*values.shape[:-1], 2))
    return np.concatenate([values, moved], axis=-1) if step else values


def parts(scores: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray, float]:
    """MS_item / (S n), MS_rest / (S n) and n - 1 of one task; NaN if n < 2, no rest with one seed."""
    seeds, n = scores.shape[-2:]
    if n < 2:
        unknown = np.full(scores.shape[:-2], np.nan)
        return unknown, unknown, np.nan
    means = scores.mean(axis=-2)
    item = (with_more := two_more(means, step=step)).var(axis=-1, ddof=1) / with_more.shape[-1]
    if seeds == 1:
        return item, np.zeros_like(item), n - 1
    # sum of squares within an item over seeds, minus what the seeds' own means explain
    within = ((scores - means[..., None, :]) ** 2).sum(axis=(-1, -2))
    by_seed = scores.mean(axis=-1)
    explained = n * ((by_seed - by_seed.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    return item, np.maximum(within - explained, 0) / ((seeds - 1) * (n - 1)) / (seeds * n), n - 1


def _degrees(variance: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Satterthwaite's degrees of freedom, variance² / squares; infinite if nothing varies."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(squares == 0, np.inf, variance**2 / squares)
