"""What methods lose at the same gain (analysis/statistics/matched.py), as the report shows it."""

from collections.abc import Collection

import numpy as np
import pandas as pd

from analysis import numbers, style, words
from analysis.chosen import reported_methods
from analysis.families import family
from analysis.load import Loaded
from analysis.measures import ACCURACY, BY_KEY
from analysis.roles import PLAIN
from analysis.sections.credit import apart, sentences
from analysis.statistics.contrasts import redrawn
from analysis.statistics.detectable import LEVEL, detectable, holm
from analysis.statistics.matched import BARELY, ENOUGH, Equal, equal_gain, level, matched
from analysis.statistics.nats import DOMAIN
from analysis.statistics.resample import Resampled
from analysis.statistics.trajectories import Trajectories, along, trajectories

PROBES = {"general_nll_lost": "general text lost, nats/token", "gold_nll_lost": "right answers lost, nats/token"}


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """What matched.html.j2 shows of one comparison; None if no gain or loss in nats is known."""
    made = redrawn(loaded, model=model, domain=domain)
    if made is None or not made.losses:
        return None
    chosen = reported_methods(loaded, model=model, domain=domain)
    runs = trajectories(loaded, model=model, domain=domain, methods=chosen)
    deciding = loaded.roles.setting_levels(made.families)
    at = level(made, deciding)
    if at is None:
        none = "No method gained on the domain, so there is no gain at which losses could be compared."
        return {"sentences": [none], "heads": [], "rows": [], "notes": [], "along": None}
    table, against = matched(made, deciding), _against(made, apart(loaded))
    shown = list(made.losses)
    heads = ["method", "settings", "gains, nats/token"]
    heads += [f"against {PLAIN} or its control, at the most that both gain"] if against else []
    heads += [_head(key) for key in shown]
    return {
        "sentences": [
            _rule(made, at[0], deciding),
            *_verdict(made, against, shown[0]),
            *sentences(loaded, model=model, domain=domain),
        ],
        "heads": heads,
        "rows": [_line(made, table[table["family"] == name], against) for name in made.families],
        "notes": _notes(made, bool(against)),
        "along": _along(runs, deciding) if runs is not None and runs.between else None,
    }


def clause(loaded: Loaded, methods: Collection[str], *, key: str, model: str, domain: str) -> str:
    """How many of `methods` lose significantly less and more than plain fine-tuning where both gain as much, for the
    answer at the top of the report; '' if none can be tested in the measure `key`."""
    made = redrawn(loaded, model=model, domain=domain)
    if made is None or key not in made.losses[:1]:
        return ""
    tested = _tested(made, _against(made, apart(loaded)))
    own = [tested[name] for name in dict.fromkeys(map(family, methods)) if name in tested]
    less, more = (sum(p < LEVEL and one.difference * sign > 0 for one, p in own) for sign in (-1, 1))
    beside = f" and {more} more" if more else ""
    return f"; at equal gain {less} of {len(own)} lose significantly less{beside}" if own else ""


def _against(made: Resampled, controls: dict[str, str]) -> dict[str, Equal]:
    """Each family against plain fine-tuning in the first measure, or against its control if it has one of its own.

    Families without the one that they are compared with are missing.
    """
    reference = {family(method): family(control) for method, control in controls.items()}
    pairs = [(name, reference.get(name, PLAIN)) for name in made.families if name != PLAIN]
    found = {a: equal_gain(made, a, b, key=made.losses[0]) for a, b in pairs}
    return {name: one for name, one in found.items() if one is not None}


def _rule(made: Resampled, gain: float, deciding: Collection[str]) -> str:
    most = {name: made.values[DOMAIN][made.families[name]].max() for name in deciding}
    barely = [name for name, value in most.items() if not value >= gain]
    but = f" except {words.few(barely)}" if barely else ""
    every = "every method" if len(deciding) == len(made.families) else f"every one of {words.few(deciding, most=12)}"
    return (
        f"Methods are compared at a gain of {numbers.nats(gain)} nats per token on the domain's scored rows, the "
        f"largest that {every}{but} reaches at one of its settings."
    )


def _verdict(made: Resampled, against: dict[str, Equal], key: str) -> list[str]:
    """Which methods lose significantly less or more than plain fine-tuning where both gain as much, and what could have
    been found of the others."""
    tested = _tested(made, against)
    if not tested:
        return []
    sure = {name: one for name, (one, p) in tested.items() if p < LEVEL}
    sides = {
        word: [f"{name} ({_show(key)(one.difference)})" for name, one in sure.items() if one.difference * sign > 0]
        for word, sign in (("less", -1), ("more", 1))
    }
    parts = [f"these lose {word} than {PLAIN}: {words.few(names)}" for word, names in sides.items() if names]
    if others := [one for name, (one, _) in tested.items() if name not in sure]:
        errors = np.array([one.error for one in others])
        sizes = detectable(errors, np.full(len(errors), np.inf), tests=len(tested))
        ends = " to ".join(dict.fromkeys(f"{size:.2g}" for size in (sizes.min(), sizes.max())))
        rest = "the others'" if sure else "no method's"
        verb = "loss does not differ" if sure else "loss differs"
        unit = "points" if key == ACCURACY else BY_KEY[key].unit
        parts.append(
            f"{rest} {verb} significantly from that of {PLAIN} (a difference of {ends} {unit} would have been found)"
        )
    return [f"Where both gain as much, {'; '.join(parts)} (5 %, after Holm's correction)."]


def _tested(made: Resampled, against: dict[str, Equal]) -> dict[str, tuple[Equal, float]]:
    """Each family that is compared with plain fine-tuning and can be tested, both of several seeds, with its p after
    Holm's correction over all of them."""
    tested = {
        name: one
        for name, one in against.items()
        if one.p is not None and not one.beyond and one.b == PLAIN and min(map(made.seeds_of, (name, PLAIN))) > 1
    }
    corrected = holm([one.p for one in tested.values()]) if tested else ()
    return {name: (one, p) for (name, one), p in zip(tested.items(), corrected)}


def _line(made: Resampled, own: pd.DataFrame, against: dict[str, Equal]) -> dict:
    name = own["family"].iloc[0]
    gains = sorted(made.values[DOMAIN][made.families[name]])
    ends = " to ".join(dict.fromkeys(map(numbers.nats, (gains[0], gains[-1]))))
    cells = [(str(len(gains)), ""), (ends, "")]
    if against:
        cells.append(_compared(against[name], key=made.losses[0]) if name in against else ("", ""))
    first = True
    for row in own.itertuples():
        if row.why:
            cells.append(("–", row.why if first else ""))
        else:
            value, bounds = _bounded(row.value, row.low, row.high, show=_show(row.measure))
            cells.append((value, bounds or "no interval"))
        first = False
    return {"name": name, "colour": style.colour(name), "cells": cells}


def _compared(one: Equal, *, key: str) -> tuple[str, str]:
    against = f", against {one.b}" if one.b != PLAIN else ""
    if one.beyond:
        return "–", f"{one.beyond} gains more at its first setting than the other ever does{against}"
    value, bounds = _bounded(one.difference, one.low, one.high, show=_show(key))
    return value, f"{bounds} at {numbers.nats(one.gain)}{against}".strip()


def _bounded(value: float, low: float | None, high: float | None, *, show) -> tuple[str, str]:
    return show(value), "" if numbers.missing(low) else f"[{show(low)}, {show(high)}]"


def _notes(made: Resampled, compared: bool) -> list[str]:
    several = max(made.seeds.values()) > 1
    covers = "redrawn items and seeds" if several else "redrawn items: these runs, not these methods"
    lines = [
        "A method's curve goes through its settings on the scored rows; a setting that gains less and loses more than "
        "another one of the same method is replaced by that one, between the others the line is straight, and below "
        "the least gain of a method and above its largest there is no number (–, with the reason).",
        f"[ , ] is a 95 % confidence interval from {covers}; the gain at which methods are compared is redrawn with "
        f"them. There is none where in more than {100 * (1 - ENOUGH):.0f} % of the redraws a method's settings do not "
        f"reach it. A method that gains less than {100 * BARELY:.0f} % of what the best one gains sets no level.",
    ]
    if compared:
        lines.append(
            f"Against {PLAIN}, or its control if a method trains on general text: each at the largest gain that both "
            "reach; without a control, or where one of the two gains more at its first setting than the other ever "
            "does, there is no number."
        )
    return lines


def _along(runs: Trajectories, deciding: Collection[str]) -> dict:
    """The table along training."""
    table = along(runs, deciding)
    without = "; ".join(f"{method}: {why}" for method, why in runs.without.items())
    gain = f"{numbers.nats(table['gain'].iloc[0])} nats per token" if len(table) else ""
    rows = []
    for method, own in table.groupby("method", sort=False):
        cells = [
            ("–", row.why) if row.why else _bounded(row.value, row.low, row.high, show=numbers.nats)
            for row in own.itertuples()
        ]
        rows.append({"name": method, "colour": style.colour(method), "cells": cells})
    return {"gain": gain, "heads": ["method", *(PROBES[key] for key in runs.losses)], "rows": rows, "without": without}


def _head(key: str) -> str:
    return "right answers lost, points" if key == ACCURACY else BY_KEY[key].head


def _show(key: str):
    return numbers.points if key == ACCURACY else BY_KEY[key].show
