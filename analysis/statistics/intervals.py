"""95 % intervals of the reported numbers.

With several seeds they cover other items and other seeds, which are crossed (analysis/statistics/crossed.py): they are
about the method. With one seed they cover other items only, not another seed: 'this run, not this method'.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt

import numpy as np
import pandas as pd
from scipy.stats import t as student

from analysis.statistics.crossed import crossed
from methods.errors import UserError

Z = 1.959963984540054  # the 97.5 % point of the normal distribution
KEYS = ["task", "doc_id", "doc_hash"]
FIXED = [*KEYS, "gold", "base", "tuned"]  # the columns of `paired` that are not runs
GENERAL_TEXT = "general"  # the task of the general passages among the items
SCOPES = {"run": "this run, not this method", "method": "this method: other seeds and other items"}


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bounds, which are None if n < 2, and the number of items behind it.

    scope  "run" (one seed: items only) or "method" (several seeds: items and seeds)
    error  standard error in the unit of `value` (of log(value) for a ratio), None if unknown; df its degrees of freedom
    """

    value: float
    low: float | None
    high: float | None
    n: int
    seeds: int = 1
    scope: str = "run"
    error: float | None = None
    df: float | None = None

    @property
    def p(self) -> float | None:
        """Two-sided p of no difference, by the t that the bounds are of; None for one run or an unknown error."""
        if self.scope != "method" or self.error is None:
            return None
        return float(p_value(self.value, self.error, self.df))

    def __neg__(self) -> "Interval":
        """The interval of the negated number, because forgetting is the negated change."""
        low, high = (None if bound is None else -bound for bound in (self.high, self.low))
        return Interval(-self.value, low, high, self.n, self.seeds, self.scope, self.error, self.df)


def p_value(value: np.ndarray, error: np.ndarray, df: np.ndarray) -> np.ndarray:
    """Two-sided p of t = value / error; 1 where there is neither a difference nor an error."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * student.sf(np.abs(value) / error, df)
    return np.where((np.asarray(value) == 0) & (np.asarray(error) == 0), 1.0, p)


def paired(base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """Items on the same rows: task, doc_id, doc_hash, gold, base, tuned (mean over the runs), and one column per cell.

    Rows that the base or any run lacks are left out, so compare counts before treating it as complete. Without a column
    `cell`, `tuned` is one run, "run". Raises UserError if a run has a row twice.
    """
    tuned = tuned if "cell" in tuned else tuned.assign(cell="run")
    _refuse_twice("base", base)
    if (again := tuned.duplicated(["cell", *KEYS])).any():
        name = tuned.loc[again, "cell"].iloc[0]
        _refuse_twice(name, tuned[tuned["cell"] == name])
    place = {name: column for column, name in enumerate(dict.fromkeys(tuned["cell"]))}
    rows, own = (pd.MultiIndex.from_frame(frame[KEYS]) for frame in (base, tuned))
    row, column = rows.get_indexer(own), tuned["cell"].map(place).to_numpy(dtype=int)
    scores, there = np.full((len(base), len(place)), np.nan), np.zeros((len(base), len(place)), dtype=bool)
    known = row >= 0
    scores[row[known], column[known]] = tuned["score"].to_numpy(dtype=float)[known]
    there[row[known], column[known]] = True
    runs = pd.DataFrame(scores, columns=list(place), index=base.index)
    pairs = base[[*KEYS, "score", "gold"]].rename(columns={"score": "base"}).assign(tuned=runs.mean(axis=1))
    return pd.concat([pairs, runs], axis=1)[there.all(axis=1)].reset_index(drop=True)


def tokens_of(items: pd.DataFrame) -> pd.Series:
    """The number of tokens behind each item's log-likelihood, missing where unknown.

    Results before the column `tokens` have it for general passages alone, under `gold`.
    """
    passages = items["gold"].where(items["task"] == GENERAL_TEXT)
    return items["tokens"].fillna(passages) if "tokens" in items else passages


def by_run(rows: pd.DataFrame) -> np.ndarray:
    """The tuned scores of some rows of `paired`, (S runs, n items); the column `tuned` if there are no runs."""
    runs = [column for column in rows.columns if column not in FIXED] or ["tuned"]
    return rows[runs].to_numpy(dtype=float).T


def of_arrays(tasks: Sequence[np.ndarray], *, step: float = 1.0) -> Interval:
    """The mean over tasks with equal weight; one array (S seeds, n_t items) per task, in shares of 1.

    step  how far one item moves if its answer changes, see `crossed`; 0 for numbers that are not right or wrong
    """
    estimate, n, seeds = crossed(tasks, step=step), sum(scores.shape[1] for scores in tasks), tasks[0].shape[0]
    value, half, scope = float(estimate.value), float(estimate.half), "method" if seeds > 1 else "run"
    if half != half:
        return Interval(value, None, None, n, seeds, scope)
    return Interval(value, value - half, value + half, n, seeds, scope, float(estimate.error), float(estimate.df))


def of_set(changes: Sequence[float], errors: Sequence[float | None], *, n: int) -> Interval:
    """The mean over runs of changes in a metric of the whole set of `n` rows; `errors` are bootstrap standard errors.

    The runs answer the same rows, so the rows' part of the variance is the mean of theirs, not that over S, which errs
    on the wide side. With S > 1 runs the seeds' part, variance / S with Student's t of S − 1 degrees of freedom, is
    added as in analysis/statistics/crossed.py.
    """
    values, seeds = np.asarray(changes, dtype=float), len(changes)
    value, scope = float(values.mean()), "method" if seeds > 1 else "run"
    if any(error is None or error != error for error in errors):
        return Interval(value, None, None, n, seeds, scope)
    items = float(np.mean(np.square(np.asarray(errors, dtype=float))))
    between = float(values.var(ddof=1)) / seeds if seeds > 1 else 0.0
    half = sqrt(Z**2 * items + (student.ppf(0.975, seeds - 1) ** 2 * between if seeds > 1 else 0.0))
    df = float(seeds - 1) if between else float("inf")
    return Interval(value, value - half, value + half, n, seeds, scope, sqrt(items + between), df)


def refuse_unequal(*, base: pd.DataFrame, tuned: pd.DataFrame, tasks: list[str]) -> None:
    """Raise UserError if a run of `tuned` was not scored on exactly the base's rows (KEYS) of `tasks`, each once."""

    def rows(items: pd.DataFrame) -> set[tuple]:
        return set(items.loc[items["task"].isin(tasks), KEYS].itertuples(index=False, name=None))

    wanted = rows(base)
    if absent := [task for task in tasks if task not in {name for name, *_ in wanted}]:
        raise UserError(f"the base has no scored row of task {absent[0]}: score the base again")
    for name, items in [("run", tuned)] if "cell" not in tuned else tuned.groupby("cell", sort=False):
        if different := rows(items) ^ wanted:
            task, _, digest = min(different)
            raise UserError(
                f"{name} and its base do not have the same rows: {len(different)} are in one of them only, first "
                f"{digest} of {task}: score both again"
            )
        _refuse_twice(name, items)


def _refuse_twice(name: str, rows: pd.DataFrame) -> None:
    if (again := rows.duplicated(KEYS)).any():
        twice = rows[again].iloc[0]
        raise UserError(f"{name}: row {twice['doc_hash']} of task {twice['task']} is scored twice: score it again")


def wilson(right: float, n: float, *, z: float = Z) -> Interval:
    """Wilson's interval for the share `right` / `n` (Wilson 1927), which stays inside [0, 1]."""
    p, z2 = right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, middle - half, middle + half, round(n), error=sqrt(p * (1 - p) / n), df=float("inf"))


def of_shares(scores: np.ndarray) -> Interval:
    """The mean of scores in [0, 1], (S seeds, n items): Wilson's interval for one seed.

    For several seeds it is Wilson's with the number of rows that would give the crossed variance v, n = p(1−p)/v, and
    half / error of the crossed interval for z (as for survey samples: Franco et al. 2019, J. Survey Statistics and
    Methodology 7), which stays inside [0, 1].
    """
    seeds, n = scores.shape
    p = float(scores.mean())
    if seeds == 1:
        return wilson(p * n, n)
    estimate = crossed([scores])
    error, rows, z = float(estimate.error), seeds * n, Z
    if error > 0 and 0 < p < 1:  # else nothing varies, and only the number of rows is known
        rows, z = min(p * (1 - p) / error**2, rows), float(estimate.half) / error
    at = wilson(p * rows, rows, z=z)
    return Interval(p, at.low, at.high, n, seeds, "method", error, float(estimate.df))


def per_token(change: np.ndarray, tokens: np.ndarray) -> Interval:
    """Σ change / Σ tokens over n texts: `change` (S seeds, n) in nats, `tokens` (n,)."""
    return of_arrays([linearised(change, tokens)], step=0)


def linearised(change: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The parts of n texts in Σ change / Σ tokens, of which it is the mean: `change` (S seeds, n), `tokens` (n,).

    With r the ratio of a run, r + n (change_i − r · tokens_i) / Σ tokens. The variance of their mean is, for one run,
    the ratio estimator's, Σ (change_i − r · tokens_i)² · n/(n−1) / (Σ tokens)² (Cochran 1977, ch. 6).
    """
    whole = tokens.sum()
    ratios = change.sum(axis=1, keepdims=True) / whole
    return ratios + len(tokens) * (change - ratios * tokens) / whole


def perplexity_ratio(lost: Interval) -> Interval:
    """The ratio of two perplexities, exp of the nats per token lost; over seeds `value` is the geometric mean."""
    bounds = [None if bound is None else exp(bound) for bound in (lost.low, lost.high)]
    return Interval(exp(lost.value), *bounds, lost.n, lost.seeds, lost.scope, lost.error, lost.df)
