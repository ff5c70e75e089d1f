"""The figures of one comparison (model, domain): each as PNG, SVG and the CSV behind it."""

import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import numbers, parallel, style
from analysis.families import family
from analysis.load import Loaded
from analysis.sections import by_task, drift, flips, overview
from analysis.sections.costs import costs

OVERVIEWS = ("overview", "overview_phone")  # of all comparisons, the second for a narrow page


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure on disk: `stem` without suffix, its title and caption for the report."""

    name: str
    title: str
    caption: str
    stem: Path
    model: str
    domain: str


def write_figures(
    loaded: Loaded, table: pd.DataFrame, beside: pd.DataFrame = pd.DataFrame(), *, folder: Path
) -> list[Figure]:
    """Write every figure that the data allow as folder/<figure>-<model>-<domain>.{png,svg,csv}.

    The first are OVERVIEWS. `beside` are rows of other studies (`overview.also`).
    """
    data = overview.points(loaded, table, beside)

    def draw(*part: str) -> list[Figure]:
        of_all = len(part) == 1
        return _overview(loaded, data, folder, *part) if of_all else _of_comparison(loaded, table, folder, *part)

    parts = [(name,) for name in OVERVIEWS if len(data)] + loaded.comparisons
    return list(chain.from_iterable(parallel.each(draw, parts)))


def _overview(loaded: Loaded, data: pd.DataFrame, folder: Path, name: str) -> list[Figure]:
    """Write the figure of all comparisons."""
    with style.house():
        figure, data, title, caption = overview.figure(loaded, data, phone=name == "overview_phone")
        style.save(figure, data, stem=folder / name, not_a_result=loaded.not_a_result)
    return [Figure(name=name, title=title, caption=caption, stem=folder / name, model="", domain="")]


def _of_comparison(loaded: Loaded, table: pd.DataFrame, folder: Path, model: str, domain: str) -> list[Figure]:
    """Write the figures of one comparison."""
    rows = table[(table["model"] == model) & (table["domain"] == domain) & (table["method"] != "base")]
    cells, made = loaded.of(model, domain), []
    for draw in (*by_task.FIGURES, forgetting_over_training, *flips.FIGURES, *drift.FIGURES, layer_coefficients, cost):
        stem = folder / f"{draw.__name__}-{model}-{domain}"
        with style.house():
            drawn = draw(loaded, rows, cells)
            if drawn is None:
                continue
            figure, data, title, caption = drawn
            style.save(figure, data, stem=stem, not_a_result=loaded.not_a_result)
        made.append(Figure(name=draw.__name__, title=title, caption=caption, stem=stem, model=model, domain=domain))
    return made


def forgetting_over_training(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Probe curves over training tokens, in the order of the measures: domain, general text, retention tasks. None
    where no run was probed between its start and its end."""
    if loaded.curves.empty:
        return None
    domain = cells.iloc[0]["domain"]
    curves = loaded.curves_of(cells)
    names = [c for c in curves.columns if c.startswith("probe_") and c.endswith("_nll") and curves[c].notna().any()]
    retention = [c for c in names if c not in (f"probe_{domain}_nll", "probe_general_nll")]
    data = curves[["cell", "step", "tokens"]].copy()
    data["domain_accuracy"] = curves.get(f"probe_{domain}")
    if data["domain_accuracy"].isna().all():  # a domain of text has no right answers
        data["domain_nats"] = curves.get(f"probe_{domain}_nll")
    data["general_nats"] = curves.get("probe_general_nll")
    data["retention_nats"] = curves[retention].mean(axis=1) if retention else np.nan
    shown = [column for column in data if column not in ("cell", "step", "tokens")]
    data = data.dropna(subset=shown, how="all")
    shown = [key for key in shown if data[key].notna().any()]
    if data.empty or data.groupby("cell").size().max() <= 2:
        return None
    data.insert(1, "method", data["cell"].map(cells["method"]))
    titles = {
        "domain_accuracy": f"Learning: right answers on {domain} probes, % (up is better)",
        "domain_nats": f"Learning: nats per token of {domain} probes (down is better)",
        "general_nats": "Forgetting: nats per token of general probe text (down is better)",
        "retention_nats": "Forgetting: nats per token of right answers, retention probes (down is better)",
    }
    methods = list(dict.fromkeys(data["method"]))
    height = 0.5 + style.height(2.05, methods) * len(shown)
    figure, panels = style.new(style.WIDTH, height, len(shown), sharex=True, squeeze=False)
    for axes, key in zip(panels[:, 0], shown):
        axes.set_title(titles[key])
        ends = []
        for method in methods:
            own = data[data["method"] == method].dropna(subset=[key])
            if own.empty:
                continue
            percent = own.assign(domain_accuracy=100 * own["domain_accuracy"])
            end = style.course(axes, percent, method=method, x="tokens", y=key, size=3.5)
            if method in style.named(methods):
                ends.append((*end, method, style.colour(method)))
        style.label_ends(axes, ends, gap=0.095)
    panels[-1, 0].set_xlabel(f"training tokens ({style.where(cells)})")
    panels[-1, 0].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    panels[-1, 0].margins(x=0.02)
    caption = (
        "Measured during training on probe rows, which are disjoint from the scored rows. A method whose curves start "
        "elsewhere begins from weights of its own preparation."
    )
    caption += " Faint lines are seeds, the others their mean." if cells["seed"].nunique() > 1 else ""
    caption += " Dashed lines are the blocks of a sweep." if any(method != family(method) for method in methods) else ""
    return figure, data, "Learning and forgetting over training", caption


# each row of panels is one kind of cost, on one scale
SECONDS = {"seconds_prepare": "preparation", "seconds_train": "training", "seconds_evaluate": "scoring"}
MEMORY = {
    "peak_memory_prepare_bytes": "peak, preparation",
    "peak_memory_train_bytes": "peak, training",
    "bytes_optimizer_state": "optimizer state",
}
KEPT = {
    "bytes_weights_delta": "weights or adapter",
    "bytes_importance": "importance",
    "bytes_start": "start",
    "bytes_anchor": "anchor",
}
COST_PANELS = (
    ("seconds", numbers.seconds, SECONDS),
    ("memory", numbers.size, MEMORY),
    ("bytes to keep", numbers.size, KEPT),
)


def cost(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Seconds, memory and bytes by kind: one row of panels each, on one scale, never added up across kinds."""
    data = costs(loaded, (cells.iloc[0]["model"], cells.iloc[0]["domain"])).drop(columns=["model", "domain"])
    keys = [key for _, _, panels in COST_PANELS for key in panels if key != "seconds_evaluate"]
    if data[keys].isna().all(axis=None):
        return None
    methods = list(data["method"])
    many = len(methods) > style.MANY
    height = 1.2 + len(COST_PANELS) * (style.ROW if many else 0.2) * len(methods)
    figure, grid = style.new(style.WIDTH, height, len(COST_PANELS), 4, sharey=True)
    for line, (kind, show, panels) in zip(grid, COST_PANELS):
        values = data[list(panels)].astype(float)
        widest = values.max(axis=None)
        for axes, (key, title) in zip(line, panels.items()):
            axes.barh(range(len(methods)), values[key].fillna(0), color=[style.colour(m) for m in methods], height=0.62)
            for y, value in enumerate(values[key]):
                text = "–" if value < 0.0005 else show(value)
                place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                axes.annotate(text, (0 if value != value else value, y), **place, **style.INSIDE)
            axes.set_xlim(0, 1.95 * widest if widest > 0 else 1)
            axes.set_title(title, fontsize=8.5)
            axes.set_xticks([])
            axes.set_yticks(range(len(methods)), methods, fontsize=7.5 if many else 8.5)
            axes.tick_params(axis="y", length=0)
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)
        for axes in line[len(panels) :]:
            axes.set_axis_off()
        line[0].set_ylabel(kind, fontweight="bold")
    grid[0, 0].set_ylim(len(methods) - 0.4, -0.6)
    figure.supxlabel(style.where(cells), fontsize=8.5, color=style.MUTED)
    caption = (
        "Measured on the machine named under provenance. The panels of a row share one scale. – means nothing of the "
        "kind, 'unknown' a checkpoint made elsewhere."
    )
    return figure, data, "Cost by kind", caption


def layer_coefficients(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """The layer-wise coefficients of a part that reports them; their mean, weighted by importance, is 1."""
    records = []
    for cell, report in cells["parts_report"].items():
        for part in (report or {}).values():
            for group, value in ((part or {}).get("coefficients") or {}).items() if isinstance(part, dict) else ():
                number = re.search(r"\.(\d+)(?:\.|$)", group)
                kind = (group[number.end() :] if number else group).rsplit(".", 1)[-1] or "block"
                layer = int(number.group(1)) if number else None
                records.append((cell, cells.at[cell, "method"], group, layer, kind, float(value)))
    if not records:
        return None
    data = pd.DataFrame(records, columns=["cell", "method", "group", "layer", "kind", "coefficient"])
    data["layer"] = data["layer"].astype("Int64")
    shown = list(dict.fromkeys(data["method"]))
    figure, panels = style.new(style.WIDTH, 0.6 + 2.5 * len(shown), len(shown), sharex=True, squeeze=False)
    shades = (style.INK, *style.OTHERS)  # kinds of matrix, in none of the methods' colours
    for axes, method in zip(panels[:, 0], shown):
        own = data[data["method"] == method]
        axes.axhline(1, color=style.MUTED, linewidth=0.8)
        ends, layered = [], own[own["layer"].notna()]
        for k, kind in enumerate(dict.fromkeys(layered["kind"])):
            line = layered[layered["kind"] == kind].groupby("layer")["coefficient"].mean().sort_index()
            look = {"color": shades[k % len(shades)], "marker": "osD^v"[k % 5], "markersize": 4, "linewidth": 1.2}
            axes.plot(line.index.astype(int), line, **look)
            ends.append((float(line.index[-1]), float(line.iloc[-1]), kind, shades[k % len(shades)]))
        last = int(layered["layer"].max()) if len(layered) else -1
        others = own[own["layer"].isna()].groupby("kind", sort=False)["coefficient"].mean()
        for k, (kind, value) in enumerate(others.items()):
            axes.plot(last + 1.5 + k, value, "o", color=style.INK, markersize=4.5)
            ends.append((last + 1.5 + k, float(value), kind, style.INK))
        if own["coefficient"].max() > 30 * max(own["coefficient"].min(), 1e-9):
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axes.minorticks_off()
        style.label_ends(axes, ends, gap=0.085)
        axes.set_ylabel("coefficient")
        axes.set_title(f"Layer coefficients: {method}, {style.where(cells)}")
    panels[-1, 0].set_xlabel("layer")
    panels[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    caption = (
        "How the penalty is distributed over layers: a layer at 2 is held twice as strongly as one at 1. The mean of 1 "
        "is weighted by importance, so most layers may lie below it."
    )
    return figure, data, "Layer coefficients", caption
