"""A benchmark's record as text and as a figure."""

import textwrap
from pathlib import Path


def as_text(record: dict) -> str:
    from analysis.sections import bench

    lines = []
    for race in record["races"]:
        wide = max(len(row["runner"]) for row in race["rows"])
        lines += [
            f"  {race['title']} ({race['rounds']} rounds; times {race['against']})",
            f"    {'':{wide}}  {'ms':>9}  {'min':>7}  {'median':>7}",
        ]
        for row in race["rows"]:
            goals = "".join(
                f"  {goal['text']}: {'met' if goal['met'] else 'MISSED'}"
                for goal in race["goals"]
                if goal["runner"] == row["runner"]
            )
            lines.append(
                f"    {row['runner']:{wide}}  {1e3 * row['seconds_min']:9.2f}  {row['ratio_min']:7.2f}  "
                f"{row['ratio_median']:7.2f}{goals}"
            )
        lines += [f"    {name}: {value}" for name, value in bench.facts(race["facts"])]
        lines += textwrap.wrap(race["facts"].get("sentence", ""), 130, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def draw(record: dict, *, stem: Path) -> None:
    """stem.png, .svg and .csv: a bar for every runner of every race, on a logarithmic axis of times the reference."""
    import pandas as pd
    from matplotlib.ticker import LogLocator, NullLocator

    from analysis import style

    rows = [
        {"race": race["title"], "against": race["against"], **row} for race in record["races"] for row in race["rows"]
    ]
    data = pd.DataFrame(rows)
    heights = [0.9 + 0.28 * len(race["rows"]) for race in record["races"]]
    with style.house():
        figure, all_axes = style.new(6.8, 0.4 + sum(heights), rows=len(heights), squeeze=False, height_ratios=heights)
        for axes, race in zip(all_axes[:, 0], record["races"]):
            places = list(range(len(race["rows"])))[::-1]
            limits = {goal["runner"]: 1 / goal["limit"] if goal["faster"] else goal["limit"] for goal in race["goals"]}
            for place, row in zip(places, race["rows"]):
                axes.plot([1, row["ratio_median"]], [place, place], color="#0f7ac0", linewidth=5, solid_capstyle="butt")
                axes.plot(row["ratio_min"], place, "|", color=style.INK, markersize=10, markeredgewidth=1.6)
                axes.annotate(
                    f"{row['ratio_median']:.2f}×",
                    (1, place),
                    xycoords=("axes fraction", "data"),
                    xytext=(34, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=8,
                )
                if row["runner"] in limits:
                    axes.plot(
                        limits[row["runner"]], place, marker="x", color=style.RED, markersize=6, markeredgewidth=1.6
                    )
            axes.set_yticks(places, [row["runner"] for row in race["rows"]])
            axes.set_xscale("log")
            ratios = (
                [1.0]
                + [row[key] for row in race["rows"] for key in ("ratio_min", "ratio_median")]
                + list(limits.values())
            )
            span = max(ratios) / min(ratios)
            axes.set_xlim(min(ratios) / span**0.05 / 1.05, max(ratios) * span**0.05 * 1.05)
            axes.xaxis.set_major_locator(
                LogLocator(subs=(1,) if span > 100 else (1, 2, 5) if span > 5 else (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8))
            )
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
            axes.axvline(1, color=style.INK, linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.set_ylim(-0.6, len(places) - 0.4)
            axes.set_xlabel(f"times {race['against']}", fontsize=8)
            # it begins above the runners' names, which may leave the axes little width
            axes.annotate(
                textwrap.fill(race["title"], 84),
                (0, 1),
                xycoords=(figure.transFigure, "axes fraction"),
                xytext=(4, 5),
                textcoords="offset points",
                va="bottom",
                fontsize=9.5,
                fontweight="bold",
            )
        crosses = "; cross: goal" if any(race["goals"] for race in record["races"]) else ""
        figure.supxlabel(
            f"bar and number: median over rounds; mark: fastest against fastest{crosses}", fontsize=8, color=style.MUTED
        )
        style.save(figure, data, stem=stem, not_a_result=False)
