"""Forgetting at the same gain on the scored rows, between families of sweep blocks: the mean gap of two curves."""

from itertools import combinations

import numpy as np
import pandas as pd

from analysis.statistics.resample import Resampled, reversed_interval

POINTS = 33  # gains at which two curves are compared: the trapezoid's error is far below a point
ENOUGH = 0.95  # an interval is given where so many of the redraws share a gain


def curve(gain: np.ndarray, forgetting: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A family's forgetting at gains `at` (..., P), from its blocks (..., k); NaN outside the gains it was swept over.

    A block counts with the least forgetting of any block that gains as much or more, so a bad setting does not speak against
    its family; between neighbouring blocks by gain the line is straight.
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


def gap(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over the gains both families reach of the first's forgetting minus the second's, and that range's ends; shapes (...).

    Each family is (gain, forgetting) of its blocks, (..., k). The mean vertical distance of two curves over their shared range
    is Bjontegaard's (VCEG-M33, 2001), with straight lines for his cubics. A family of one block is compared at its own gain.
    NaN where they share no gain.
    """
    low = np.maximum(first[0].min(axis=-1), second[0].min(axis=-1))
    high = np.minimum(first[0].max(axis=-1), second[0].max(axis=-1))
    at = np.clip(low[..., None] + (high - low)[..., None] * np.linspace(0, 1, POINTS), None, high[..., None])
    distance = curve(*first, at) - curve(*second, at)
    mean = (distance[..., 1:] + distance[..., :-1]).mean(axis=-1) / 2
    return np.where(low <= high, mean, np.nan), low, high


def gaps(found: Resampled) -> pd.DataFrame:
    """A row a pair of families of which one was swept: a, b, difference (forgetting of a minus b, a share of 1) with its interval.

    gain_low, gain_high are the gains they share; all are None where there is none. `shared` is the share of redraws that share a gain; the
    interval (redrawn items, and seeds where several) is left out below ENOUGH, as it would speak of the lucky redraws alone.
    """
    rows = []
    for (a, first), (b, second) in combinations(found.families.items(), 2):
        if len(first) < 2 and len(second) < 2:
            continue
        at = lambda columns: (found.gain[columns], found.forgetting[columns])
        redrawn = lambda columns: (found.gains[:, columns], found.forgettings[:, columns])
        value, low, high = map(float, gap(at(first), at(second)))
        row = {
            "a": a,
            "b": b,
            "difference": None,
            "low": None,
            "high": None,
            "gain_low": None,
            "gain_high": None,
            "shared": 0.0,
        }
        if value == value:
            draws = gap(redrawn(first), redrawn(second))[0]
            kept = draws[~np.isnan(draws)]
            bounds = reversed_interval(value, kept) if len(kept) >= ENOUGH * len(draws) else (None, None)
            row |= {
                "difference": value,
                "low": bounds[0],
                "high": bounds[1],
                "gain_low": low,
                "gain_high": high,
                "shared": len(kept) / len(draws),
            }
        rows.append(row)
    return pd.DataFrame(rows, columns=["a", "b", "difference", "low", "high", "gain_low", "gain_high", "shared"])
