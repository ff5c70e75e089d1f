"""What methods lose at the same gain: a method that learns nothing forgets nothing, so runs differ at their ends.

The gain is in nats per token of the domain's scored rows. A method that ran at several settings (a family of blocks,
analysis/families.py) has a curve of gain against loss through them:

    settings that another one of the method beats, with as much gained and as little lost, are left out
    between the others, in the order of their gains, the line is straight
    from the least gain of all settings to the first of the others, the loss is that of the first, which gains more
    below the least gain and beyond the last there is no number

The curve is what the method can do if its setting is chosen well. Everything is redrawn with items and seeds crossed
(analysis/statistics/resample.py), the level at which methods are compared included. Simulated for two methods of two
settings each whose curves are the same (seeds that differ by 0.02 and 0.015 nats, 300 and 256 texts): a difference is
found at 5 % in .043 of 300 studies of five seeds and .057 of three, and the interval covers 0 in .95 and .94; with the
variance between seeds moderated by these four settings, .060 and .93 with five seeds.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import numbers
from analysis.statistics.intervals import Z
from analysis.statistics.nats import DOMAIN
from analysis.statistics.resample import Resampled, reversed_interval, reversed_p

BARELY = 0.5  # a method that does not reach this share of the best method's gain has barely learned, and sets no level
ENOUGH = 0.95  # an interval is given if at least this share of the redraws has a number


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The settings of a family that count, (..., k) in the order of their gains; a setting left out repeats its better.

    Of one comparison (k,), or of all its redraws (draws, k). `least` is the least gain of all settings, (...).
    """

    gain: np.ndarray
    lost: np.ndarray
    least: np.ndarray

    @property
    def last(self) -> np.ndarray:
        return self.gain[..., -1]

    def at(self, gain: np.ndarray | float, *, bound: bool = False) -> np.ndarray:
        """What is lost at a gain, (...); NaN outside the curve, but with `bound` the first setting's loss before it."""
        gain = np.broadcast_to(gain, self.least.shape)
        level = np.maximum(gain, self.least) if bound else gain
        k = np.clip((self.gain < level[..., None]).sum(axis=-1), 0, self.gain.shape[-1] - 1)[..., None]
        before = np.maximum(k - 1, 0)
        g0, g1, f0, f1 = (
            np.take_along_axis(values, place, -1)[..., 0]
            for values, place in ((self.gain, before), (self.gain, k), (self.lost, before), (self.lost, k))
        )
        share = np.divide(level - g0, g1 - g0, out=np.ones_like(level), where=g1 > g0)
        outside = (level < self.least) | (level > self.last)
        return np.where(outside, np.nan, (1 - share) * f0 + share * f1)


def curve(gain: np.ndarray, lost: np.ndarray) -> Curve:
    """The curve through settings (..., k); all NaN where one of them is not known."""
    unknown = np.isnan(gain).any(axis=-1, keepdims=True) | np.isnan(lost).any(axis=-1, keepdims=True)
    order = np.lexsort((-lost, gain), axis=-1)
    g, f = np.take_along_axis(gain, order, -1).copy(), np.take_along_axis(lost, order, -1).copy()
    for place in range(g.shape[-1] - 2, -1, -1):
        beaten = f[..., place] >= f[..., place + 1]
        g[..., place] = np.where(beaten, g[..., place + 1], g[..., place])
        f[..., place] = np.where(beaten, f[..., place + 1], f[..., place])
    least = np.where(unknown[..., 0], np.nan, gain.min(axis=-1))
    return Curve(gain=np.where(unknown, np.nan, g), lost=np.where(unknown, np.nan, f), least=least)


def curves(made: Resampled, key: str, names: Iterable[str] | None = None) -> dict[str, tuple[Curve, Curve]]:
    """family -> its curve of gain against the loss `key`, as measured and redrawn, where all items are known; `names`
    are the families asked for, all by default."""
    gain, lost = made.values[DOMAIN], made.values[key]
    gains, losses = made.draws[DOMAIN], made.draws[key]
    found = {
        name: (curve(gain[own], lost[own]), curve(gains[:, own], losses[:, own]))
        for name, own in made.families.items()
        if names is None or name in names
    }
    return {name: pair for name, pair in found.items() if not np.isnan(pair[0].gain).any()}


def level(made: Resampled, deciding: Collection[str] | None = None) -> tuple[float, np.ndarray] | None:
    """The gain at which all methods are compared, as measured and redrawn (draws,); None if none learned.

    It is the largest that every one of the families `deciding` reaches, all by default, ignoring those that barely
    learned.
    """
    among = made.families if deciding is None else deciding
    most = {name: made.values[DOMAIN][made.families[name]].max() for name in among}
    best = np.nanmax(list(most.values()), initial=-np.inf)
    kept = [name for name, value in most.items() if value >= BARELY * best]
    if not best > 0:
        return None
    again = np.min([made.draws[DOMAIN][:, made.families[name]].max(axis=1) for name in kept], axis=0)
    return float(min(most[name] for name in kept)), again


def matched(made: Resampled, deciding: Collection[str] | None = None) -> pd.DataFrame:
    """One row per (measure, family): what is lost at the gain of `level`; empty if none of the deciding learned.

    gain    the level
    value, low, high
            what is lost there with its 95 % interval; None where the level is not on the family's curve, and no
            interval where fewer than ENOUGH of the redraws have a number
    why     the reason where there is no value
    """
    at, rows = level(made, deciding), []
    for key in made.losses if at else ():
        found = curves(made, key)
        for name in made.families:
            row = {"measure": key, "family": name, "gain": at[0], "value": None, "low": None, "high": None}
            if name not in found:
                rows.append(row | {"why": "not known of all of its items"})
                continue
            point, again = found[name]
            value = float(point.at(at[0]))
            if np.isnan(value):
                rows.append(row | {"why": _why(point, at[0])})
                continue
            drawn = again.at(at[1])
            kept = drawn[~np.isnan(drawn)]
            low, high = reversed_interval(value, kept) if len(kept) >= ENOUGH * len(drawn) else (None, None)
            rows.append(row | {"value": value, "low": low, "high": high, "why": ""})
    return pd.DataFrame(rows, columns=["measure", "family", "gain", "value", "low", "high", "why"])


def _why(point: Curve, gain: float) -> str:
    if point.last < gain:
        return f"gains at most {numbers.nats(float(point.last))}"
    return f"gains more at its first setting ({numbers.nats(float(point.least))})"


@dataclass(frozen=True, kw_only=True)
class Equal:
    """What a loses minus what b loses at a gain that both reach, the largest; nats, or a share for accuracy.

    low, high, p  the 95 % interval and two-sided p from redrawn items and seeds
    beyond        the one of the two that gains more at its first setting than the other ever does: its loss is then
                  that of this setting, so that the difference is too large for "a" and too small for "b"; else ''
    """

    a: str
    b: str
    gain: float
    difference: float
    low: float | None
    high: float | None
    p: float | None
    beyond: str = ""

    @property
    def error(self) -> float:
        """The standard error that the width of the interval stands for."""
        return (self.high - self.low) / (2 * Z)

    @property
    def less(self) -> bool:
        """Whether it can be said that a loses less at equal gain, if p is below a level."""
        return self.difference < 0 and self.p is not None and self.beyond in ("", self.a)


def equal_gain(made: Resampled, a: str, b: str, *, key: str) -> Equal | None:
    """Compare two families at the largest gain that both reach, in the measure `key`; None if one is not known.

    The gain is redrawn with everything else, because it is itself measured.
    """
    found = curves(made, key, (a, b)) if key in made.values else {}
    if a not in found or b not in found:
        return None
    (one, ones), (other, others) = found[a], found[b]
    gain, gains = np.minimum(one.last, other.last), np.minimum(ones.last, others.last)
    value = float(one.at(gain, bound=True) - other.at(gain, bound=True))
    drawn = ones.at(gains, bound=True) - others.at(gains, bound=True)
    low, high = reversed_interval(value, drawn)
    beyond = a if gain < one.least else b if gain < other.least else ""
    bounds = {"low": low, "high": high, "p": reversed_p(value, drawn)}
    return Equal(a=a, b=b, gain=float(gain), difference=value, beyond=beyond, **bounds)
