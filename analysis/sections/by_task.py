"""What was lost on each retention task, as figures: in nats of the right answers, and in right answers."""

import numpy as np
import pandas as pd

from analysis import numbers, style, units
from analysis.load import Loaded
from analysis.measures import GOLD
from analysis.statistics.intervals import of_arrays
from analysis.statistics.nats import Changes

ACROSS = 4  # panels side by side
SIGN = "(base minus tuned; right of 0 is loss)"


def nats_lost_by_task(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Nats of the right answers lost on each retention task; tasks at chance in grey."""
    first, changes, records = cells.iloc[0], Changes(loaded, cells), []
    for task in [task for task, score in first["scores_by_task"].items() if score["role"] == "retention"]:
        for method, own in cells.groupby("method", sort=False):
            change = changes.of_task(task, list(own.index), value=GOLD.value)
            if change is not None:
                found = change.interval
                records.append((task, method, found.value, found.low, found.high))
    if not records:
        return None
    data = pd.DataFrame(records, columns=["task", "method", "nats_lost", "low", "high"])
    data.insert(2, "at_chance", data["task"].isin(first["at_chance"]))
    data.insert(3, "n", data["task"].map(first["n"]))
    title, what = f"Right answers lost by task: {style.where(cells)}", "right answers lost, nats per item"
    figure = _by_task(data, "nats_lost", title=title, what=what)
    caption = (
        f"By how many nats the right answers became less likely; bars are {_over(cells)}. Tasks of long answers have "
        "more nats to lose. Grey tasks are at chance for the base model and do not count in the mean."
    )
    return figure, data, "Right answers lost by task, in nats", caption


def forgetting_by_task(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Base minus tuned for each retention task; tasks at chance in grey."""
    first, changes, records = cells.iloc[0], Changes(loaded, cells), []
    retention = [task for task, score in first["scores_by_task"].items() if score["role"] == "retention"]
    shown = [task for task in retention if units.of_task(first, task) == units.SHARE]
    for method, own in cells.groupby("method", sort=False):
        for task in shown:
            values = [100 * np.mean([scores[task]["base"] - scores[task]["value"] for scores in own["scores_by_task"]])]
            if (change := changes.scored([task], list(own.index))) and first["n"][task] > 1:
                found = of_arrays(change.tasks)
                values += [-100 * found.high, -100 * found.low]
            values += [None] * (3 - len(values))
            records.append((task, method, task in first["at_chance"], first["n"][task], *values))
    if not records:
        return None
    data = pd.DataFrame(records, columns=["task", "method", "at_chance", "n", "forgetting", "low", "high"])
    data = data.sort_values("task", key=lambda names: names.map(shown.index), kind="stable").reset_index(drop=True)
    title = f"Forgetting by task: {style.where(cells)}"
    figure = _by_task(data, "forgetting", title=title, what="forgetting, points", least=1.0)
    caption = (
        f"Retention tasks scored by the proportion of right answers; bars are {_over(cells)}. "
        "Grey tasks are at chance for the base model, cannot show loss, and do not count in the mean."
    )
    return figure, data, "Forgetting by task", caption


def _over(cells: pd.DataFrame) -> str:
    return f"95 % confidence intervals over {'seeds and items' if cells['seed'].nunique() > 1 else 'the items'}"


def _by_task(data: pd.DataFrame, value: str, *, title: str, what: str, least: float = 0.0):
    """A figure with a line per task and method: `value` with its interval; the x axis spans at least `least`."""
    tasks, methods = list(dict.fromkeys(data["task"])), list(dict.fromkeys(data["method"]))
    if len(methods) > style.MANY:
        return _side_by_side(data, value, tasks, methods, title=title, what=what)
    step = len(methods) + 1.1
    figure, axes = style.new(style.WIDTH, 0.9 + 0.17 * step * len(tasks))
    axes.set_title(title)
    axes.set_xlabel(f"{what} {SIGN}")
    axes.axvline(0, color=style.MUTED, linewidth=0.8)
    edge = float(np.nanmax(data[[value, "high"]].astype(float).to_numpy()))
    places = {(row.task, row.method): row for row in data.itertuples()}
    for t, task in enumerate(tasks):
        for m, method in enumerate(methods):
            if (row := places.get((task, method))) is None:
                continue
            y, shade, at = -(t * step + m), style.FAINT if row.at_chance else style.colour(method), getattr(row, value)
            look = {"color": shade, "marker": style.marker(method), "markersize": 5.5, "elinewidth": 1.2}
            axes.errorbar(at, y, xerr=style.bars(at, row.low, row.high), **look)
            end = at if numbers.missing(row.high) else row.high
            box = {"facecolor": style.PAPER, "edgecolor": "none", "pad": 0.6}
            look = {"fontsize": 7.5, "color": style.MUTED if row.at_chance else shade, "bbox": box}
            axes.annotate(method, (end, y), xytext=(6, 0), textcoords="offset points", va="center", **look)
    about = data.drop_duplicates("task").set_index("task")
    note = "\nat chance:\ncannot show loss"
    names = [f"{task}\nn = {about.at[task, 'n']}" + (note if about.at[task, "at_chance"] else "") for task in tasks]
    axes.set_yticks([-(t * step + (len(methods) - 1) / 2) for t in range(len(tasks))], names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(right=edge + 0.22 * max(edge, least) + least)
    return figure


def _side_by_side(data: pd.DataFrame, value: str, tasks: list[str], methods: list[str], *, title: str, what: str):
    """The same of many methods: they share the lines of panels, one for each task with an axis of its own."""
    across = min(len(tasks), ACROSS)
    down = -(-len(tasks) // across)
    height = 0.6 + down * (0.7 + style.ROW * len(methods))
    figure, panels = style.new(style.WIDTH, height, down, across, sharey=True, squeeze=False)
    figure.suptitle(title, fontsize=9.5, fontweight="bold", x=0.01, ha="left")
    for axes, task in zip(panels.flat, tasks):
        own = data[data["task"] == task]
        axes.axvline(0, color=style.MUTED, linewidth=0.8)
        for row in own.itertuples():
            at, shade = getattr(row, value), style.FAINT if row.at_chance else style.colour(row.method)
            look = {"color": shade, "marker": style.marker(row.method), "markersize": 4, "elinewidth": 1}
            axes.errorbar(at, methods.index(row.method), xerr=style.bars(at, row.low, row.high), **look)
        chance = ", at chance" if own["at_chance"].any() else ""
        axes.set_title(f"{task}\nn = {own['n'].iloc[0]}{chance}", fontsize=8.5)
        axes.set_yticks(range(len(methods)), methods, fontsize=7.5)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.get_major_locator().set_params(nbins=3)
        axes.spines["left"].set_visible(False)
    panels[0, 0].set_ylim(len(methods) - 0.3, -0.7)
    for axes in panels.flat[len(tasks) :]:
        axes.set_axis_off()
    figure.supxlabel(f"{what} {SIGN}", fontsize=9, color=style.INK)
    return figure


FIGURES = (nats_lost_by_task, forgetting_by_task)
