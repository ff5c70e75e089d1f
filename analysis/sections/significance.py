"""The paired tests in words and tables; a difference that is not significant is reported as plainly as one that is."""

import pandas as pd

from analysis import numbers, style, units, words
from analysis.load import Loaded
from analysis.measures import ACCURACY, BY_KEY, GENERAL, GOLD, KL
from analysis.statistics.permutation import FLIPS, LEVEL, mcnemar

SHOWN = ("gain", GENERAL.key, KL.key, GOLD.key, ACCURACY)  # tests.csv has the other measures too
PAIRS = 60  # pairs of methods on the page: a study of 40 methods has 780, which tests.csv has
NAMED = 6  # methods or pairs named one by one in a sentence; more are counted, and the table names them


def is_significant(test: pd.Series) -> bool:
    """Whether a row of `tests_of` is significant at 5 % after correction."""
    return bool(test["p_holm"] < LEVEL)


def section(loaded: Loaded, tests: pd.DataFrame, *, model: str, domain: str) -> dict | None:
    """What significance.html.j2 shows of one comparison of `all_tests`; None if there are no items to test."""
    tests = tests[(tests["model"] == model) & (tests["domain"] == domain)]
    if tests.empty:
        return None
    shown = tests[tests["kind"].isin(SHOWN)]
    with_base, between = shown[shown["b"] == "base"], shown[shown["b"] != "base"]
    return {
        "with_base": _table(with_base, what="method"),
        "between": _table(between, what="pair", most=PAIRS),
        "mcnemar": _by_task(mcnemar(loaded, model=model, domain=domain)),
        "legend": _legend(tests) + _not_tested(loaded, model=model, domain=domain),
    }


def _table(tests: pd.DataFrame, *, what: str, most: int | None = None) -> dict:
    """The sentences, heads and rows about one family of tests; of more than `most` rows those of the smallest p."""
    kinds = [kind for kind in SHOWN if (tests["kind"] == kind).any()]
    heads = [_head(tests[tests["kind"] == kind].iloc[0]) for kind in kinds]
    least = tests.groupby(["a", "b"], sort=False)["p"].min()
    shown = tests
    if most is not None and len(least) > most:
        kept = least.sort_values(kind="stable").index[:most]
        shown = tests[pd.MultiIndex.from_frame(tests[["a", "b"]]).isin(kept)]
    rows = _rows(shown, kinds)
    return {"sentences": _summary(tests, kinds, what=what), "heads": heads, "rows": rows, "of": len(least)}


def _not_tested(loaded: Loaded, *, model: str, domain: str) -> list[str]:
    cells, lines = loaded.of(model, domain), []
    scored = set(loaded.items["cell"].unique())
    if absent := [cell for cell in cells.index if cell not in scored]:
        lines.append(f"Not tested, because their items.csv.gz is missing: {words.few(absent)}.")
    first = cells.iloc[0]
    if units.of_domain(first) != units.SHARE:
        lines.append(f"Gain is in {units.of_domain(first)}, not in points.")
    if not units.per_item(first, domain):
        metric = units.metric_of(first, domain)
        lines.append(f"Gain is not tested: {metric} is one number of all rows, without a part for each row.")
    return lines


def _summary(tests: pd.DataFrame, kinds: list[str], *, what: str) -> list[str]:
    """A sentence or two per kind: which differences are significant, and how large the others could have been."""
    sentences = []
    for kind in kinds:
        rows = tests[tests["kind"] == kind]
        show, unit, name = _shower(rows.iloc[0]), _unit(rows.iloc[0]), _name(kind)
        names = rows["a"] if what == "method" else rows["a"] + " and " + rows["b"]
        sure = rows["p_holm"] < LEVEL
        against = " from the base" if what == "method" else ""
        if sure.sum() > NAMED:
            sentences.append(
                f"{_first_up(name)} differs significantly{against} for {sure.sum()} of {len(rows)} {what}s."
            )
        elif sure.any():
            pairs = zip(names[sure], rows[sure]["difference"])
            each = "; ".join(f"{who} ({show(difference)})" for who, difference in pairs)
            where = f"{against} for" if what == "method" else " between"
            sentences.append(f"{_first_up(name)} ({units.named(unit)}) differs significantly{where} {each}.")
        # significant by items, while the interval over seeds and items includes zero
        only_runs = sure & (rows["scope"] == "method") & (rows["low"] <= 0) & (rows["high"] >= 0)
        if only_runs.any():
            sentences.append(
                f"For {_listed(names[only_runs], what)} the interval over seeds includes zero: the difference is of "
                "these runs, not of the method."
            )
        if not sure.all():
            n = " or ".join(str(n) for n in sorted(set(rows[~sure]["n"])))
            sentences.append(
                f"No significant difference in {name} at n = {n} for {_listed(names[~sure], what)}"
                f"{_detectable(rows[~sure]['detectable'], unit)}."
            )
    return sentences


def _unit(test: pd.Series) -> str:
    return test.get("unit", units.SHARE)


def _name(kind: str) -> str:
    """What a kind of test is called within a sentence."""
    return BY_KEY[kind].name if kind in BY_KEY else kind


def _first_up(text: str) -> str:
    return text[0].upper() + text[1:]


def _head(test: pd.Series) -> str:
    """The head of a kind's columns."""
    kind = test["kind"]
    return BY_KEY[kind].head if kind in BY_KEY else f"{kind}, {units.named(_unit(test))}"


def _shower(test: pd.Series):
    """How a difference of this kind is written; between two methods a divergence has a sign too."""
    if test["kind"] in BY_KEY:
        return numbers.nats
    return lambda value: units.change(value, _unit(test))


def _listed(names: pd.Series, what: str) -> str:
    return f"{len(names)} {what}s" if len(names) > NAMED else (", " if what == "method" else "; ").join(names)


def _detectable(values: pd.Series, unit: str) -> str:
    texts = [_size(value, unit) for value in values.dropna()]
    if not texts:
        return ""
    low, high = min(texts, key=float), max(texts, key=float)
    return f"; this study could have detected {low if low == high else f'{low} to {high}'} {units.named(unit)}"


def _size(value: float, unit: str) -> str:
    return f"{100 * value:.1f}" if unit == units.SHARE else f"{value:.3g}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def _rows(tests: pd.DataFrame, kinds: list[str]) -> list[dict]:
    """One row per method or pair, one cell per kind; None where that kind has no test."""
    rows = []
    for (a, b), own in tests.groupby(["a", "b"], sort=False):
        cells = {row["kind"]: _cell(row) for _, row in own.iterrows()}
        name = a if b == "base" else f"{a} {numbers.MINUS} {b}"
        rows.append({"a": a, "name": name, "cells": [cells.get(kind) for kind in kinds]})
    return rows


def _cell(test: pd.Series) -> dict:
    difference, low, high = (_shower(test)(test[key]) for key in ("difference", "low", "high"))
    return {
        "difference": difference,
        "bounds": "" if numbers.missing(test["low"]) else f"[{low}, {high}]",
        "p": _p(test["p_holm"]),
        "raw": _p(test["p"]),
        "significant": is_significant(test),
        "detectable": "–" if numbers.missing(test["detectable"]) else _size(test["detectable"], _unit(test)),
        # of measured numbers every item differs
        "differing": "" if test["kind"] in BY_KEY else f"{test['items_differing']} of {test['n']} differ",
    }


def _by_task(table: pd.DataFrame) -> dict:
    """McNemar's counts, one row per task and seed, one column per method; of many methods the other way round."""
    methods = list(dict.fromkeys(table["method"]))
    rows = []
    for (task, seed), own in table.groupby(["task", "seed"], sort=False):
        by_method = {row.method: (f"{row.lost} / {row.gained}", _p(row.p)) for row in own.itertuples()}
        cells = [by_method.get(method, ("–", "")) for method in methods]
        rows.append({"task": task, "role": own["role"].iloc[0], "seed": seed, "n": own["n"].iloc[0], "cells": cells})
    return {"methods": methods, "rows": rows, "turned": len(methods) > style.MANY}


def _legend(tests: pd.DataFrame) -> list[str]:
    together = tests[~tests["kind"].isin(BY_KEY)]  # gain and forgetting are corrected together
    with_base = int((together["b"] == "base").sum())
    families = f"the {with_base} tests of gain and forgetting against the base"
    families += f" and over the {len(together) - with_base} between methods" if len(together) > with_base else ""
    families += ", and of each measure in nats over its own" if len(together) < len(tests) else ""
    about = "over items, as is p: this run, not this method"
    if (tests["scope"] == "method").any():
        about = "over seeds and items: p is about these runs on other items, the interval is about the method"
    return [
        "Two-sided sign-flip permutation tests of the reported numbers, paired by item: over all patterns of signs if "
        f"scores are right or wrong, else over {FLIPS:,} random ones; p is corrected by Holm's method over {families}.",
        "A positive difference means that the method named first gained more, or forgot more.",
        f"[ , ] is the 95 % confidence interval, not corrected, {about}.",
        "“Detects”, in the unit of its column, is the true difference that the test would find in 80 of 100 studies at "
        "the first step of the correction, from the standard errors, and at least the number of items that must all "
        "change the same way for such a p.",
    ]
