"""Figures of lost and gained answers (analysis/sections/flips.py)."""

import matplotlib
import numpy as np
import pandas as pd

from analysis import numbers, style
from analysis.load import Loaded
from analysis.sections.flips import ROLES, by_task, flips, overlap, pairs

DARK, LIGHT = "#10141a", "#fdfdfd"  # text on a filled square, which is the same on the light and the dark page


def answers_lost_and_gained(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """For each task right answers lost (left) and gained (right) by each method, and the net."""
    items = _items(loaded, cells)
    if items.empty:
        return None
    data = by_task(items)
    tasks = sorted(
        dict.fromkeys(data["task"]), key=lambda task: ROLES.index(data[data["task"] == task]["role"].iloc[0])
    )
    methods = list(dict.fromkeys(data["method"]))
    lines = -(-len(tasks) // 2)
    figure, panels = style.new(
        style.WIDTH, 0.6 + lines * (0.42 + 0.17 * len(methods)), lines, 2, sharex=True, sharey=True, squeeze=False
    )
    figure.suptitle(
        f"Right answers lost and gained: {style.where(cells)}", fontsize=9.5, fontweight="bold", x=0.01, ha="left"
    )
    widest = max(float(data[["lost", "gained"]].max(axis=None)), 1.0)
    for axes, task in zip(panels.flat, tasks):
        own = data[data["task"] == task].set_index("method").reindex(methods)
        shades, y = [style.colour(method) for method in methods], range(len(methods))
        axes.barh(y, -own["lost"], color=shades, height=0.66)
        axes.barh(y, own["gained"], color=shades, height=0.66, alpha=0.45)
        axes.plot(own["net"], y, "|", color=style.INK, markersize=8, markeredgewidth=1.8)
        axes.axvline(0, color=style.MUTED, linewidth=0.8)
        for k, (lost, gained) in enumerate(zip(own["lost"], own["gained"])):
            for value, side, ha in ((lost, -1, "right"), (gained, 1, "left")):
                axes.annotate(
                    f"{value:.3g}",
                    (side * value, k),
                    xytext=(3 * side, 0),
                    textcoords="offset points",
                    va="center",
                    ha=ha,
                    fontsize=7.5,
                    color=style.INK,
                )
        first = own.iloc[0]
        chance = ", at chance" if first["role"] == "retention" and not first["counts"] else ""
        axes.set_title(f"{task} ({first['role']}, n = {first['n']:.0f}){chance}", fontsize=8.5)
        axes.set_yticks(list(y), methods)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
    panels[0, 0].invert_yaxis()
    panels[0, 0].set_xlim(-1.25 * widest, 1.25 * widest)
    panels[0, 0].xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    figure.supxlabel(
        "items: lost to the left, gained to the right (paler); the tick is the net", fontsize=9, color=style.INK
    )
    caption = (
        "An answer is lost where the base has it right and the tuned model wrong. A score shows only the net: "
        "methods of equal score may have changed very different numbers of answers."
    )
    return figure, data, "Answers lost and gained", caption


def lost_in_common(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Lost items that two methods share, over what independent draws would share, as a matrix."""
    items = _items(loaded, cells)
    if items.empty:
        return None
    methods = list(dict.fromkeys(items["method"]))
    data = overlap(pairs(items), methods)
    if data.empty or data["ratio"].isna().all():
        return None
    place = {method: k for k, method in enumerate(methods)}
    side = max(2.6, 0.5 + 0.62 * len(methods))
    figure, axes = style.new(min(style.WIDTH, side + 1.5), min(style.WIDTH, side) + 0.4)
    small = min(1.0, 8 / len(methods))  # the figure grows up to a page's width, then the squares shrink
    shades, top = matplotlib.colormaps["Blues"], max(2.0, float(data["ratio"].max()))
    for row in data.dropna(subset=["ratio"]).itertuples():
        depth = 0.08 + 0.82 * min(1.0, max(0.0, np.log(max(row.ratio, 1e-9)) / np.log(top)))
        for x, y in {(place[row.method_a], place[row.method_b]), (place[row.method_b], place[row.method_a])}:
            axes.add_patch(
                matplotlib.patches.Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, facecolor=shades(depth), linewidth=0)
            )
            ink = LIGHT if depth > 0.7 else DARK
            axes.text(
                x,
                y - 0.1,
                numbers.times(row.ratio),
                ha="center",
                va="center",
                fontsize=9 * small,
                fontweight="bold",
                color=ink,
            )
            axes.text(
                x, y + 0.24, f"{100 * row.jaccard:.0f} %", ha="center", va="center", fontsize=7.5 * small, color=ink
            )
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(len(methods)), methods, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"Lost in common: {style.where(cells)}", x=0, fontsize=8.5)
    caption = (
        "Items of retention tasks that count which both methods lost, times what independent draws of as many would share (×1 is chance), and below "
        "it their share of all items that either lost. The diagonal compares seeds of one method, where there are several."
    )
    return figure, data, "Lost in common", caption


FIGURES = (answers_lost_and_gained, lost_in_common)


def _items(loaded: Loaded, cells: pd.DataFrame) -> pd.DataFrame:
    first = cells.iloc[0]
    return flips(loaded, model=first["model"], domain=first["domain"])
