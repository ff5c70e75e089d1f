"""How far each method moved the weights, and where: figures and a section from the cells' drift.json.

experiments/model/drift.py has the formulas. All numbers are of the weights as they are kept, rounded to the
checkpoint's dtype. `loaded.drift` is drift.json by cell name. Over seeds the numbers are means.
"""

import matplotlib
import numpy as np
import pandas as pd

from analysis import numbers, style, words
from analysis.load import Loaded

BY_LAYER = (
    "Movement from the base relative to the weights' own norm, block by block; embedding, final norm and head are "
    "shown beside the blocks."
)
SHADED = "Shades are on a logarithmic scale; blank is what a method does not change."
ALIKE = 0.1  # an overlap within this of 1 counts as ignoring importance
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
    """One row per method, of its cells with a drift.json: the overall measures (NaN if not defined) and `seeds`."""
    frame = _frame(cells, {cell: [loaded.drift[cell]["overall"]] for cell in cells.index if cell in loaded.drift})
    if frame.empty:
        return frame
    grouped = frame.groupby("method", sort=False)
    return grouped.mean().assign(seeds=grouped.size()).reset_index()


def by_group(loaded: Loaded, cells: pd.DataFrame) -> pd.DataFrame:
    """One row per (method, group, kind), means over seeds; `layer` is the block's number, missing outside of blocks."""
    frame = _frame(cells, {cell: loaded.drift[cell]["groups"] for cell in cells.index if cell in loaded.drift})
    if frame.empty:
        return frame
    frame = frame.groupby(["method", "group", "kind"], sort=False, as_index=False).mean()
    layer = frame["group"].str.extract(r"^block\.(\d+)$")[0]
    return frame.assign(layer=layer.astype("Float64").astype("Int64"))


def _frame(cells: pd.DataFrame, records: dict[str, list[dict]]) -> pd.DataFrame:
    """The records of all cells with their method, their measures as floats."""
    methods = cells["method"].to_dict()
    rows = [{"method": methods[cell], **row} for cell, own in records.items() for row in own]
    frame = pd.DataFrame(rows)
    measures = frame.columns.difference(["method", "group", "kind"], sort=False)
    frame[measures] = frame[measures].astype(float)
    return frame


def movement_by_layer(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """‖Δ‖ / ‖θ₀‖ of each block, one line per method; embedding, final norm and head beside the blocks."""
    groups = by_group(loaded, cells)
    if groups.empty:
        return None
    squared = groups.assign(moved=groups["distance"] ** 2, size=groups["base_norm"] ** 2)
    sums = {"layer": ("layer", "first"), "moved": ("moved", "sum"), "size": ("size", "sum")}
    data = squared.groupby(["method", "group"], sort=False, as_index=False).agg(**sums)
    data["relative"] = 100 * np.sqrt(data.pop("moved") / data.pop("size"))
    shown = data[data["relative"] > 0]
    if shown.empty:
        return None
    depth = int(data["layer"].max()) + 1 if data["layer"].notna().any() else 0
    outside = [group for group in dict.fromkeys(data[data["layer"].isna()]["group"]) if group != "embedding"]
    title = f"How far the weights moved: {style.where(cells)}"
    if shown["method"].nunique() > style.MANY:
        order = ["embedding", *(f"block.{layer}" for layer in range(depth)), *outside]
        figure, axes = _shaded(shown, "group", order, title)
        ticks, apart = _ticks(depth), [k for k, group in enumerate(order) if not group.startswith("block.")]
        labels = [*map(str, ticks), *(order[k].replace("_", "\n") for k in apart)]
        axes.set_xticks([*(order.index(f"block.{layer}") + 0.5 for layer in ticks), *(k + 0.5 for k in apart)], labels)
        axes.set_xlabel("block")
        return figure, data, "Movement by layer", f"{BY_LAYER} {SHADED}"
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
        x = [places[group] for group in apart["group"]]
        axes.plot(x, apart["relative"], style.marker(method), color=shade, markersize=5)
        last = line if len(line) else apart
        if method in style.named(dict.fromkeys(shown["method"])):
            ends.append((float(depth), float(last["relative"].iloc[-1]), method, shade))
    _plain_log(axes)
    style.label_ends(axes, ends, gap=0.06)
    ticks = _ticks(depth)
    named = [group for group in places if group in set(shown["group"])]
    labels = [*map(str, ticks), *(group.replace("_", "\n") for group in named)]
    axes.set_xticks([*ticks, *(places[group] for group in named)], labels)
    axes.set_xlabel("block")
    axes.set_ylabel("‖Δ‖ / ‖θ₀‖, %")
    axes.set_title(title)
    caption = f"{BY_LAYER} What a method does not change is not drawn. The axis is logarithmic."
    return figure, data, "Movement by layer", caption


def movement_by_kind(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """The same for each kind of matrix: one panel per kind, on one scale."""
    groups = by_group(loaded, cells)
    if groups.empty:
        return None
    columns = ["method", "kind", "layer", "relative", "effective_rank", "overlap"]
    data = groups.loc[groups["layer"].notna(), columns].copy()
    data["relative"] *= 100
    shown = data[data["relative"] > 0].dropna(subset=["relative"])
    kinds = [kind for kind in dict.fromkeys(data["kind"]) if kind in set(shown["kind"])]
    if not kinds:
        return None
    if shown["method"].nunique() > style.MANY:
        whole = groups[groups["layer"].notna()]
        whole = whole.assign(moved=whole["distance"] ** 2, size=whole["base_norm"] ** 2)
        whole = whole.groupby(["method", "kind"], sort=False, as_index=False)[["moved", "size"]].sum()
        whole["relative"] = 100 * np.sqrt(whole["moved"] / whole["size"])
        title = f"Movement by kind of matrix, all blocks, %: {style.where(cells)}"
        figure, axes = _shaded(whole[whole["relative"] > 0], "kind", kinds, title, show=lambda value: f"{value:.2g}")
        axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=7.5)
        caption = "Movement relative to the weights' own norm for each kind of matrix, over all blocks."
        return figure, data, "Movement by kind of matrix", f"{caption} {SHADED} The CSV has each block."
    lines = -(-len(kinds) // 2)
    figure, panels = style.new(style.WIDTH, 0.7 + 1.55 * lines, lines, 2, sharex=True, sharey=True, squeeze=False)
    panels[0, 0].set_yscale("log")
    low, high = shown["relative"].min(), shown["relative"].max()
    panels[0, 0].set_ylim(low / 1.3, high * 1.3)
    for axes, kind in zip(panels.flat, kinds):
        ends = []
        for method in dict.fromkeys(shown["method"]):
            line = shown[(shown["method"] == method) & (shown["kind"] == kind)].sort_values("layer")
            if line.empty:
                continue
            axes.plot(line["layer"].astype(int), line["relative"], **style.line(method, size=2.8))
            if method in style.named(dict.fromkeys(shown["method"])):
                end = (float(line["layer"].iloc[-1]), float(line["relative"].iloc[-1]))
                ends.append((*end, method, style.colour(method)))
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
        "A method that is missing from a panel did not change that kind."
    )
    return figure, data, "Movement by kind of matrix", caption


def _shaded(shown: pd.DataFrame, key: str, order: list[str], title: str, *, show=None):
    """The movement `relative` of many methods, one a line, as shades on a logarithmic scale; `order` of the columns."""
    methods = list(dict.fromkeys(shown["method"]))
    table = shown.pivot(index="method", columns=key, values="relative").reindex(index=methods, columns=order)
    norm = matplotlib.colors.LogNorm(shown["relative"].min(), shown["relative"].max())
    figure, axes = style.shaded(table, norm=norm, bar="‖Δ‖ / ‖θ₀‖, %", show=show, rows=len(methods))
    axes.set_title(title)
    return figure, axes


FIGURES = (movement_by_layer, movement_by_kind)


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """What drift.html.j2 shows of one comparison; None if no cell has a drift.json."""
    cells = loaded.of(model, domain)
    methods = table(loaded, cells)
    if methods.empty:
        return None
    records = [loaded.drift[cell] for cell in cells.index if cell in loaded.drift]
    return {
        "heads": HEADS,
        "sentences": _sentences(methods),
        "rows": [_row(row) for _, row in methods.iterrows()],
        "notes": _notes(records, methods),
        "missing": [cell for cell in cells.index if cell not in loaded.drift],
    }


def _sentences(methods: pd.DataFrame) -> list[str]:
    moved = methods[methods["distance"] > 0].sort_values("relative", ascending=False)
    if moved.empty:
        return ["No method moved any weight."]
    sentences = []
    if len(moved) > 1:
        first, last = moved.iloc[0], moved.iloc[-1]
        sentences.append(
            f"{first['method']} moved the weights farthest, by {numbers.fine_percent(first['relative'])} % of their "
            f"norm, {last['method']} least, by {numbers.fine_percent(last['relative'])} %."
        )
    known = moved.dropna(subset=["overlap"]).sort_values("overlap")
    for text, rows in (
        ("moved the weights that general text depends on less than chance would", known[known["overlap"] < 1 - ALIKE]),
        ("moved them more than chance would", known[known["overlap"] > 1 + ALIKE]),
        ("moved them as if importance did not matter", known[(known["overlap"] - 1).abs() <= ALIKE]),
    ):
        if len(rows):
            each = words.few(f"{row.method} ({numbers.times(row.overlap)})" for row in rows.itertuples())
            sentences.append(f"{each} {text}.")
    return sentences


def _row(row: pd.Series) -> dict:
    rank, share = row["effective_rank"], ""
    if not numbers.missing(row["top_share"]):
        share = f"{numbers.percent(row['top_share'])} % in the top 10 %"
    matrices = f"of {row['matrices']:.0f} matrices" if row["matrices"] else "no matrix moved"
    return {
        "method": row["method"],
        "colour": style.colour(row["method"]),
        "cells": [
            (f"{row['distance']:#.3g}".rstrip("."), ""),
            (f"{numbers.fine_percent(row['relative'])} %", ""),
            (f"{numbers.percent(row['changed'])} %", ""),
            ("–" if numbers.missing(rank) else f"{rank:.1f}" if rank < 9.95 else f"{rank:.0f}", matrices),
            (numbers.times(row["overlap"]), share),
            (numbers.times(row["overlap_within"]), ""),
        ],
    }


def _notes(records: list[dict], methods: pd.DataFrame) -> list[str]:
    """How to read the table, and what it is based on."""
    notes = [
        "Δ is the tuned weight minus the base’s, both as they are kept: rounding to the checkpoint’s dtype loses small "
        "movements and adds small ones in all directions, so that a low-rank adapter’s effective rank here exceeds its "
        "own rank.",
        "Effective rank is exp of the entropy of Δ’s singular values over their sum (Roy and Vetterli 2007), over the "
        "matrices in blocks that moved.",
    ]
    references = {(r["method"], r["part"], f"{r['entries']:,}") for r in (d["reference"] for d in records) if r}
    for method, part, entries in sorted(references):
        notes.append(
            f"Importance is what {method} prepared ({part}, {entries} weights) from general text before any training; "
            "a method that it regularises has a low overlap by design."
        )
    if len({d["reference"]["settings_sha256"] for d in records if "settings_sha256" in (d["reference"] or {})}) > 1:
        notes.append(
            "Importance was prepared with different settings for some of these cells, so that their overlaps are not "
            "comparable: remove their drift.json and run them again."
        )
    if references:
        notes.append(
            "Overlap is the movement’s mean importance, (ΣFΔ² / ΣΔ²) over the mean F: ×1 as if movement ignored "
            "importance, less if it avoided important weights; below it is the share of squared movement in the 10 % "
            "most important weights. Within each matrix: given how far each matrix moved, so that it does not count "
            "which matrices a method trains."
        )
    else:
        notes.append(
            "No importance of the whole model was prepared in this study, so movement is not compared with one."
        )
    if skipped := sum(len(d["rank_skipped"]) for d in records):
        limit = max(d["rank_limit"] for d in records)
        notes.append(f"{skipped} matrices whose smaller side exceeds {limit:,} have no effective rank.")
    if any(d.get("rank_estimated") for d in records):
        limit = max(d["rank_limit"] for d in records)
        notes.append(
            f"Effective ranks of matrices whose smaller side exceeds {limit:,} are estimated, to about 2 %; those of "
            "adapters are exact, of the update before it is rounded."
        )
    if methods["seeds"].max() > 1:
        notes.append("Numbers are means over the seeds.")
    return notes


def _ticks(depth: int) -> list[int]:
    """Block numbers to write on an axis: at most seven."""
    return list(range(0, depth, max(1, -(-depth // 7))))


def _plain_log(axes) -> None:
    low, high = axes.get_ylim()  # over many decades matplotlib would drop all ticks
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 100 * low else (1,))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.minorticks_off()
