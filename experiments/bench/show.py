"""A benchmark's record as text and as a figure."""

from pathlib import Path


def as_text(record: dict) -> str:
    lines = []
    for race in record["races"]:
        wide = max(len(row["runner"]) for row in race["rows"])
        lines += [f"  {race['title']} ({race['rounds']} rounds; times {race['against']})",
                  f"    {'':{wide}}  {'ms':>9}  {'min':>7}  {'median':>7}"]  # fmt: skip
        for row in race["rows"]:
            goals = "".join(f"  {goal['text']}: {'met' if goal['met'] else 'MISSED'}" for goal in race["goals"] if goal["runner"] == row["runner"])
            lines.append(f"    {row['runner']:{wide}}  {1e3 * row['seconds_min']:9.2f}  {row['ratio_min']:7.2f}  {row['ratio_median']:7.2f}{goals}")
        lines += [f"    {name}: {value}" for name, value in race["facts"].items()]
    return "\n".join(lines)


def draw(record: dict, *, stem: Path) -> None:
    """stem.png, .svg and .csv: a bar for every runner of every race, on a logarithmic axis of times the reference."""
    import pandas as pd

    from analysis import style

    rows = [{"race": race["title"], "against": race["against"], **row} for race in record["races"] for row in race["rows"]]
    data = pd.DataFrame(rows)
    with style.house():
        figure, all_axes = style.new(6.8, 0.5 + sum(0.55 + 0.28 * len(race["rows"]) for race in record["races"]), rows=len(record["races"]), squeeze=False,
                                     height_ratios=[0.6 + 0.28 * len(race["rows"]) for race in record["races"]])  # fmt: skip
        for axes, race in zip(all_axes[:, 0], record["races"]):
            places = list(range(len(race["rows"])))[::-1]
            limits = {goal["runner"]: 1 / goal["limit"] if goal["faster"] else goal["limit"] for goal in race["goals"]}
            for place, row in zip(places, race["rows"]):
                reference = row["runner"] == race["against"]
                axes.plot([1, row["ratio_median"]], [place, place], color=style.MUTED if reference else "#0f7ac0", linewidth=5, solid_capstyle="butt")
                axes.plot(row["ratio_min"], place, "|", color=style.INK, markersize=10, markeredgewidth=1.6)
                axes.annotate(f"{row['ratio_median']:.2f}×", (max(1, row["ratio_median"]), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=8)
                if row["runner"] in limits:
                    axes.plot(limits[row["runner"]], place, marker="x", color=style.RED, markersize=6, markeredgewidth=1.6)
            axes.set_yticks(places, [row["runner"] for row in race["rows"]])
            axes.set_xscale("log")
            ratios = [row[key] for row in race["rows"] for key in ("ratio_min", "ratio_median")] + list(limits.values())
            axes.set_xlim(min(ratios) / 1.25, max(ratios) * 1.6)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
            axes.axvline(1, color=style.INK, linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.set_ylim(-0.6, len(places) - 0.4)
            axes.set_title(f"{race['title']}: times {race['against']}")
        style.save(figure, data, stem=stem, not_a_result=False)
