"""The figure and the report's texts of matched gain: trajectories, and forgetting where they pass one gain."""

import numpy as np
import pandas as pd

from analysis import numbers, style
from analysis.families import family
from analysis.load import Loaded
from analysis.statistics.matched import BARELY, Trajectories, levels, matched, trajectories
from analysis.statistics.matched_sweep import gaps
from analysis.statistics.resample import resampled

TITLES = {
    "forgetting": "Forgetting: right answers lost on retention probes, points (down is better)",
    "forgetting_nats": "Forgetting: nats per token of right answers, retention probes (down is better)",
}
HEADS = {"forgetting": "forgetting, points", "forgetting_nats": "forgetting, nats per token"}


def matched_gain(loaded: Loaded, rows: pd.DataFrame, cells: pd.DataFrame):
    """Trajectories in the plane of gain and forgetting, the matched gain as a vertical line; a panel a measure of forgetting."""
    found = trajectories(loaded, model=cells.iloc[0]["model"], domain=cells.iloc[0]["domain"])
    if found is None:
        return None
    scale, marks = 100 if found.gain == "accuracy" else 1, levels(found)
    data = found.points[["cell", "method", "seed", "step", "tokens", "gain", *found.measures]].copy()
    data["gain"] *= scale
    data["matched_gain"] = scale * marks["matched"] if marks else np.nan
    if "forgetting" in found.measures:
        data["forgetting"] *= 100
    figure, panels = style.new(
        style.WIDTH, 0.6 + 2.7 * len(found.measures), len(found.measures), sharex=True, squeeze=False
    )
    for axes, measure in zip(panels[:, 0], found.measures):
        axes.set_title(TITLES[measure])
        axes.axhline(0, color=style.MUTED, linewidth=0.8)
        ends = []
        for method, own in data.groupby("method", sort=False):
            end = style.course(axes, own, method=method, x="gain", y=measure, size=4)
            if method in style.named(found.methods):
                ends.append((*end, method, style.colour(method)))
        axes.margins(x=0.03, y=0.08)
        style.label_ends(axes, ends, gap=0.075)
        if marks:
            axes.axvline(scale * marks["matched"], color=style.INK, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    if marks:
        text = f"matched gain {_gain(found, marks['matched'])}"
        panels[0, 0].annotate(
            text,
            (scale * marks["matched"], 1),
            xytext=(-5, -3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=style.INK,
        )
    unit = "points" if found.gain == "accuracy" else "nats per token"
    probed = (
        ", ".join(f"{column.removeprefix('probe_')} {n}" for column, n in found.rows.items())
        or "their number is not recorded"
    )
    panels[-1, 0].set_xlabel(f"gain on the domain's probes, {unit} (right is better); {style.where(cells)}")
    caption = (
        "Each line is a method from its first probe to its last, against the bare base: lower at the same gain is better. "
        + ("Faint lines are its seeds, the other their mean at each probe. " if cells["seed"].nunique() > 1 else "")
        + (
            "The dashed line is the gain at which methods are compared. "
            if marks
            else "No method gained on the probes: nothing to compare at. "
        )
        + (
            "Dashed lines are the blocks of a sweep. "
            if any(method != family(method) for method in found.methods)
            else ""
        )
        + f"Probe rows are few ({probed}) and disjoint from the scored rows."
    )
    return figure, data, "Forgetting at the same gain", caption


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """Texts for sections/matched.html.j2; None where the runs were not probed."""
    found = trajectories(loaded, model=model, domain=domain)
    if found is None:
        return None
    marks, table = levels(found), matched(found)
    if not marks:
        none = "No method gained on the domain's probes, so there is no gain at which forgetting could be compared."
        return {"sentences": [none], "heads": [], "rows": [], "notes": [], "sweeps": _sweeps(loaded, model, domain)}
    at = table[table["level"] == "matched"]
    return {
        "sentences": [_rule(found, marks, at), *_verdict(found, at)],
        "heads": [
            "method",
            *(HEADS[m] for m in found.measures),
            *(f"against {at['reference'].iloc[0]}" for _ in found.measures[:1]),
            *(f"at {level} ({_gain(found, gain)})" for level, gain in marks.items() if level != "matched"),
        ],
        "rows": [_line(found, table[table["method"] == method], marks) for method in found.methods],
        "notes": _notes(found, table),
        "sweeps": _sweeps(loaded, model, domain),
    }


def _sweeps(loaded: Loaded, model: str, domain: str) -> list[dict]:
    """Texts of the families' gaps on the scored rows; empty where nothing was swept."""
    found = resampled(loaded, model=model, domain=domain)
    rows = []
    of = lambda name: f"{name} ({len(found.families[name])})" if unequal else name
    for row in gaps(found).itertuples() if found else ():
        unequal = len(found.families[row.a]) != len(found.families[row.b])
        if numbers.missing(row.difference):
            rows.append(
                {"pair": f"{of(row.a)} − {of(row.b)}", "gains": "no gain in common", "value": "–", "interval": ""}
            )
            continue
        gains = dict.fromkeys(numbers.points(gain) for gain in (row.gain_low, row.gain_high))
        interval = "" if numbers.missing(row.low) else f"[{numbers.points(row.low)}, {numbers.points(row.high)}]"
        rows.append(
            {
                "pair": f"{of(row.a)} − {of(row.b)}",
                "gains": " to ".join(gains),
                "value": numbers.points(row.difference),
                "interval": interval,
            }
        )
    return rows


def _rule(found: Trajectories, marks: dict[str, float], at: pd.DataFrame) -> str:
    own = at[at["measure"] == found.measures[0]]
    barely = [row.method for row in own.itertuples() if row.reached < row.seeds]
    but = f" except {', '.join(barely)}" if barely else ""
    text = f"Compared at a gain of {_gain(found, marks['matched'])} on the domain's probes, the largest that every run of every method{but} reaches."
    if early := list(own[own["early"]]["method"]):
        text += (
            f" {len(early)} of {len(own)} methods ({', '.join(early)}) passed it before their first probe after training began: their values are "
            "read off a straight line from the start, which more probes (train.probes) would place better."
        )
    return text


def _verdict(found: Trajectories, at: pd.DataFrame) -> list[str]:
    """Which differences to the reference the intervals tell from zero, for the first measure; plainly none where none."""
    own = at[at["measure"] == found.measures[0]]
    compared = own[own["difference"].notna()]
    if compared.empty:
        return []
    reference, show = own["reference"].iloc[0], _shower(found.measures[0])
    bounded = compared[compared["difference_low"].notna()]
    if bounded.empty:
        return [
            f"There is no interval for a difference to {reference}: one seed, and what other probe rows would change is not known."
        ]
    told = bounded[(bounded["difference_low"].astype(float) > 0) | (bounded["difference_high"].astype(float) < 0)]
    if told.empty:
        return [
            f"At this gain no method's forgetting is told apart from that of {reference}: every interval of the difference includes 0."
        ]
    listed = lambda rows: ", ".join(f"{row.method} ({show(row.difference)})" for row in rows.itertuples())
    sides = [
        (f"less than {reference}", told[told["difference"] < 0]),
        (f"more than {reference}", told[told["difference"] > 0]),
    ]
    texts = "; ".join(f"{text}: {listed(rows)}" for text, rows in sides if len(rows))
    unit = HEADS[found.measures[0]].split(", ")[1]
    return [
        f"Of the methods whose interval of the difference excludes 0, these forget {texts}; in {unit}, not corrected for the number of methods."
    ]


def _line(found: Trajectories, own: pd.DataFrame, marks: dict[str, float]) -> dict:
    pick = lambda level, measure: own[(own["level"] == level) & (own["measure"] == measure)].iloc[0]
    main = found.measures[0]
    cells = [_bounded(pick("matched", measure), measure, key="value") for measure in found.measures]
    cells.append(_bounded(pick("matched", main), main, key="difference"))
    cells += [(_bounded(pick(level, main), main, key="value")[0], "") for level in marks if level != "matched"]
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
    return show(row[key]) + ("†" if row["begins"] and key == "value" else ""), "" if numbers.missing(
        low
    ) else f"[{show(low)}, {show(high)}]"


def _notes(found: Trajectories, table: pd.DataFrame) -> list[str]:
    covers = set(table["covers"])
    rows = ", ".join(f"{column.removeprefix('probe_')} {n}" for column, n in found.rows.items())
    lines = [
        "A run's forgetting at a gain is read on the straight line between the two probes around its first crossing of that gain; later "
        f"probes do not count. A method that stays below {100 * BARELY:.0f} % of the best one's final gain has barely learned and sets no level.",
        "The quarters are of the best method's final gain. Gain and forgetting are on probe rows, against the bare base, not on the scored rows.",
    ]
    if covers & {"seeds and rows", "rows"}:
        whose = "over seeds and probe rows" if "seeds and rows" in covers else "over the probe rows alone, one seed"
        lines.append(
            f"[ , ] of right answers is a 95 % interval {whose} (at least: {rows}). How much answers vary by row is taken from the "
            "scored rows of the same tasks at the end of training, for curves hold no items."
        )
    if "seeds" in covers:
        lines.append(
            "[ , ] of nats is a 95 % interval over seeds alone (Student's t), all probed on the same few rows: what other rows would "
            "change is not in it."
        )
    if table["begins"].any():
        lines.append(
            "† begins beyond this gain, with weights of its own preparation: the value is that of its first probe."
        )
    lines += [
        f"{method}: set against its own first probe, as the base's probes are not recorded."
        for method in found.from_own_start
    ]
    return lines


def _shower(measure: str):
    return numbers.points if measure == "forgetting" else _nats


def _nats(value: float) -> str:
    return f"{value:+.3f}".replace("-", numbers.MINUS)


def _gain(found: Trajectories, value: float) -> str:
    return f"{numbers.points(value)} points" if found.gain == "accuracy" else f"{_nats(value)} nats per token"
