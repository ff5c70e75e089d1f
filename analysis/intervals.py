"""95 % intervals over the scored items of one run.

They say how far the number would move with other items, and nothing about another seed: 'this run, not this method'.
With several seeds an item's scores are averaged over them first; what differs between seeds is then still not in it.
"""

from dataclasses import dataclass
from math import exp, sqrt

import pandas as pd

Z = 1.959963984540054  # the 97.5 % point of the normal distribution; every set has 100 rows or more
KEYS = ["task", "doc_id", "doc_hash"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and upper 95 % bound and the items behind it; bounds are None where n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low is not None and (self.low > 0 or self.high < 0)


def paired(base: pd.DataFrame, tuned: pd.DataFrame) -> pd.DataFrame:
    """Items of both on the same rows: task, doc_id, doc_hash, gold, base, tuned (mean over the runs in `tuned`)."""
    mean = tuned.groupby(KEYS, sort=False, as_index=False, dropna=False).agg(tuned=("score", "mean"))
    return base[[*KEYS, "score", "gold"]].rename(columns={"score": "base"}).merge(mean, on=KEYS, validate="one_to_one")


def wilson(right: float, n: int) -> Interval:
    """Wilson's interval for a share `right`/`n` (Wilson 1927); stays inside [0, 1]."""
    p, z2 = right / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, middle - half, middle + half, n)


def mean_difference(pairs: pd.DataFrame, tasks: list[str]) -> Interval:
    """tuned - base, averaged over `tasks` with equal weight; variance sum_t s_t^2/n_t over T^2, s_t of the item differences."""
    values, variance, n = [], 0.0, 0
    for task in tasks:
        rows = pairs[pairs["task"] == task]
        difference = rows["tuned"] - rows["base"]
        values.append(float(difference.mean()))
        variance += float(difference.var(ddof=1)) / len(difference) if len(difference) > 1 else float("nan")
        n += len(difference)
    value, half = sum(values) / len(values), Z * sqrt(variance) / len(values) if variance == variance else None
    return Interval(value, None if half is None else value - half, None if half is None else value + half, n)


def perplexity_ratio(pairs: pd.DataFrame) -> Interval:
    """exp of the difference in nats per token, tuned over base; passages are the items, weighted by their tokens.

    log r = sum(d_i)/sum(t_i), d_i the difference in total nats and t_i the tokens of passage i; its variance is that of a
    ratio estimator: sum((d_i - log r * t_i)^2) * n/(n-1) / sum(t_i)^2.
    """
    rows = pairs[pairs["task"] == "general"]
    difference, tokens = rows["tuned"] - rows["base"], rows["gold"].astype(float)
    ratio, n = float(difference.sum() / tokens.sum()), len(rows)
    if n < 2:
        return Interval(exp(ratio), None, None, n)
    half = Z * sqrt(float(((difference - ratio * tokens) ** 2).sum()) * n / (n - 1)) / float(tokens.sum())
    return Interval(exp(ratio), exp(ratio - half), exp(ratio + half), n)

