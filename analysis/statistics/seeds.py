"""The variance between seeds: pooled over the methods of a study, and moderated by each method's own.

Three seeds say little about their own spread, and twenty methods of three seeds say much about the usual one. With s²_k
the variance of k over its seeds (d_k = seeds − 1 degrees of freedom) and s0², d0 the prior that all of them suggest,

    moderated s²_k = (d0_k s0² + d_k s²_k) / (d0_k + d_k),  with d0_k + d_k degrees of freedom

d0 and s0² are Smyth's (2004, Statistical Applications in Genetics and Molecular Biology 3:3, sections 6.1 and 6.2): the
mean of log s² and how much it varies beyond what chance explains. Two things are added. d0 is at most what was pooled,
and methods whose seeds move together count as fewer. And d0_k = d0 · P(F(d_k, most) ≥ s²_k / s0²): a spread that
would be odd among the others keeps its own seeds (the idea of Phipson et al. 2016, Annals of Applied Statistics 10).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, polygamma
from scipy.stats import f as fisher


@dataclass(frozen=True, kw_only=True)
class Prior:
    """The usual variance between seeds, how many degrees of freedom it is worth, and how many stand behind the pool."""

    variance: float = 0.0
    df: float = 0.0
    most: float = 0.0


def moderated(priors: Sequence[Prior], variances: np.ndarray, df: float) -> tuple[np.ndarray, np.ndarray]:
    """K variances of `df` degrees of freedom moderated by a prior each, and their degrees of freedom then, (K,)."""
    usual, worth, most = (np.array([getattr(prior, name) for prior in priors]) for name in ("variance", "df", "most"))
    odd = fisher.sf(variances / np.where(usual > 0, usual, 1.0), df, np.maximum(most, df))
    own = worth * odd
    return (own * usual + df * variances) / (own + df), own + df


def of_methods(values: np.ndarray) -> Prior:
    """The prior of the variance of one method, from (P methods, S seeds); NaN where a method lacks a seed.

    Every method sees the data of a seed in the same order, so their seeds may move together. With r their correlation,
    the pool is worth P / (1 + (P − 1) r²) methods.
    """
    values = values[(~np.isnan(values)).sum(axis=1) > 1] if len(values) else values
    if len(values) < 2:
        return Prior()
    methods, together = len(values), _correlation(values) ** 2
    df = (~np.isnan(values)).sum(axis=1) - 1.0
    return _prior(np.nanvar(values, axis=1, ddof=1), df, alike=together, count=methods / (1 + (methods - 1) * together))


def of_pairs(values: np.ndarray) -> Prior:
    """The prior of the variance of a difference between two methods, paired by seed, from (P methods, S seeds).

    Of all P (P − 1) / 2 differences only P − 1 are independent, and the variances of two that share a method have the
    correlation 1/4.
    """
    methods = len(values)
    first, second = np.triu_indices(methods, 1)
    differences = values[first] - values[second]
    df = (~np.isnan(differences)).sum(axis=1) - 1.0
    if (df > 0).sum() < 2:
        return Prior()
    differences, df = differences[df > 0], df[df > 0]
    alike = 2 * (methods - 2) / (methods * (methods - 1) / 2 - 1) / 4
    return _prior(np.nanvar(differences, axis=1, ddof=1), df, alike=alike, count=methods - 1)


def _prior(variances: np.ndarray, df: np.ndarray, *, alike: float, count: float) -> Prior:
    """Smyth's prior of variances whose logarithms have the mean correlation `alike` and are worth `count` free ones."""
    if not (middle := np.median(variances)):
        return Prior()
    variances = np.maximum(variances, 1e-5 * middle)  # seeds that agree to the last digit have no logarithm
    logs = np.log(variances) - digamma(df / 2) + np.log(df / 2)
    beyond = logs.var(ddof=1) / (1 - min(alike, 0.9)) - polygamma(1, df / 2).mean()
    most = max(count * df.mean(), df.max())
    if beyond <= 0:  # they differ no more than by chance
        return Prior(variance=float(np.average(variances, weights=df)), df=max(most - df.mean(), 0.0), most=most)
    prior = 2 * _trigamma_inverse(beyond)
    usual = np.exp(logs.mean() + digamma(prior / 2) - np.log(prior / 2))
    return Prior(variance=float(usual), df=float(min(prior, max(most - df.mean(), 0.0))), most=most)


def _correlation(values: np.ndarray) -> float:
    """(MS_seed − MS_rest) / (MS_seed + (P − 1) MS_rest) over the seeds that all methods have, at least 0."""
    shared = values[:, ~np.isnan(values).any(axis=0)]
    if shared.shape[1] < 2:
        return 1.0
    methods, seeds = shared.shape
    centred = shared - shared.mean(axis=1, keepdims=True)
    by_seed = centred.mean(axis=0)
    square_seed = methods * (by_seed**2).sum() / (seeds - 1)
    square_rest = ((centred - by_seed) ** 2).sum() / ((seeds - 1) * (methods - 1))
    whole = square_seed + (methods - 1) * square_rest
    return float(np.clip((square_seed - square_rest) / whole, 0.0, 1.0)) if whole else 1.0


def _trigamma_inverse(value: float) -> float:
    """x with trigamma(x) = value > 0, by Newton's method as Smyth's appendix has it."""
    x = 0.5 + 1 / value
    for _ in range(50):
        at = polygamma(1, x)
        x += at * (1 - at / value) / polygamma(2, x)
    return float(x)
