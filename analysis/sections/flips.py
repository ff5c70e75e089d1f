"""Lost and gained answers (analysis/statistics/flips.py) as figures and a section of the report."""

import matplotlib
import numpy as np
import pandas as pd

from analysis import numbers, style, words
from analysis.load import Loaded
from analysis.statistics.flips import by_task, flips, most_forgotten, overlap, pairs, total

ROLES = ("domain", "score", "retention", "transfer")
SURE = 2.58  # standard deviations beyond which sharing is called more than chance
COMMON = (
    "Items of the retention tasks that count in forgetting which both methods lost, as a multiple of what independent "
    "draws of as many items would share (×1 is chance)"
)
DIAGONAL = "The diagonal compares the seeds of one method, if there are several."


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """What flips.html.j2 shows of one comparison; None without items. Rows are shown by hash, without their text."""
    items = flips(loaded, model=model, domain=domain)
    if items.empty or not items["counts"].any():
        return None
    methods = list(dict.fromkeys(items["method"]))
    tasks, shared = by_task(items), overlap(pairs(items), methods)
    totals = total(tasks)
    own = tasks[tasks["role"] == "domain"].set_index("method")
    seeds = int(items.groupby("method")["cell"].nunique().max())
    rows = []
    for method in totals.index:
        domain_cells = _cells(own.loc[method], seeds) if method in own.index else [("–", "")] * 6
        cells = _cells(totals.loc[method], seeds) + domain_cells
        rows.append({"method": method, "colour": style.colour(method), "cells": cells})
    return {
        "tasks": list(dict.fromkeys(items[items["counts"]]["task"])),
        "sentences": _sentences(totals, shared),
        "seeds": seeds,
        "rows": rows,
        "worst": [_forgotten(row) for row in most_forgotten(items).itertuples()],
        "command": f"python -m experiments flips '{model}/{domain}/*'",
    }


def _forgotten(row) -> dict:
    lost_by, methods = f"{row.lost_by} of {row.of}", words.few(row.methods)
    return {"task": row.task, "hash": row.doc_hash[:12], "lost_by": lost_by, "methods": methods}


def _cells(row: pd.Series, seeds: int) -> list[tuple[str, str]]:
    show = "{:.0f}".format if seeds == 1 else "{:.1f}".format
    known = [
        ("–" if numbers.missing(row[key]) else numbers.change(row[key]), "") for key in ("lost_known", "gained_known")
    ]
    sign = "+" if row["net"] > 0 else numbers.MINUS if row["net"] < 0 else ""
    share = f"{numbers.percent(row['lost'] / row['right'])} % of {row['right']:,.0f}" if row["right"] else ""
    return [
        (show(row["lost"]), share),
        known[0],
        (show(row["gained"]), ""),
        known[1],
        (sign + show(abs(row["net"])), ""),
        (f"{numbers.percent(row['churn'] / row['n'])} %", f"of {row['n']:,.0f}"),
    ]


def _sentences(totals: pd.DataFrame, shared: pd.DataFrame) -> list[str]:
    sentences = []
    worst = totals.loc[totals["lost"].idxmax()]
    if worst["lost"]:
        sentences.append(
            f"On the retention tasks that count in forgetting, {worst.name} lost the most right answers, "
            f"{worst['lost']:.0f} of {worst['right']:.0f}, and gained {worst['gained']:.0f} others: a score shows only "
            "the difference."
        )
    if totals["lost_known"].notna().all():
        low, high = totals["lost_known"].min(), totals["lost_known"].max()
        ends = numbers.change(low) if low == high else f"{numbers.change(low)} to {numbers.change(high)}"
        sentences.append(f"Less what guessing alone would lose, the methods lost {ends} right answers.")
    known = shared.dropna(subset=["ratio"]) if len(shared) else pd.DataFrame(columns=["method_a", "method_b"])
    between = known[known["method_a"] != known["method_b"]]
    if len(between):
        low, high = (numbers.times(end).removeprefix("×") for end in (between["ratio"].min(), between["ratio"].max()))
        more = int((between["deviations"] > SURE).sum())
        which = "all pairs exceed" if more == len(between) else f"{more} of {len(between)} pairs exceed"
        sentences.append(
            f"Two methods share {low if low == high else f'{low} to {high}'} times as many lost answers as independent "
            f"draws would; {which} chance by more than {SURE:g} standard deviations."
        )
    same = known[known["method_a"] == known["method_b"]]
    if len(same):
        each = words.few(f"{row.method_a} {numbers.times(row.ratio)}" for row in same.itertuples())
        sentences.append(f"Between two seeds of one method the ratio is: {each}.")
    return sentences


def answers_lost_and_gained(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """For each task the right answers lost (left) and gained (right) by each method, and the net."""
    items = flips(loaded, model=cells.iloc[0]["model"], domain=cells.iloc[0]["domain"])
    if items.empty:
        return None
    data = by_task(items)
    roles = data.drop_duplicates("task").set_index("task")["role"]
    tasks = sorted(roles.index, key=lambda task: ROLES.index(roles[task]))
    methods = list(dict.fromkeys(data["method"]))
    lines = -(-len(tasks) // 2)
    height = 0.6 + lines * (0.42 + (0.17 if len(methods) <= style.MANY else style.ROW) * len(methods))
    figure, panels = style.new(style.WIDTH, height, lines, 2, sharex=True, sharey=True, squeeze=False)
    title = f"Right answers lost and gained: {style.where(cells)}"
    figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
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
                place = {"xytext": (3 * side, 0), "textcoords": "offset points", "va": "center", "ha": ha}
                axes.annotate(f"{value:.3g}", (side * value, k), **place, **style.INSIDE)
        first = own.iloc[0]
        chance = ", at chance" if first["role"] == "retention" and not first["counts"] else ""
        axes.set_title(f"{task} ({first['role']}, n = {first['n']:.0f}){chance}", fontsize=8.5)
        axes.set_yticks(list(y), methods, fontsize=8.5 if len(methods) <= style.MANY else 7.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
    panels[0, 0].set_ylim(len(methods) - 0.4, -0.6)
    panels[0, 0].set_xlim(-1.25 * widest, 1.25 * widest)
    panels[0, 0].xaxis.set_major_formatter(lambda x, _: f"{abs(x):g}")
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    below = "items: lost to the left, gained to the right (paler); the tick is the net"
    figure.supxlabel(below, fontsize=9, color=style.INK)
    caption = (
        "An answer is lost if the base has it right and the tuned model wrong. A score shows only the net: methods of "
        "equal score may have changed very different numbers of answers."
    )
    return figure, data, "Answers lost and gained", caption


def lost_in_common(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Lost items that two methods share, over what independent draws would share, as a matrix."""
    items = flips(loaded, model=cells.iloc[0]["model"], domain=cells.iloc[0]["domain"])
    if items.empty:
        return None
    methods = list(dict.fromkeys(items["method"]))
    data = overlap(pairs(items), methods)
    if data.empty or data["ratio"].isna().all():
        return None
    title = f"Lost in common: {style.where(cells)}"
    if len(methods) > style.MANY:
        caption = f"{COMMON}. Darker is more, up to the 99th percentile; blank is not known; the CSV has each pair."
        return _in_shades(data, methods, title), data, "Lost in common", f"{caption} {DIAGONAL}"
    place = {method: k for k, method in enumerate(methods)}
    side = max(2.6, 0.5 + 0.62 * len(methods))
    figure, axes = style.new(min(style.WIDTH, side + 1.5), min(style.WIDTH, side) + 0.4)
    small = min(1.0, 8 / len(methods))  # the figure grows up to a page's width, then the squares shrink
    shades, top = matplotlib.colormaps["Blues"], max(2.0, float(data["ratio"].max()))
    for row in data.dropna(subset=["ratio"]).itertuples():
        depth = 0.08 + 0.82 * min(1.0, max(0.0, np.log(max(row.ratio, 1e-9)) / np.log(top)))
        text = {"ha": "center", "va": "center", "color": style.LIGHT if depth > 0.7 else style.DARK}
        for x, y in {(place[row.method_a], place[row.method_b]), (place[row.method_b], place[row.method_a])}:
            corner, look = (x - 0.48, y - 0.48), {"facecolor": shades(depth), "linewidth": 0}
            axes.add_patch(matplotlib.patches.Rectangle(corner, 0.96, 0.96, **look))
            axes.text(x, y - 0.1, numbers.times(row.ratio), fontsize=9 * small, fontweight="bold", **text)
            axes.text(x, y + 0.24, f"{100 * row.jaccard:.0f} %", fontsize=7.5 * small, **text)
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xticks(range(len(methods)), methods, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(methods)), methods)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, x=0, fontsize=8.5)
    caption = f"{COMMON}, and below it their share of all items that either lost. {DIAGONAL}"
    return figure, data, "Lost in common", caption


def _in_shades(data: pd.DataFrame, methods: list[str], title: str):
    """The matrix without numbers, which many methods leave no room for."""
    ratio = data.pivot(index="method_a", columns="method_b", values="ratio").reindex(index=methods, columns=methods)
    ratio = ratio.combine_first(ratio.T).reindex(index=methods, columns=methods)
    top = max(2.0, float(np.nanquantile(ratio, 0.99)))  # one pair of few items would leave all others pale
    norm = matplotlib.colors.Normalize(1, top, clip=True)
    bar = "shared lost items, times what independent draws would share"
    figure, axes = style.shaded(ratio, norm=norm, bar=bar, rows=len(methods))
    axes.set_xticks(np.arange(len(methods)) + 0.5, methods, rotation=90, fontsize=min(7.5, 330 / len(methods)))
    axes.set_title(title)
    return figure


FIGURES = (answers_lost_and_gained, lost_in_common)
