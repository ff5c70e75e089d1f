"""The front of gain against forgetting over methods and sweep blocks, and its hypervolume."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis import numbers, style, units, words
from analysis.chosen import choices
from analysis.families import family
from analysis.load import Loaded
from analysis.measures import GENERAL
from analysis.statistics.resample import Resampled, resampled, reversed_interval

ALL = "all methods"
EMPTY = 0.025  # share of redraws without any area beyond which there is no interval
MARGIN = 5  # points between the worst forgetting seen and the reference point
CAPTION = (
    "Filled points are on the front: no other gains as much and forgets as little. The wide grey line is what they "
    "reach together"
)
CROWDED = 16  # points up to which all are named, the blocks of a sweep as "s1" beside their method's colour and shape
FEW = 8  # points up to which each is drawn with its intervals


@dataclass(frozen=True, kw_only=True)
class Front:
    """One comparison's front.

    points     one row per method: method, family, seeds, gain, forgetting (shares), front, front_share (of redraws)
    volumes    one row per family and one for ALL: family, blocks, hypervolume with _low and _high, luck; in points²
    reference  forgetting of the reference point, a share of 1; its gain is 0
    """

    points: pd.DataFrame
    volumes: pd.DataFrame
    reference: float
    n_domain: int
    n_retention: int

    @property
    def most_seeds(self) -> int:
        return int(self.points["seeds"].max())


def nondominated(gain: np.ndarray, forgetting: np.ndarray) -> np.ndarray:
    """Which of (..., k) points are not dominated by another or by the bare base (0, 0).

    A point is dominated by one that gains as much and forgets as little, with at least one of them strictly better.
    """
    gain, forgetting = np.asarray(gain, float), np.asarray(forgetting, float)
    pad = [(0, 0)] * (gain.ndim - 1) + [(0, 1)]  # the base is a choice too
    gain, forgetting = np.pad(gain, pad), np.pad(forgetting, pad)
    g, f = gain[..., :, None], forgetting[..., :, None]
    others_g, others_f = gain[..., None, :], forgetting[..., None, :]
    dominated = (others_g >= g) & (others_f <= f) & ((others_g > g) | (others_f < f))
    return ~dominated.any(axis=-1)[..., :-1]


def hypervolume(gain: np.ndarray, forgetting: np.ndarray, *, reference: float) -> np.ndarray:
    """The area that (..., k) points dominate down to the reference point (gain 0, forgetting `reference`); shape (...).

    Exact in two dimensions by one sweep (Zitzler and Thiele 1998): with gains in descending order g_1 ≥ … ≥ g_k and
    g_{k+1} = 0, Σ_i (g_i − g_{i+1}) (reference − min_{j≤i} f_j), with gains below 0 and forgetting above the reference
    clipped.
    """
    gain, forgetting = np.clip(gain, 0, None), np.minimum(forgetting, reference)
    order = np.argsort(-gain, axis=-1, kind="stable")
    gain = np.take_along_axis(gain, order, -1)
    least = np.minimum.accumulate(np.take_along_axis(forgetting, order, -1), axis=-1)
    below = np.concatenate([gain[..., 1:], np.zeros_like(gain[..., :1])], axis=-1)
    return ((gain - below) * (reference - least)).sum(axis=-1)


def front(loaded: Loaded, *, model: str, domain: str) -> Front | None:
    """The front over all methods and sweep blocks of one comparison; None if no method has gain and forgetting.

    The reference point is gain 0 and MARGIN points more forgetting than the worst (or than none), rounded up to a whole
    point, so that the worst method keeps a volume and redraws are seldom clipped. It is the same for all redraws;
    another study has another.
    """
    draws = resampled(loaded, model=model, domain=domain)
    if draws is None:
        return None
    worst = max(0.0, float(draws.forgetting.max()))
    reference = (math.ceil(round(100 * worst, 9)) + MARGIN) / 100
    share = np.full(len(draws.methods), np.nan)
    if not np.isnan(draws.gains).any() and not np.isnan(draws.forgettings).any():
        share = nondominated(draws.gains, draws.forgettings).mean(axis=0)
    points = pd.DataFrame({"method": draws.methods, "family": [family(method) for method in draws.methods]})
    points["seeds"] = points["method"].map(draws.seeds)
    points["gain"], points["forgetting"] = draws.gain, draws.forgetting
    points["front"], points["front_share"] = nondominated(draws.gain, draws.forgetting), share
    rows = [_volume(draws, name, columns, reference) for name, columns in draws.families.items()]
    if len(rows) > 1:
        rows.append(_volume(draws, ALL, list(range(len(draws.methods))), reference))
    counts = {"n_domain": draws.n_domain, "n_retention": draws.n_retention}
    return Front(points=points, volumes=pd.DataFrame(rows), reference=reference, **counts)


@dataclass(frozen=True, kw_only=True)
class Plane:
    """A figure of gain against forgetting: one row of `data` per method, in the units of the axes.

    data    method, family, front, gain and forgetting with their _low and _high
    end     forgetting at which the front's line ends
    """

    data: pd.DataFrame
    title: str
    x: str
    y: str
    end: float


def gain_against_nats(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Gain against the nats per token of general text that were lost, the measure of forgetting that resolves most."""
    keys = ["domain_gain", GENERAL.key]
    rows = rows.dropna(subset=keys) if set(keys) <= set(rows) else rows[:0]
    if rows.empty:
        return None
    unit, names = rows.iloc[0]["unit"], list(rows["method"])
    scale = 100 if unit == units.SHARE else 1
    data = pd.DataFrame({"method": names, "family": [family(name) for name in names], "seeds": rows["seeds"].to_list()})
    for name, key, factor in (("gain", "domain_gain", scale), ("forgetting", GENERAL.key, 1)):
        for end in ("", "_low", "_high"):
            data[name + end] = factor * rows[key + end].astype(float).to_numpy()
    data["front"] = nondominated(data["gain"], data["forgetting"])
    texts = cells.iloc[0]["n"].get("general_text", 0)
    plane = Plane(
        data=data,
        title=f"Gain against text lost: {style.where(cells)}, n = {rows.iloc[0]['n_domain']} + {texts} texts",
        x=f"gain on the domain, {units.named(unit)} (right is better)",
        y="general text lost, nats per token (down is better)",
        end=math.inf,
    )
    caption = (
        "Forgetting as the nats per token by which general text became less likely: it shows differences that "
        f"accuracy cannot. {CAPTION}. {_bars(data)}"
    )
    figure, unnamed = _drawn(plane)
    return figure, data, "Gain against forgetting, in nats", caption + unnamed


def gain_forgetting_front(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Gain against forgetting of every method and sweep block, in points, with the front as a step line."""
    made = front(loaded, model=cells.iloc[0]["model"], domain=cells.iloc[0]["domain"])
    if made is None:
        return None
    keys = ["domain_gain_low", "domain_gain_high", "forgetting_low", "forgetting_high"]
    data = made.points.join(rows.set_index("method")[keys].astype(float), on="method")
    shown = ["gain", "forgetting", *keys]
    data[shown] = 100 * data[shown]
    plane = Plane(
        data=data.rename(columns={f"domain_gain_{end}": f"gain_{end}" for end in ("low", "high")}),
        title=f"Front of gain against forgetting: {style.where(cells)}, n = {made.n_domain} + {made.n_retention}",
        x="gain on the domain, points (right is better)",
        y="forgetting, points (down is better)",
        end=100 * made.reference,
    )
    caption = (
        f"Forgetting as right answers lost. {CAPTION}, towards the reference point of the hypervolume (gain 0, "
        f"forgetting {100 * made.reference:.0f} points). {_bars(data)}"
    )
    figure, unnamed = _drawn(plane)
    return figure, data, "The front of gain against forgetting, in right answers", caption + unnamed


def _bars(data: pd.DataFrame) -> str:
    drawn = "." if len(data) <= FEW else ", drawn for the front only; the CSV has them all."
    return f"Bars are 95 % confidence intervals{drawn}"


def _drawn(plane: Plane):
    """The figure of a plane, and a sentence about the points without a name.

    Up to CROWDED points every family is named at least once; of more, the front is, and of the others those for which
    there is room.
    """
    data = plane.data
    figure, axes = style.new(style.WIDTH, 4.5 if len(data) <= FEW else 5.6 if len(data) <= CROWDED else 7.5)
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    axes.axvline(0, color=style.MUTED, linewidth=0.8)
    axes.plot(0, 0, "+", color=style.INK, markersize=10, markeredgewidth=1.6)
    axes.set_title(plane.title)
    labels, others, bars = [(0, 0, "base", style.INK)], [], []
    named = set(data[data["front"] | (data["family"] == data["method"])]["method"])
    for name, own in data.groupby("family", sort=False):
        shade = style.colour(name)
        if not named & set(own["method"]):
            named.add(own.iloc[0]["method"])
        for point in own.itertuples():
            if point.front or len(data) <= FEW:
                bars += _draw_bars(axes, point, shade)
            size, fill = (8, shade) if point.front else (5.5, style.PAPER)
            look = {"color": shade, "markersize": size, "markerfacecolor": fill, "markeredgewidth": 1.4}
            axes.plot(point.gain, point.forgetting, style.marker(name), **look)
            if point.method in named or len(data) <= CROWDED:
                label = point.method if point.method in named else point.method.removeprefix(f"{name}-")
                where = labels if point.front or len(data) <= CROWDED else others
                where.append((point.gain, point.forgetting, label, shade))
    axes.set_xlabel(plane.x)
    axes.set_ylabel(plane.y)
    axes.margins(0.1)
    axes.set_xlim(axes.get_xlim())  # the line may end far from the methods
    axes.set_ylim(axes.get_ylim())
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    line = _steps(data[data["front"]], reference=min(plane.end, top + (top - bottom)))
    axes.plot(*zip(*line), color=style.FAINT, linewidth=4, alpha=0.6, zorder=1, solid_joinstyle="miter")
    bars += [(x0, min(y0, top), x1, min(y1, top)) for (x0, y0), (x1, y1) in zip(line, line[1:])]
    bars += [(left, 0, right, 0), (0, bottom, 0, top)]
    size = 8.5 if len(data) <= CROWDED else 7.5
    unnamed = style.label_points(axes, labels + others, bars=bars, size=size, always=len(labels))
    return figure, f" Without a name for want of room: {words.few(unnamed)}." if unnamed else ""


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """What front.html.j2 shows of one comparison; None if there is nothing to compare (fewer than two methods)."""
    made = front(loaded, model=model, domain=domain)
    if made is None or len(made.points) < 2:
        return None
    best = made.points[made.points["front"]].sort_values("gain")
    table = choices(loaded, model=model, domain=domain)
    picked = table[table["chosen"]].set_index("family")["method"].to_dict()
    sentence = "No method is on the front: the bare base gains as much and forgets as little."
    if len(best):
        sentence = f"On the front: {words.few(_place(point) for point in best.itertuples())}."
    families = made.volumes[made.volumes["family"] != ALL]
    return {
        "sentence": sentence,
        "reference": f"gain 0, forgetting {100 * made.reference:.0f} points",
        "covers": "items and seeds" if made.most_seeds > 1 else "items only: this run, not this method",
        "swept": bool((families["blocks"] > 1).any()),
        "n": f"{made.n_domain} domain and {made.n_retention} retention rows",
        "rows": [_row(made, row, picked) for row in made.volumes.itertuples()],
    }


def _row(made: Front, row, picked: dict[str, str]) -> dict:
    interval = f"[{row.hypervolume_low:.1f}, {row.hypervolume_high:.1f}]"
    own = made.points[made.points["front"] & (made.points["family"] == row.family)]["method"]
    whole = row.family == ALL
    return {
        "name": row.family,
        "whole": whole,
        "colour": style.colour(row.family),
        "blocks": row.blocks,
        "volume": f"{row.hypervolume:.1f}",
        "luck": "–" if row.blocks < 2 or numbers.missing(row.luck) else f"{max(row.luck, 0.0):.1f}",
        "interval": "" if numbers.missing(row.hypervolume_low) else interval,
        "chosen": picked.get(row.family, ""),
        "on_front": f"{int(made.points['front'].sum())} of {len(made.points)}" if whole else ", ".join(own),
    }


def _volume(draws: Resampled, name: str, columns: list[int], reference: float) -> dict:
    """A family's hypervolume in points², with its interval; `luck` is how far the median of the redraws lies above it.

    The median, not the mean: with three seeds gain and forgetting have Student's tails of 2 degrees of freedom, and the
    mean of their product is infinite. Redraws start from points that are spread already: for two to twelve equally good
    settings the median shows 0.3 to 0.6 of the luck. There is no interval if the redraws pile up at an area of 0, where
    it would cover the truth in as few as half of all studies.
    """
    value = 1e4 * float(hypervolume(draws.gain[columns], draws.forgetting[columns], reference=reference))
    again = 1e4 * hypervolume(draws.gains[:, columns], draws.forgettings[:, columns], reference=reference)
    low, high = reversed_interval(value, again) if (again <= 0).mean() <= EMPTY else (None, None)
    return {
        "family": name,
        "blocks": len(columns),
        "hypervolume": value,
        "hypervolume_low": None if low is None else max(low, 0.0),
        "hypervolume_high": high,
        "luck": None if np.isnan(again).any() else float(np.median(again)) - value,
    }


def _steps(points: pd.DataFrame, *, reference: float) -> list[tuple[float, float]]:
    """Corners of the front's edge, from the base's gain to the reference point's forgetting."""
    corners, gain = [], 0.0
    for point in points.sort_values(["gain", "forgetting"]).itertuples():
        corners += [(min(gain, point.gain), point.forgetting), (point.gain, point.forgetting)]
        gain = point.gain
    return [*corners, (gain, reference)] if corners else [(0.0, 0.0), (0.0, reference)]


def _draw_bars(axes, point, shade: str) -> list[tuple[float, float, float, float]]:
    """Draw a point's intervals and return them as lines, which the labels avoid."""
    xerr = style.bars(point.gain, point.gain_low, point.gain_high)
    yerr = style.bars(point.forgetting, point.forgetting_low, point.forgetting_high)
    look = {"fmt": "none", "color": shade, "elinewidth": 1.0, "alpha": 0.7}
    axes.errorbar(point.gain, point.forgetting, xerr=xerr, yerr=yerr, **look)
    lines = [(point.gain_low, point.forgetting, point.gain_high, point.forgetting)] if xerr else []
    return lines + ([(point.gain, point.forgetting_low, point.gain, point.forgetting_high)] if yerr else [])


def _place(point) -> str:
    share = "" if numbers.missing(point.front_share) else f", in {100 * point.front_share:.0f} % of the redraws"
    return f"{point.method} (gain {numbers.points(point.gain)}, forgetting {numbers.points(point.forgetting)}{share})"
