"""What a method does beyond the general text that it trains on: its comparison with its control. And the controls.

A method that trains on general text before the domain forgets less for two reasons, its remedy and that text. Its
control (`controls:` of params.yaml, experiments/study/controls.py) has the text without the remedy, so that their
difference is the remedy's; the difference from plain fine-tuning is of both and is credited to neither. Where plain
fine-tuning itself is the control, as of replay, nothing changes.
"""

from collections.abc import Collection

import pandas as pd

from analysis import numbers, words
from analysis.chosen import reported_methods
from analysis.families import family
from analysis.load import Loaded
from analysis.measures import GENERAL
from analysis.roles import PLAIN
from analysis.statistics.contrasts import Contrasts
from analysis.statistics.detectable import holm
from analysis.statistics.intervals import Interval


def apart(loaded: Loaded) -> dict[str, str]:
    """Each method that trains on general text and whose control is not plain fine-tuning -> that control, or ''."""
    return {method: control for method, control in loaded.roles.control_of.items() if family(control) != PLAIN}


def against_control(loaded: Loaded, *, model: str, domain: str) -> dict[tuple[str, str], Interval | None]:
    """(method, control) of each of these methods of one comparison, at its chosen setting, with the difference of their
    losses of general text; None without a result of the control."""
    cells = loaded.of(model, domain)
    chosen = reported_methods(loaded, model=model, domain=domain)
    pairs = [(method, control) for method, control in apart(loaded).items() if method in chosen]
    there = [pair for pair in pairs if pair[1] in set(cells["method"])]
    found = Contrasts(loaded, model=model, domain=domain).of(GENERAL.key, there) if there else {}
    return {pair: found.get(pair) for pair in pairs}


def sentences(loaded: Loaded, *, model: str, domain: str) -> list[str]:
    """A sentence for each of these methods of one comparison: its loss against its control, with p after Holm's
    correction over these methods."""
    cells, lines, found = loaded.of(model, domain), [], against_control(loaded, model=model, domain=domain)
    tested = {pair: one.p for pair, one in found.items() if one is not None and one.p is not None}
    corrected = dict(zip(tested, holm(list(tested.values()))))
    for (method, control), one in found.items():
        own = cells[cells["method"] == method]
        tokens = own["tokens_prepare"].mean() + (own["tokens_added"].fillna(0).mean() if "tokens_added" in own else 0)
        amount = "" if numbers.missing(float(tokens)) else f"{numbers.count(tokens)} tokens of "
        reads = f"{method} also trains on {amount}general text"
        if one is not None:
            bounds = "" if one.low is None else f" [{GENERAL.show(one.low)}, {GENERAL.show(one.high)}]"
            known = corrected.get((method, control))
            p = "" if known is None else f", {numbers.p(known)}"
            lines.append(
                f"{reads}; against {control}, which reads the same without its remedy, it loses "
                f"{GENERAL.show(one.value)}{bounds} {GENERAL.unit} of general text{p}"
            )
        else:
            why = f"its control {control} has no result" if control else "the study has no control for it"
            lines.append(f"{reads}, and {why}: what its remedy does and what that text does cannot be told apart")
    return [f"{line}." for line in lines]


def clause(loaded: Loaded, *, model: str, domain: str, most: int) -> str:
    """The same of one comparison for the answer at the top of the report: more than `most` methods are counted."""
    found = against_control(loaded, model=model, domain=domain)
    if len(found) > most:
        return f"; {len(found)} methods also train on general text and are compared with their controls below"
    text = ""
    for (method, control), one in found.items():
        text += f"; {method} also trains on general text and "
        if one is None:
            text += "has no control here that tells its remedy from that text"
        else:
            bounds = "" if one.low is None else f" [{numbers.nats(one.low)}, {numbers.nats(one.high)}]"
            text += f"differs in loss from its control {control} by {numbers.nats(one.value)}{bounds}"
    return text


def others(loaded: Loaded, tests: pd.DataFrame, *, leaders: Collection[str]) -> str:
    """Which methods beside the `leaders`, where params.yaml names those, and beside compositions lose significantly
    more or less than plain fine-tuning: a study's controls, for the answer at the top of the report.

    tests   of one comparison and one measure, methods against plain fine-tuning, with `sure`
    """
    if not loaded.roles.leaders:
        return ""
    aside = {*leaders, *loaded.roles.composed(tests["a"]), *apart(loaded)}
    own, parts = tests[tests["sure"] & ~tests["a"].isin(aside)], []
    for word, sign in (("more", 1), ("less", -1)):
        if names := list(own.loc[own["difference"] * sign > 0, "a"]):
            named = words.few(names, join=" and " if len(names) == 2 else ", ")
            parts.append(f"{named} lose{'s' * (len(names) == 1)} significantly {word}")
    return f"; of the other methods {' and '.join(parts)}" if parts else ""
