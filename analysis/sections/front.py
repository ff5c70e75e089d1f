"""The figure of gain against loss, both in nats: a curve through each method's settings, and the front over all."""

import pandas as pd

from analysis import numbers, style, words
from analysis.chosen import settings_said
from analysis.load import Loaded
from analysis.measures import GENERAL
from analysis.statistics.contrasts import redrawn
from analysis.statistics.front import points
from analysis.statistics.nats import DOMAIN

CROWDED = 16  # points up to which all are named, the blocks of a sweep as "s1" beside their method's colour and shape
FEW = 8  # points up to which each is drawn with its intervals


def gain_against_nats(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Gain in nats per token of the domain against nats per token of general text lost; one point a setting."""
    data = points(loaded, rows, **cells.iloc[0][["model", "domain"]])
    if data.empty:
        return None
    figure, axes = style.new(style.WIDTH, 4.5 if len(data) <= FEW else 5.6 if len(data) <= CROWDED else 7.5)
    texts, first = cells.iloc[0]["n"].get("general_text", 0), rows.iloc[0]
    axes.axhline(0, color=style.MUTED, linewidth=0.8)
    axes.axvline(0, color=style.MUTED, linewidth=0.8)
    axes.plot(0, 0, "+", color=style.INK, markersize=10, markeredgewidth=1.6)
    axes.set_title(f"Gain against text lost: {style.where(cells)}, n = {first['n_domain']} rows + {texts} texts")
    axes.set_xlabel("gain on the domain, nats per token (right is better)")
    axes.set_ylabel("general text lost, nats per token (down is better)")
    labels, others, bars = [(0, 0, "base", style.INK)], [], []
    for name, own in data.groupby("family", sort=False):
        shade, named = style.colour(name), not own["chosen"].any()
        axes.plot(own[DOMAIN], own[GENERAL.key], color=shade, linewidth=1.1, alpha=0.7)
        for point in own.to_dict("records"):
            x, y = point[DOMAIN], point[GENERAL.key]
            if point["front"] or len(data) <= FEW:
                bars += _draw_bars(axes, point, shade)
            size, fill = (8, shade) if point["front"] else (5.5, style.PAPER)
            look = {"color": shade, "markersize": size, "markerfacecolor": fill, "markeredgewidth": 1.4}
            axes.plot(x, y, style.marker(name), **look)
            if point["chosen"] or named:
                (labels if point["front"] or len(data) <= CROWDED else others).append((x, y, point["method"], shade))
                named = False
            elif len(data) <= CROWDED:
                labels.append((x, y, point["method"].removeprefix(f"{name}-"), shade))
    axes.margins(0.1)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    bars += [(left, 0, right, 0), (0, bottom, 0, top)]
    size = 8.5 if len(data) <= CROWDED else 7.5
    unnamed = style.label_points(axes, labels + others, bars=bars, size=size, always=len(labels))
    caption = (
        "Each line goes through the settings of one method, in their order. Filled points are on the front: no other "
        f"gains as much and loses as little. {_bars(data)}"
    )
    caption += f" Without a name for want of room: {words.few(unnamed)}." if unnamed else ""
    return figure, data, "Gain against forgetting, in nats", caption


def _bars(data: pd.DataFrame) -> str:
    drawn = "." if len(data) <= FEW else ", drawn for the front only; the CSV has them all."
    return f"Bars are 95 % confidence intervals{drawn}"


def section(loaded: Loaded, rows: pd.DataFrame, *, model: str, domain: str) -> list[str]:
    """Sentences about the front of one comparison and the settings on it; none for fewer than two settings."""
    data = points(loaded, rows, model=model, domain=domain, draws=redrawn(loaded, model=model, domain=domain))
    if len(data) < 2:
        return []
    best, said = data[data["front"]].sort_values(DOMAIN), settings_said(loaded, model=model, domain=domain)
    if best.empty:
        none = "No setting is on the front of gain against loss: the bare base gains as much and loses as little."
        return [none, *said]
    return [f"On the front of gain against loss: {words.few(map(_place, best.to_dict('records')), join='; ')}.", *said]


def _place(point: dict) -> str:
    share = point["front_share"]
    share = "" if numbers.missing(share) else f", in {100 * share:.0f} % of the redraws"
    return f"{point['method']} ({numbers.nats(point[DOMAIN])} gained, {numbers.nats(point[GENERAL.key])} lost{share})"


def _draw_bars(axes, point: dict, shade: str) -> list[tuple[float, float, float, float]]:
    """Draw a point's intervals and return them as lines, which the labels avoid."""
    (x, left, right), (y, low, high) = (
        [point.get(key + end) for end in ("", "_low", "_high")] for key in (DOMAIN, GENERAL.key)
    )
    xerr, yerr = style.bars(x, left, right), style.bars(y, low, high)
    axes.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", color=shade, elinewidth=1.0, alpha=0.7)
    return ([(left, y, right, y)] if xerr else []) + ([(x, low, x, high)] if yerr else [])
