"""The paired tests in words and tables; a difference that is not significant is reported as plainly as one that is."""

import pandas as pd

from analysis import numbers, style, units, words
from analysis.load import Loaded
from analysis.measures import ACCURACY, BY_KEY, NATS
from analysis.roles import PLAIN
from analysis.statistics.contrasts import BASE
from analysis.statistics.detectable import LEVEL
from analysis.statistics.nats import DOMAIN

SHOWN = (DOMAIN, *(measure.key for measure in NATS), ACCURACY)
PAIRS = 15  # pairs of leaders on the page, those with the smallest p; tests.csv has all
NAMED = 6  # methods or pairs named one by one in a sentence; more are counted, and the table names them
TITLES = {
    BASE: ("Against the base", "method"),
    PLAIN: ("Against plain fine-tuning", "method − full"),
    "leaders": ("Leaders, in pairs", "first − second"),
    "compositions": ("Compositions, each against the single method with the largest p value", "first − second"),
    "equal_gain": ("Compositions at equal gain", "first − second"),
}
UNITS = {ACCURACY: units.SHARE, DOMAIN: "nats per token"}


def is_significant(test: pd.Series) -> bool:
    """Whether a row of `paired_tests` is significant at 5 % after correction; a row of one seed never is."""
    return bool(test["p_holm"] < LEVEL)


def section(loaded: Loaded, tests: pd.DataFrame, *, model: str, domain: str) -> dict | None:
    """What significance.html.j2 shows of one comparison of `all_tests`; None if there are no items to test."""
    tests = tests[(tests["model"] == model) & (tests["domain"] == domain)]
    if tests.empty:
        return None
    shown = tests[tests["measure"].isin(SHOWN)]
    families = [_family(name, shown[shown["family"] == name]) for name in TITLES]
    return {
        "families": [family for family in families if family["rows"]],
        "legend": _legend(tests) + _not_tested(loaded, model=model, domain=domain),
    }


def _family(name: str, tests: pd.DataFrame) -> dict:
    """The title, sentences, heads and rows about one family of tests."""
    title, head = TITLES[name]
    keys = [key for key in SHOWN if (tests["measure"] == key).any()]
    least = tests.assign(p=tests["p"].fillna(1.0)).groupby(["a", "b"], sort=False)["p"].min()
    kept = list(least.index) if name != "leaders" else list(least.sort_values(kind="stable").index[:PAIRS])
    by_pair = {pair: own.set_index("measure") for pair, own in tests.groupby(["a", "b"], sort=False)}
    rows = [
        {
            "name": a if b == BASE or (name == PLAIN and b == PLAIN) else f"{a} {numbers.MINUS} {b}",
            "cells": [_cell(key, by_pair[a, b].loc[key]) if key in by_pair[a, b].index else None for key in keys],
        }
        for a, b in kept
    ]
    sentences = [_summary(name, key, tests[tests["measure"] == key]) for key in keys]
    if tests["descriptive"].all():
        sentences = ["Nothing in this table is tested: there is one seed."]
        rows = [row | {"cells": [cell and cell | {"p": ""} for cell in row["cells"]]} for row in rows]
    heads = [_head(key) for key in keys]
    return {"title": title, "head": head, "sentences": sentences, "heads": heads, "rows": rows, "of": len(least)}


def _summary(name: str, key: str, rows: pd.DataFrame) -> str:
    """Which differences of one measure are significant, and how large the others could have been."""
    tested, what = rows[~rows["descriptive"]], "method" if name in (BASE, PLAIN) else "pair"
    if tested.empty:
        return f"{_first_up(_name(key))} is described and not tested: there is one seed."
    names = tested["a"] if what == "method" else tested["a"] + " and " + tested["b"]
    sure = tested["p_holm"] < LEVEL
    text = f"{_first_up(_name(key))} differs significantly for {sure.sum()} of {len(tested)} {what}s"
    if 0 < sure.sum() <= NAMED:
        text += f" ({', '.join(names[sure])})"
    if not sure.all():
        few = [_size(key, value) for value in tested[~sure]["detectable"].dropna()]
        low, high = (min(few, key=float), max(few, key=float)) if few else ("", "")
        could = low if low == high else f"{low} to {high}"
        text += f"; the others could have been found from {could} {units.named(_unit(key))}" if few else ""
    return f"{text}."


def _not_tested(loaded: Loaded, *, model: str, domain: str) -> list[str]:
    cells, lines = loaded.of(model, domain), []
    items = loaded.items_of(cells)
    scored = set(items["cell"].unique()) if len(items) else set()
    if absent := [cell for cell in cells.index if cell not in scored]:
        lines.append(f"Not tested, because their items.csv.gz is missing: {words.few(absent)}.")
    first = cells.iloc[0]
    if not units.per_item(first, domain):
        metric = units.metric_of(first, domain)
        lines.append(f"Gain in {metric} is not tested: it is one number of all rows, without a part for each row.")
    return lines


def _unit(key: str) -> str:
    return BY_KEY[key].unit if key in BY_KEY else UNITS[key]


def _name(key: str) -> str:
    """What a measure is called within a sentence."""
    names = {ACCURACY: "the loss of accuracy", DOMAIN: "the gain in nats on the domain"}
    return BY_KEY[key].name if key in BY_KEY else names[key]


def _first_up(text: str) -> str:
    return text[0].upper() + text[1:]


def _head(key: str) -> str:
    heads = {ACCURACY: "accuracy lost, points", DOMAIN: "domain gained, nats/token"}
    return BY_KEY[key].head if key in BY_KEY else heads[key]


def _show(key: str, value: float) -> str:
    return numbers.points(value) if key == ACCURACY else numbers.nats(value)


def _size(key: str, value: float) -> str:
    return f"{100 * value:.1f}" if key == ACCURACY else f"{value:.3g}"


def _cell(key: str, test: pd.Series) -> dict:
    difference, low, high = (_show(key, test[name]) for name in ("difference", "low", "high"))
    sure = is_significant(test)
    return {
        "difference": difference,
        "bounds": "" if numbers.missing(test["low"]) else f"[{low}, {high}]",
        "p": "one seed" if test["descriptive"] else numbers.p(test["p_holm"]),
        "significant": sure,
        "detectable": "" if sure or numbers.missing(test["detectable"]) else _size(key, test["detectable"]),
    }


def by_task(table: pd.DataFrame) -> dict:
    """McNemar's counts, one row per task and seed, one column per method; of many methods the other way round."""
    methods = list(dict.fromkeys(table["method"]))
    rows = []
    for (task, seed), own in table.groupby(["task", "seed"], sort=False):
        by_method = {row.method: (f"{row.lost} / {row.gained}", numbers.p(row.p)) for row in own.itertuples()}
        cells = [by_method.get(method, ("–", "")) for method in methods]
        rows.append({"task": task, "role": own["role"].iloc[0], "seed": seed, "n": own["n"].iloc[0], "cells": cells})
    return {"methods": methods, "rows": rows, "turned": len(methods) > style.MANY}


def _legend(tests: pd.DataFrame) -> list[str]:
    lines = [
        "p is that of a difference over seeds and items, by one model in which the spread of seeds is pooled over the "
        "methods of a setting and moderated by their own. It is corrected by Holm’s method for each measure within "
        "each table; [ , ] is the 95 % interval of the same model, not corrected.",
        "A positive difference means that the method named first lost more, or of the domain gained more.",
        "“Detects” is the true difference that 80 of 100 such studies would find, at the first step of the correction.",
    ]
    if (tests["family"] == "compositions").any():
        lines.append(
            "A composition’s p is its largest against any single method of several seeds, controls included, at the "
            "same setting: it is said to forget less only if it forgets less than each of them."
        )
    if tests["descriptive"].any():
        lines.append(
            "Rows with one seed are described, not tested: their intervals cover other items, not another run of the "
            "method (tests.csv has the sign-flip p of these runs, p_run)."
        )
    return lines
