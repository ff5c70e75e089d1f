"""What a study needs to tell a difference between a method and plain fine-tuning: how many seeds, how many items.

The variance of a difference, paired by seed and item, with S seeds and n items, is

    seed² / S + item² / n + rest² / (S n)

seed, item and rest are the standard deviations of the difference between seeds, between items, and of what differs
between items by seed. They are those of the study's own median pair of methods (`of_study`), or before a study ran
those of USUAL. Retention tasks are as large beside each other as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtridf
from scipy.stats import t as student

from analysis.load import Loaded
from analysis.statistics.contrasts import Contrasts
from analysis.statistics.crossed import parts
from analysis.statistics.detectable import LEVEL, detectable


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The standard deviations of a difference between two methods, in nats or in shares of 1.

    df     what other methods say about the spread of seeds, in degrees of freedom (seeds.py)
    items  the number of items behind them, and `pairs` the number of pairs of methods; 0 if they are USUAL
    """

    seed: float
    item: float
    rest: float = 0.0
    df: float = 0.0
    items: int = 0
    pairs: int = 0


# of the study `track` (`python -m experiments power --study track --difference 0.01`): pairs of methods with five seeds
# that lose up to 0.08 nats a token; the more a method loses, the more its seeds differ
USUAL = {
    "general_nll_lost": Spread(seed=0.0012, item=0.018, rest=0.019),
    "forgetting": Spread(seed=0.0, item=0.18, rest=0.18),
}


def of_study(contrasts: Contrasts, key: str) -> Spread | None:
    """The spread of the median pair of methods that trained, at one setting; None without two of several seeds."""
    measured, found, pools = contrasts.measured(key), [], []
    for setting, methods in contrasts.at_settings().items():
        own = [method for method in methods if method in contrasts.independent]
        for i, a in enumerate(own):
            for b in own[i + 1 :]:
                if measured and len(seeds := contrasts.shared(measured, a, b)) > 1:
                    found.append(_components(measured, contrasts.differences(measured, a, b, seeds)))
                    pools.append(contrasts.priors(key, setting)[1].df)
    if not found:
        return None
    seed, item, rest = np.sqrt(np.median(found, axis=0))
    df = float(np.median(pools))
    return Spread(seed=seed, item=item, rest=rest, df=df, items=measured.n, pairs=len(found))


def _components(measured, tasks: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The variances between seeds, and of an item and of the rest as if all items were of one task."""
    seeds, n, share = tasks[0].shape[0], measured.n, 1 / len(tasks) ** 2
    each = [parts(task, measured.step)[:2] for task in tasks]
    items, rest = (share * sum(float(part[k]) for part in each) for k in (0, 1))
    whole = float(np.mean([task.mean(axis=1) for task in tasks], axis=0).var(ddof=1))
    return max(whole - rest * seeds, 0.0), max(items - rest, 0.0) * n, rest * seeds * n


def needed(spread: Spread, *, seeds: Sequence[int], items: Sequence[int], tests: int) -> pd.DataFrame:
    """The difference that 80 of 100 studies tell at the first step of Holm's correction for `tests` tests.

    Rows are numbers of seeds, columns numbers of items.
    """
    s, n = np.array(seeds, dtype=float)[:, None], np.array(items, dtype=float)[None, :]
    by_seed, by_item = spread.seed**2 / s, spread.item**2 / n + spread.rest**2 / (s * n)
    error, of_seeds = np.sqrt(by_seed + by_item), s - 1 + spread.df
    df = (by_seed + by_item) ** 2 / (by_seed**2 / of_seeds + by_item**2 / (n - 1))
    point = (1 + 1 - LEVEL) / 2
    apart = np.sqrt(student.ppf(point, of_seeds) ** 2 * by_seed + student.ppf(point, n - 1) ** 2 * by_item) / error
    df = np.where(apart > student.ppf(point, df), stdtridf(point, apart), df)  # the wider of the two, as in crossed.py
    return pd.DataFrame(detectable(error, df, tests=tests), index=list(seeds), columns=list(items))


def spreads(loaded: Loaded, key: str) -> dict[tuple[str, str], Spread]:
    """(model, domain) -> its spread, for those with two methods of several seeds."""
    found = {pair: of_study(Contrasts(loaded, model=pair[0], domain=pair[1]), key) for pair in loaded.comparisons}
    return {pair: spread for pair, spread in found.items() if spread}
