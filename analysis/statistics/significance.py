"""What the paired tests say, in sentences and as the report's section; a difference that was not found is said as plainly as one that was."""

import pandas as pd

from analysis import numbers, units
from analysis.load import Loaded
from analysis.statistics.permutation import FLIPS, KINDS, LEVEL, mcnemar

NAMED = 6  # findings named one by one in a sentence; beyond, they are counted and the table names them


def sentence(test: pd.Series) -> str:
    """One row of `tests_of` in words: what was found, or that nothing was and how large a difference would have been."""
    against = "the base" if test["b"] == "base" else test["b"]
    if not found(test):
        return f"No detectable difference in {test['kind']} between {test['a']} and {against} at n = {test['n']}{_could([test['detectable']], _unit(test))}."
    of = f"{test['kind'].capitalize()} of {test['a']}" + ("" if test["b"] == "base" else f" minus that of {test['b']}")
    show = lambda value: units.change(value, _unit(test))
    bounds = "" if numbers.missing(test["low"]) else f" [{show(test['low'])}, {show(test['high'])}]"
    text = f"{of}: {show(test['difference'])} {units.named(_unit(test))}{bounds}, p {_p(test['p_holm'], sign=True)} after Holm's correction, n = {test['n']}."
    return text + (
        " Over seeds the interval reaches zero: this holds of these runs, not of the method."
        if _only_runs(test)
        else ""
    )


def _unit(test: pd.Series) -> str:
    return test.get("unit", units.SHARE)


def found(test: pd.Series) -> bool:
    """Whether a row of `tests_of` is a difference at 5 % after correction."""
    return bool(test["p_holm"] < LEVEL)


def section(loaded: Loaded, tests: pd.DataFrame, *, model: str, domain: str) -> dict | None:
    """What analysis/sections/significance.html.j2 shows of one comparison of `all_tests`; None where there are no items to test."""
    tests = tests[(tests["model"] == model) & (tests["domain"] == domain)]
    if tests.empty:
        return None
    with_base, between = tests[tests["b"] == "base"], tests[tests["b"] != "base"]
    kinds = [kind for kind in KINDS if (tests["kind"] == kind).any()]
    return {
        "kinds": kinds,
        "with_base": {"sentences": _summary(with_base, what="method"), "rows": _rows(with_base, kinds)},
        "between": {"sentences": _summary(between, what="pair"), "rows": _rows(between, kinds)},
        "mcnemar": _by_task(mcnemar(loaded, model=model, domain=domain)),
        "legend": _legend(tests) + _untested(loaded, model=model, domain=domain),
    }


def _untested(loaded: Loaded, *, model: str, domain: str) -> list[str]:
    absent = [cell for cell in loaded.of(model, domain).index if cell not in set(loaded.items["cell"])]
    said = [f"Not tested, for their items.csv.gz are not there: {', '.join(absent)}."] if absent else []
    first = loaded.of(model, domain).iloc[0]
    if units.of_domain(first) != units.SHARE:
        said.append(f"Gain is in {units.of_domain(first)} and not in points.")
    if not units.per_item(first, domain):
        said.append(
            f"Gain is not tested: {units.metric_of(first, domain)} is one number of all rows, which no single row has a part in."
        )
    return said


def _summary(tests: pd.DataFrame, *, what: str) -> list[str]:
    """A sentence or two a kind: which differences were found, and what could have been where none was."""
    said = []
    for kind, rows in tests.groupby("kind", sort=False):
        sure = rows[[found(row) for _, row in rows.iterrows()]]
        rest = rows.drop(sure.index)
        name = lambda row: row["a"] if what == "method" else f"{row['a']} and {row['b']}"
        if len(sure) > NAMED:
            said.append(
                f"{kind.capitalize()} differs {'from the base ' if what == 'method' else ''}for {len(sure)} of {len(rows)} {what}s."
            )
        elif len(sure):
            each = "; ".join(
                f"{name(row)} ({units.change(row['difference'], _unit(row))})" for _, row in sure.iterrows()
            )
            said.append(
                f"{kind.capitalize()} differs, in {units.named(_unit(rows.iloc[0]))}, {'from the base for' if what == 'method' else 'between'} {each}."
            )
        if any(_only_runs(row) for _, row in sure.iterrows()):
            runs = [name(row) for _, row in sure.iterrows() if _only_runs(row)]
            said.append(
                f"Over seeds the interval reaches zero for {_listed(runs, what)}: there it holds of these runs, not of the method."
            )
        if len(rest):
            n = " or ".join(str(n) for n in sorted(set(rest["n"])))
            whose = _listed([name(row) for _, row in rest.iterrows()], what)
            said.append(
                f"No detectable difference in {kind} at n = {n} for {whose}{_could(rest['detectable'], _unit(rest.iloc[0]))}."
            )
    return said


def _listed(names: list[str], what: str) -> str:
    return f"{len(names)} {what}s" if len(names) > NAMED else ", ".join(names) if what == "method" else "; ".join(names)


def _could(detectable, unit: str) -> str:
    values = [_size(value, unit) for value in detectable if not numbers.missing(value)]
    if not values:
        return ""
    low, high = min(values, key=float), max(values, key=float)
    return f"; this study could have detected {low if low == high else f'{low} to {high}'} {units.named(unit)}"


def _size(value: float, unit: str) -> str:
    return f"{100 * value:.1f}" if unit == units.SHARE else f"{value:.3g}"


def _only_runs(test: pd.Series) -> bool:
    """Found by items, while the interval over seeds and items reaches zero."""
    return (
        found(test)
        and test["scope"] == "method"
        and not numbers.missing(test["low"])
        and test["low"] <= 0 <= test["high"]
    )


def _p(p: float, *, sign: bool = False) -> str:
    return "< 0.001" if p < 0.0005 else f"{'= ' if sign else ''}{p:.3f}"


def _rows(tests: pd.DataFrame, kinds: list[str]) -> list[dict]:
    """A row a method or pair, a cell a kind; None where that kind has no test."""
    rows = []
    for (a, b), own in tests.groupby(["a", "b"], sort=False):
        cells = {row["kind"]: _cell(row) for _, row in own.iterrows()}
        rows.append(
            {
                "a": a,
                "name": a if b == "base" else f"{a} \N{MINUS SIGN} {b}",
                "cells": [cells.get(kind) for kind in kinds],
            }
        )
    return rows


def _cell(test: pd.Series) -> dict:
    show = lambda value: units.change(value, _unit(test))
    bounds = "" if numbers.missing(test["low"]) else f"[{show(test['low'])}, {show(test['high'])}]"
    return {
        "difference": show(test["difference"]),
        "bounds": bounds,
        "p": _p(test["p_holm"]),
        "raw": _p(test["p"]),
        "found": found(test),
        "detectable": "–" if numbers.missing(test["detectable"]) else _size(test["detectable"], _unit(test)),
        "differing": f"{test['items_differing']} of {test['n']} differ",
    }


def _by_task(table: pd.DataFrame) -> dict:
    """McNemar's counts as a row a task and seed, a column a method."""
    methods = list(dict.fromkeys(table["method"]))
    rows = []
    for (task, seed), own in table.groupby(["task", "seed"], sort=False):
        by_method = {row.method: (f"{row.lost} / {row.gained}", _p(row.p)) for row in own.itertuples()}
        cells = [by_method.get(method, ("–", "")) for method in methods]
        rows.append({"task": task, "role": own["role"].iloc[0], "seed": seed, "n": own["n"].iloc[0], "cells": cells})
    return {"methods": methods, "rows": rows}


def _legend(tests: pd.DataFrame) -> list[str]:
    with_base = int((tests["b"] == "base").sum())
    families = f"{with_base} tests against the base" + (
        f" and {len(tests) - with_base} between methods" if len(tests) > with_base else ""
    )
    if (tests["scope"] == "method").any():
        about = "over seeds and items: p is about these runs on other items, the interval about the method"
    else:
        about = "over items, and p likewise: this run, not this method"
    return [
        "Two-sided sign-flip permutation tests of the reported numbers, paired by item: over all patterns of signs where scores are right or "
        f"wrong, else over {FLIPS:,} drawn ones; p is corrected by Holm's method over {families}.",
        "A positive difference means more gain, or more forgetting, of the method that is named first.",
        f"[ , ] is the 95 % interval, not corrected, {about}.",
        "“could have detected” is the true difference that the test would find in 80 studies of 100 at the first step of the correction, from "
        "the standard errors, and at least as many items as such a p takes if all change the same way.",
    ]
