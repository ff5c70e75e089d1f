"""Forgetting at the same gain (analysis/statistics/matched.py) as a figure and a section of the report."""

import numpy as np
import pandas as pd

from analysis import numbers, style, words
from analysis.families import family
from analysis.load import Loaded
from analysis.statistics.matched import BARELY, Trajectories, gaps, levels, matched, trajectories
from analysis.statistics.resample import resampled

TITLES = {
    "forgetting": "Forgetting: right answers lost on retention probes, points (down is better)",
    "forgetting_nats": "Forgetting: nats per token of right answers, retention probes (down is better)",
}
HEADS = {"forgetting": "forgetting, points", "forgetting_nats": "forgetting, nats per token"}


def matched_gain(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Trajectories in the plane of gain and forgetting, the matched gain as a vertical line; one panel per measure."""
    runs = trajectories(loaded, model=cells.iloc[0]["model"], domain=cells.iloc[0]["domain"])
    if runs is None:
        return None
    scale, marks = 100 if runs.gain == "accuracy" else 1, levels(runs)
    data = runs.points[["cell", "method", "seed", "step", "tokens", "gain", *runs.measures]].copy()
    data["gain"] *= scale
    data["matched_gain"] = scale * marks["matched"] if marks else np.nan
    if "forgetting" in runs.measures:
        data["forgetting"] *= 100
    height, count = 0.6 + style.height(2.7, runs.methods) * len(runs.measures), len(runs.measures)
    figure, panels = style.new(style.WIDTH, height, count, sharex=True, squeeze=False)
    for axes, measure in zip(panels[:, 0], runs.measures):
        axes.set_title(TITLES[measure])
        axes.axhline(0, color=style.MUTED, linewidth=0.8)
        ends = []
        for method, own in data.groupby("method", sort=False):
            end = style.course(axes, own, method=method, x="gain", y=measure, size=4)
            if method in style.named(runs.methods):
                ends.append((*end, method, style.colour(method)))
        axes.margins(x=0.03, y=0.08)
        style.label_ends(axes, ends, gap=0.075)
        if marks:
            axes.axvline(scale * marks["matched"], color=style.INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    if marks:
        place = {"xytext": (-5, -3), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        look = {"ha": "right", "va": "top", "fontsize": 8, "color": style.INK}
        text = f"matched gain {_gain(runs, marks['matched'])}"
        panels[0, 0].annotate(text, (scale * marks["matched"], 1), **place, **look)
    unit = "points" if runs.gain == "accuracy" else "nats per token"
    panels[-1, 0].set_xlabel(f"gain on the domain's probes, {unit} (right is better); {style.where(cells)}")
    caption = (
        "Each line is a method from its first probe to its last, against the bare base: lower at one gain is better."
    )
    if cells["seed"].nunique() > 1:
        caption += " Faint lines are its seeds, the other line is their mean at each probe."
    if marks:
        caption += " The vertical dashed line is the gain at which methods are compared."
    else:
        caption += " No method gained on the probes, so there is no gain at which to compare."
    if any(method != family(method) for method in runs.methods):
        caption += " Dashed lines are the blocks of a sweep."
    count = _probe_rows(runs) or "their number is not recorded"
    caption += f" Probe rows are few ({count}) and disjoint from the scored rows."
    return figure, data, "Forgetting at the same gain", caption


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """What matched.html.j2 shows of one comparison; None if the runs were not probed."""
    runs = trajectories(loaded, model=model, domain=domain)
    if runs is None:
        return None
    marks, table, sweeps = levels(runs), matched(runs), _sweeps(loaded, model, domain)
    if not marks:
        none = "No method gained on the domain's probes, so there is no gain at which forgetting could be compared."
        return {"sentences": [none], "heads": [], "rows": [], "notes": [], "sweeps": sweeps}
    at = table[table["level"] == "matched"]
    heads = ["method", *(HEADS[measure] for measure in runs.measures), f"against {at['reference'].iloc[0]}"]
    heads += [f"at {level} ({_gain(runs, gain)})" for level, gain in marks.items() if level != "matched"]
    first = at[at["measure"] == runs.measures[0]]
    return {
        "sentences": [_rule(runs, marks, first), *_verdict(runs, first)],
        "heads": heads,
        "rows": [_line(runs, table[table["method"] == method], marks) for method in runs.methods],
        "notes": _notes(runs, table),
        "sweeps": sweeps,
    }


def _sweeps(loaded: Loaded, model: str, domain: str) -> list[dict]:
    """The gaps between families on the scored rows as text; empty if nothing was swept."""
    draws, rows = resampled(loaded, model=model, domain=domain), []
    for row in gaps(draws).itertuples() if draws else ():
        blocks = [len(draws.families[name]) for name in (row.a, row.b)]
        names = [f"{name} ({n})" if len(set(blocks)) > 1 else name for name, n in zip((row.a, row.b), blocks)]
        text = {"pair": " − ".join(names), "gains": "no gain in common", "value": "–", "interval": ""}
        if not numbers.missing(row.difference):
            text["gains"] = " to ".join(dict.fromkeys(map(numbers.points, (row.gain_low, row.gain_high))))
            text["value"] = numbers.points(row.difference)
        if not numbers.missing(row.low):
            text["interval"] = f"[{numbers.points(row.low)}, {numbers.points(row.high)}]"
        rows.append(text)
    return rows


def _rule(runs: Trajectories, marks: dict[str, float], at: pd.DataFrame) -> str:
    barely = list(at[at["reached"] < at["seeds"]]["method"])
    but = f" except {words.few(barely)}" if barely else ""
    text = (
        f"Methods are compared at a gain of {_gain(runs, marks['matched'])} on the domain's probes, the largest that "
        f"every run of every method{but} reaches."
    )
    if early := list(at[at["early"]]["method"]):
        text += (
            f" {len(early)} of {len(at)} methods ({words.few(early)}) passed it before their first probe after "
            "training began: their values are read from a straight line that begins where training does, and more "
            "probes (train.probes) would locate them better."
        )
    return text


def _verdict(runs: Trajectories, at: pd.DataFrame) -> list[str]:
    """Which methods differ significantly from the reference in the first measure; plainly none if none do."""
    compared = at[at["difference"].notna()]
    if compared.empty:
        return []
    reference, show = at["reference"].iloc[0], _shower(runs.measures[0])
    bounded = compared[compared["difference_low"].notna()]
    if bounded.empty:
        return [
            f"A difference from {reference} has no interval: there is one seed, and what other probe rows would "
            "change is not known."
        ]
    sure = bounded[(bounded["difference_low"].astype(float) > 0) | (bounded["difference_high"].astype(float) < 0)]
    if sure.empty:
        return [
            f"At this gain no method's forgetting differs significantly from that of {reference}: every 95 % "
            "confidence interval of the difference includes 0."
        ]
    parts = []
    for side, rows in (("less", sure[sure["difference"] < 0]), ("more", sure[sure["difference"] > 0])):
        if len(rows):
            each = words.few(f"{row.method} ({show(row.difference)})" for row in rows.itertuples())
            parts.append(f"{side} than {reference}: {each}")
    unit = HEADS[runs.measures[0]].split(", ")[1]
    return [
        "The methods whose 95 % confidence interval of the difference excludes 0 forget "
        f"{'; '.join(parts)} (in {unit}, not corrected for the number of methods)."
    ]


def _line(runs: Trajectories, own: pd.DataFrame, marks: dict[str, float]) -> dict:
    by_place, main = own.set_index(["level", "measure"]), runs.measures[0]
    cells = [_bounded(by_place.loc[("matched", measure)], measure, key="value") for measure in runs.measures]
    cells.append(_bounded(by_place.loc[("matched", main)], main, key="difference"))
    others = [level for level in marks if level != "matched"]
    cells += [(_bounded(by_place.loc[(level, main)], main, key="value")[0], "") for level in others]
    method = own["method"].iloc[0]
    return {"name": method, "colour": style.colour(method), "cells": cells}


def _bounded(row: pd.Series, measure: str, *, key: str) -> tuple[str, str]:
    """A value and its interval as texts."""
    show, prefix = _shower(measure), "" if key == "value" else f"{key}_"
    low, high = row[f"{prefix}low"], row[f"{prefix}high"]
    if numbers.missing(row[key]):
        if key == "difference":
            return "–", ""
        return "did not reach it", "" if row["seeds"] == 1 else f"{row['reached']} of {row['seeds']} seeds did"
    mark = "†" if row["begins"] and key == "value" else ""
    return show(row[key]) + mark, "" if numbers.missing(low) else f"[{show(low)}, {show(high)}]"


def _notes(runs: Trajectories, table: pd.DataFrame) -> list[str]:
    covers = set(table["covers"])
    lines = [
        "A run's forgetting at a gain is read on the straight line between the two probes around its first crossing of "
        f"that gain; later probes do not count. A method that stays below {100 * BARELY:.0f} % of the best one's final "
        "gain has barely learned and sets no level.",
        "The quarters are of the best method's final gain. Gain and forgetting are on probe rows, against the bare "
        "base, not on the scored rows.",
    ]
    if covers & {"seeds and rows", "rows"}:
        whose = "over seeds and probe rows" if "seeds and rows" in covers else "over the probe rows alone, one seed"
        lines.append(
            f"[ , ] of right answers is a 95 % confidence interval {whose} (at least: {_probe_rows(runs)}). How much "
            "answers vary by row is taken from the scored rows of the same tasks after training, because curves hold "
            "no items."
        )
    if "seeds" in covers:
        lines.append(
            "[ , ] of nats is a 95 % confidence interval over seeds alone (Student's t), all probed on the same few "
            "rows: it does not cover what other rows would change."
        )
    if table["begins"].any():
        lines.append("† starts beyond this gain, with weights of its own preparation: the value is at its first probe.")
    own = "compared with its own first probe, because the base's probes are not recorded."
    return lines + ([f"{words.few(runs.from_own_start)}: {own}"] if runs.from_own_start else [])


def _probe_rows(runs: Trajectories) -> str:
    return ", ".join(f"{column.removeprefix('probe_')} {n}" for column, n in runs.rows.items())


def _shower(measure: str):
    return numbers.points if measure == "forgetting" else _nats


def _nats(value: float) -> str:
    return f"{value:+.3f}".replace("-", numbers.MINUS)


def _gain(runs: Trajectories, value: float) -> str:
    return f"{numbers.points(value)} points" if runs.gain == "accuracy" else f"{_nats(value)} nats per token"
