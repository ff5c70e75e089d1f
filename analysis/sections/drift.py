"""How far each method moved the weights and where: figures and a section from the cells' drift.json (experiments/model/drift.py has
the formulas). All numbers are of weights as they are kept, rounded to the checkpoint's dtype.

`loaded.drift` is drift.json by cell name, of the cells that have one. Over seeds a method's numbers are means.
"""

import numpy as np
import pandas as pd

from analysis import numbers, style
from analysis.load import Loaded

ALIKE = 0.1  # overlap within this of 1 is said to ignore importance
HEADS = (
    "method",
    "movement ‖Δ‖",
    "of the weights’ norm",
    "weights changed",
    "effective rank, median",
    "overlap with importance",
    "within each matrix",
)


def table(loaded: Loaded, cells: pd.DataFrame) -> pd.DataFrame:
    """One row a method, of its cells with a drift.json: the overall measures (means over seeds; NaN where not defined), `seeds`."""
    rows = [
        {"method": cells.at[cell, "method"], **loaded.drift[cell]["overall"]}
        for cell in cells.index
        if cell in loaded.drift
    ]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    frame[frame.columns.drop("method")] = frame[frame.columns.drop("method")].astype(float)
    grouped = frame.groupby("method", sort=False)
    return grouped.mean().assign(seeds=grouped.size()).reset_index()


def by_group(loaded: Loaded, cells: pd.DataFrame) -> pd.DataFrame:
    """One row a (method, group, kind), means over seeds; `layer` is the block's number, missing outside of blocks."""
    rows = [
        {"method": cells.at[cell, "method"], **row}
        for cell in cells.index
        if cell in loaded.drift
        for row in loaded.drift[cell]["groups"]
    ]
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows)
    measures = frame.columns.drop(["method", "group", "kind"])
    frame[measures] = frame[measures].astype(float)
    frame = frame.groupby(["method", "group", "kind"], sort=False, as_index=False).mean()
    layer = frame["group"].str.extract(r"^block\.(\d+)$")[0]
    return frame.assign(layer=layer.astype("Float64").astype("Int64"))


def movement_by_layer(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """‖Δ‖ / ‖θ₀‖ of each block, a line a method; embedding, final norm and head beside the blocks."""
    found = by_group(loaded, cells)
    if found.empty:
        return None
    squared = found.assign(moved=found["distance"] ** 2, size=found["base_norm"] ** 2)
    sums = {"layer": ("layer", "first"), "moved": ("moved", "sum"), "size": ("size", "sum")}
    data = squared.groupby(["method", "group"], sort=False, as_index=False).agg(**sums)
    data["relative"] = 100 * np.sqrt(data.pop("moved") / data.pop("size"))
    shown = data[data["relative"] > 0]
    if shown.empty:
        return None
    depth = int(data["layer"].max()) + 1 if data["layer"].notna().any() else 0
    outside = [group for group in dict.fromkeys(data[data["layer"].isna()]["group"]) if group != "embedding"]
    step = max(1.5, 0.1 * depth)
    places = {"embedding": -step} | {group: depth - 1 + step * (k + 1) for k, group in enumerate(outside)}
    figure, axes = style.new(style.WIDTH, 3.6)
    axes.set_yscale("log")
    ends = []
    for method in dict.fromkeys(shown["method"]):
        own, shade = shown[shown["method"] == method], style.colour(method)
        line = own[own["layer"].notna()].sort_values("layer")
        axes.plot(line["layer"].astype(int), line["relative"], **style.line(method, size=4))
        apart = own[own["layer"].isna()]
        axes.plot(
            [places[group] for group in apart["group"]],
            apart["relative"],
            style.marker(method),
            color=shade,
            markersize=5,
        )
        last = line if len(line) else apart
        if method in style.named(dict.fromkeys(shown["method"])):
            ends.append((float(depth), float(last["relative"].iloc[-1]), method, shade))
    _plain_log(axes)
    style.label_ends(axes, ends, gap=0.06)
    ticks = _ticks(depth)
    named = [group for group in places if group in set(shown["group"])]
    axes.set_xticks(
        [*ticks, *(places[group] for group in named)],
        [*map(str, ticks), *(group.replace("_", "\n") for group in named)],
    )
    axes.set_xlabel("block")
    axes.set_ylabel("‖Δ‖ / ‖θ₀‖, %")
    axes.set_title(f"How far the weights moved: {style.where(cells)}")
    caption = (
        "Movement from the base relative to the weights' own norm, block by block; embedding, final norm and head stand apart. "
        "What a method leaves untouched is not drawn. The axis is logarithmic."
    )
    return figure, data, "Movement by layer", caption


def movement_by_kind(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """The same for each kind of matrix apart: a panel a kind, on one scale."""
    found = by_group(loaded, cells)
    if found.empty:
        return None
    data = found.loc[
        found["layer"].notna(), ["method", "kind", "layer", "relative", "effective_rank", "overlap"]
    ].copy()
    data["relative"] *= 100
    shown = data[data["relative"] > 0].dropna(subset=["relative"])
    kinds = [kind for kind in dict.fromkeys(data["kind"]) if kind in set(shown["kind"])]
    if not kinds:
        return None
    lines = -(-len(kinds) // 2)
    figure, panels = style.new(style.WIDTH, 0.7 + 1.55 * lines, lines, 2, sharex=True, sharey=True, squeeze=False)
    panels[0, 0].set_yscale("log")
    low, high = shown["relative"].min(), shown["relative"].max()
    panels[0, 0].set_ylim(low / 1.3, high * 1.3)
    for axes, kind in zip(panels.flat, kinds):
        ends = []
        for method in dict.fromkeys(shown["method"]):
            line, shade = (
                shown[(shown["method"] == method) & (shown["kind"] == kind)].sort_values("layer"),
                style.colour(method),
            )
            if len(line):
                axes.plot(line["layer"].astype(int), line["relative"], **style.line(method, size=2.8))
            if len(line) and method in style.named(dict.fromkeys(shown["method"])):
                ends.append((float(line["layer"].iloc[-1]), float(line["relative"].iloc[-1]), method, shade))
        axes.set_title(kind)
        _plain_log(axes)
        style.label_ends(axes, ends, gap=0.14)
    for axes in panels.flat[len(kinds) :]:
        axes.set_axis_off()
    panels[0, 0].set_xticks(_ticks(int(data["layer"].max()) + 1))
    figure.supxlabel("block", fontsize=9, color=style.INK)
    figure.supylabel(f"‖Δ‖ / ‖θ₀‖, %, {style.where(cells)}", fontsize=9, color=style.INK)
    caption = (
        "Movement relative to the weights' own norm for each kind of matrix, all panels on one logarithmic scale. "
        "A method that is missing in a panel left that kind untouched."
    )
    return figure, data, "Movement by kind of matrix", caption


FIGURES = (movement_by_layer, movement_by_kind)


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """What analysis/sections/drift.html.j2 shows of one comparison; None where no cell has a drift.json."""
    cells = loaded.of(model, domain)
    found = table(loaded, cells)
    if found.empty:
        return None
    ours = [loaded.drift[cell] for cell in cells.index if cell in loaded.drift]
    return {
        "heads": HEADS,
        "sentences": _sentences(found),
        "rows": [_row(row) for _, row in found.iterrows()],
        "notes": _notes(ours, found),
        "missing": [cell for cell in cells.index if cell not in loaded.drift],
    }


def _sentences(found: pd.DataFrame) -> list[str]:
    moved = found[found["distance"] > 0].sort_values("relative", ascending=False)
    if moved.empty:
        return ["No method moved any weight."]
    said = []
    if len(moved) > 1:
        first, last = moved.iloc[0], moved.iloc[-1]
        said.append(
            f"{first['method']} moved the weights farthest, by {_percent(first['relative'])} % of their norm, "
            f"{last['method']} least, by {_percent(last['relative'])} %."
        )
    known = moved.dropna(subset=["overlap"])
    for text, rows in (
        ("moved what general text depends on less than chance would", known[known["overlap"] < 1 - ALIKE]),
        ("moved it more than chance would", known[known["overlap"] > 1 + ALIKE]),
        ("moved it as if importance did not matter", known[(known["overlap"] - 1).abs() <= ALIKE]),
    ):
        if len(rows):
            each = ", ".join(
                f"{row['method']} ({numbers.times(row['overlap'])})"
                for _, row in rows.sort_values("overlap").iterrows()
            )
            said.append(f"{each} {text}.")
    return said


def _row(row: pd.Series) -> dict:
    rank = row["effective_rank"]
    share = "" if numbers.missing(row["top_share"]) else f"{numbers.percent(row['top_share'])} % in the top 10 %"
    return {
        "method": row["method"],
        "colour": style.colour(row["method"]),
        "cells": [
            (f"{row['distance']:#.3g}", ""),
            (f"{_percent(row['relative'])} %", ""),
            (f"{numbers.percent(row['changed'])} %", ""),
            (
                "–" if numbers.missing(rank) else f"{rank:.1f}" if rank < 9.95 else f"{rank:.0f}",
                f"of {row['matrices']:.0f} matrices" if row["matrices"] else "no matrix moved",
            ),
            (numbers.times(row["overlap"]), share),
            (numbers.times(row["overlap_within"]), ""),
        ],
    }


def _notes(ours: list[dict], found: pd.DataFrame) -> list[str]:
    """How to read the table, and what it rests on."""
    notes = [
        "Δ is the tuned weight minus the base’s, as both are kept: rounding to the checkpoint’s dtype loses small movements and adds small "
        "ones in all directions, so that a low-rank adapter’s effective rank here is above its own rank.",
        "Effective rank is exp of the entropy of Δ’s singular values over their sum (Roy and Vetterli 2007), over matrices in blocks that moved.",
    ]
    references = {(r["method"], r["part"], f"{r['entries']:,}") for r in (d["reference"] for d in ours) if r}
    for method, part, entries in sorted(references):
        notes.append(
            f"Importance is what {method} prepared ({part}, {entries} weights) from general text before any training; "
            "a method that is held by it has a low overlap by design."
        )
    if references:
        notes.append(
            "Overlap is the movement’s mean importance, (ΣFΔ² / ΣΔ²) over the mean F: ×1 as if movement ignored importance, less where it "
            "avoided important weights; below it the share of squared movement in the 10 % most important weights. "
            "Within each matrix: given how far each matrix moved, so that which ones a method trains does not count."
        )
    else:
        notes.append(
            "No importance of the whole model was prepared in this study, so movement is not compared with one."
        )
    if skipped := sum(len(d["rank_skipped"]) for d in ours):
        limits = {d["rank_limit"] for d in ours}
        notes.append(f"No effective rank of {skipped} matrices whose smaller side exceeds {max(limits):,}.")
    if found["seeds"].max() > 1:
        notes.append("Numbers are means over the seeds.")
    return notes


def _percent(share: float) -> str:
    """Movement is far below a percent: three digits, whatever the size."""
    return "–" if numbers.missing(share) else f"{100 * share:#.3g}"


def _ticks(depth: int) -> list[int]:
    """Block numbers to write on an axis: at most seven."""
    return list(range(0, depth, max(1, -(-depth // 7))))


def _plain_log(axes) -> None:
    low, high = axes.get_ylim()  # over many decades matplotlib drops all ticks rather than some
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 100 * low else (1,))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.minorticks_off()
