"""What stands behind a difference of scores: which right answers a method lost, which it gained, and whether methods lose the same.

An item is lost where the base is right and the tuned model wrong, gained the other way round. Lost and gained answers cancel
in a score: net = gained − lost, churn = gained + lost. Two cells that lose n_a and n_b of the n items of a task that the base
has right, each by a draw of its own, would share n_a·n_b/n of them on average, with the hypergeometric variance
n_a n_b (n − n_a)(n − n_b) / (n² (n − 1)); tasks are drawn apart and added up.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from analysis import numbers, style, units
from analysis.load import Loaded, retention_tasks
from analysis.statistics.intervals import KEYS

ROLES = ("domain", "retention", "transfer")
LISTED = 10  # of the most forgotten questions
SURE = 2.58  # standard deviations from chance that are called more than chance


def flips(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """One row a (cell, scored item) of one comparison: cell, method, seed, task, role, doc_id, doc_hash, choice, and as booleans
    base, tuned (right answers), lost, gained, counts (whether the task counts in forgetting).

    An answer is right where its score is above 1/2; tasks whose metric is no proportion of right answers are left out. Empty where the base's or all cells' items are missing.
    """
    base = loaded.base.get(model, {}).get("items", pd.DataFrame())
    if base.empty or loaded.items.empty or not len(loaded.cells):
        return pd.DataFrame()
    cells = loaded.of(model, domain)
    first = cells.iloc[0]
    tasks = {
        task: about["role"]
        for task, about in first["scores_by_task"].items()
        if units.of_task(first, task) == units.SHARE
    }
    tuned = loaded.items[loaded.items["cell"].isin(cells.index) & loaded.items["task"].isin(list(tasks))]
    found = tuned[["cell", *KEYS, "choice", "score"]].merge(base[[*KEYS, "score"]], on=KEYS, suffixes=("", "_base"))
    if found.empty:
        return pd.DataFrame()
    before, after = found.pop("score_base") > 0.5, found.pop("score") > 0.5
    return found.assign(
        method=found["cell"].map(cells["method"]),
        seed=found["cell"].map(cells["seed"]),
        role=found["task"].map(tasks),
        counts=found["task"].isin(_counting(cells)),
        base=before,
        tuned=after,
        lost=before & ~after,
        gained=~before & after,
    )


def _counting(cells: pd.DataFrame) -> list[str]:
    """The tasks of which forgetting is the mean; all retention tasks where none is above chance."""
    first = cells.iloc[0]
    return retention_tasks(first) or [
        task
        for task, about in first["scores_by_task"].items()
        if about["role"] == "retention" and units.of_task(first, task) == units.SHARE
    ]


def by_task(items: pd.DataFrame) -> pd.DataFrame:
    """One row a (task, method): role, counts, n items, right (the base's), lost, gained, net, churn; numbers of items, means over seeds."""
    each = items.groupby(["task", "method", "cell"], sort=False).agg(
        role=("role", "first"),
        counts=("counts", "first"),
        n=("base", "size"),
        right=("base", "sum"),
        lost=("lost", "sum"),
        gained=("gained", "sum"),
    )
    mean = {key: (key, "mean") for key in ("n", "right", "lost", "gained")}
    found = each.groupby(["task", "method"], sort=False, as_index=False).agg(
        role=("role", "first"), counts=("counts", "first"), **mean
    )
    return found.assign(net=found["gained"] - found["lost"], churn=found["gained"] + found["lost"])


def pairs(items: pd.DataFrame) -> pd.DataFrame:
    """One row a pair of cells, over the tasks that count in forgetting: how many lost items they share, and how many by chance.

    a, b, method_a, method_b, lost_a, lost_b, both, union, expected and variance (of `both` by independent draws).
    """
    counted = items[items["counts"] & items["base"]]
    lost = counted.pivot(index=["task", "doc_id", "doc_hash"], columns="cell", values="lost")
    lost = lost[[cell for cell in dict.fromkeys(items["cell"]) if cell in lost]].dropna().astype(bool)
    methods = items.drop_duplicates("cell").set_index("cell")["method"]
    task = lost.index.get_level_values("task")
    n = pd.Series(1, index=task).groupby(level=0).sum()
    each = lost.groupby(task).sum()
    rows = []
    for a, b in combinations(lost.columns, 2):
        first, second = each[a], each[b]
        both = int((lost[a] & lost[b]).sum())
        variance = first * second * (n - first) * (n - second) / (n**2 * (n - 1).clip(lower=1))
        rows.append(
            {
                "a": a,
                "b": b,
                "method_a": methods[a],
                "method_b": methods[b],
                "lost_a": int(first.sum()),
                "lost_b": int(second.sum()),
                "both": both,
                "union": int(first.sum() + second.sum()) - both,
                "expected": float((first * second / n).sum()),
                "variance": float(variance.sum()),
            }
        )
    return pd.DataFrame(rows)


def overlap(found: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """`pairs` added up by methods: one row a pair of methods, of one method with itself where it has several seeds.

    jaccard     shared lost items / items that either lost
    by_chance   the same of independent draws, expected / (lost_a + lost_b − expected)
    ratio       shared lost items over those expected
    deviations  (shared − expected) / standard deviation by independent draws, the root mean over pairs of cells: pairs of one
                comparison are not independent, so more pairs are not taken for more evidence
    """
    place = {method: k for k, method in enumerate(methods)}
    records = []
    for (a, b), rows in _ordered(found, place).groupby(["method_a", "method_b"], sort=False):
        both, expected, spread = rows["both"].sum(), rows["expected"].sum(), np.sqrt(rows["variance"].mean())
        either, total = rows["union"].sum(), (rows["lost_a"] + rows["lost_b"]).sum()
        records.append(
            {
                "method_a": a,
                "method_b": b,
                "pairs": len(rows),
                "jaccard": both / either if either else np.nan,
                "by_chance": expected / (total - expected) if total else np.nan,
                "ratio": both / expected if expected else np.nan,
                "deviations": (both - expected) / len(rows) / spread if spread else np.nan,
            }
        )
    return pd.DataFrame(records)


def _ordered(found: pd.DataFrame, place: dict[str, int]) -> pd.DataFrame:
    """The earlier method of each pair first."""
    if found.empty:
        return pd.DataFrame(columns=["method_a", "method_b"])
    swapped = found["method_a"].map(place) > found["method_b"].map(place)
    turned = found.rename(
        columns={f"{key}_{one}": f"{key}_{two}" for key in ("method", "lost") for one, two in ("ab", "ba")}
    )
    return pd.concat([found[~swapped], turned[swapped]], ignore_index=True)


def most_forgotten(items: pd.DataFrame, *, top: int = LISTED) -> pd.DataFrame:
    """The items of retention tasks that count, lost by most cells (at least two, or the only one): task, doc_id, doc_hash, lost_by, of, methods.

    Equals stand in the order of task and document hash, so that no file's order decides.
    """
    counted = items[items["counts"]]
    of = counted.groupby(KEYS)["cell"].nunique().rename("of")
    lost = counted[counted["lost"]]
    found = (
        lost.groupby(KEYS)
        .agg(lost_by=("cell", "nunique"), methods=("method", lambda names: list(dict.fromkeys(names))))
        .join(of)
        .reset_index()
    )
    found = found[found["lost_by"] >= min(2, items["cell"].nunique())]
    found = found.sort_values(["lost_by", "task", "doc_hash"], ascending=[False, True, True]).head(top)
    return found.reset_index(drop=True)


def section(loaded: Loaded, *, model: str, domain: str) -> dict | None:
    """What analysis/sections/flips.html.j2 shows of one comparison; None where there are no items. Hashes only: rows are not ours to show."""
    items = flips(loaded, model=model, domain=domain)
    if items.empty or not items["counts"].any():
        return None
    methods = list(dict.fromkeys(items["method"]))
    tasks, shared, worst = by_task(items), overlap(pairs(items), methods), most_forgotten(items)
    totals = (
        tasks[tasks["counts"]].groupby("method", sort=False)[["n", "right", "lost", "gained", "net", "churn"]].sum()
    )
    own = tasks[tasks["role"] == "domain"].set_index("method")
    seeds = int(items.groupby("method")["cell"].nunique().max())
    return {
        "tasks": list(dict.fromkeys(items[items["counts"]]["task"])),
        "sentences": _sentences(totals, shared),
        "seeds": seeds,
        "rows": [
            {
                "method": method,
                "colour": style.colour(method),
                "cells": _cells(totals.loc[method], seeds)
                + (_cells(own.loc[method], seeds) if method in own.index else [("–", "")] * 4),
            }
            for method in totals.index
        ],
        "worst": [
            {
                "task": row.task,
                "hash": row.doc_hash[:12],
                "lost_by": f"{row.lost_by} of {row.of}",
                "methods": ", ".join(row.methods),
            }
            for row in worst.itertuples()
        ],
        "command": f"python -m experiments flips '{model}/{domain}/*'",
    }


def _cells(row: pd.Series, seeds: int) -> list[tuple[str, str]]:
    show = lambda value: f"{value:.0f}" if seeds == 1 else f"{value:.1f}"
    sign = "+" if row["net"] > 0 else numbers.MINUS if row["net"] < 0 else ""
    return [
        (show(row["lost"]), f"{numbers.percent(row['lost'] / row['right'])} % of the right" if row["right"] else ""),
        (show(row["gained"]), ""),
        (sign + show(abs(row["net"])), ""),
        (f"{numbers.percent(row['churn'] / row['n'])} %", f"of {row['n']:,.0f}"),
    ]


def _sentences(totals: pd.DataFrame, shared: pd.DataFrame) -> list[str]:
    said = []
    worst = totals.loc[totals["lost"].idxmax()]
    if worst["lost"]:
        said.append(
            f"On the retention tasks that count {worst.name} lost most right answers, {worst['lost']:.0f} of {worst['right']:.0f}, "
            f"and gained {worst['gained']:.0f} others: a score shows only the difference."
        )
    between = shared[shared["method_a"] != shared["method_b"]].dropna(subset=["ratio"]) if len(shared) else shared
    if len(between):
        low, high = (numbers.times(end).removeprefix("×") for end in (between["ratio"].min(), between["ratio"].max()))
        span = low if low == high else f"{low} to {high}"
        more = int((between["deviations"] > SURE).sum())
        alike = "all pairs are" if more == len(between) else f"{more} of {len(between)} pairs are"
        said.append(
            f"Two methods share {span} times as many lost answers as independent draws would; {alike} beyond chance "
            f"(by more than {SURE:g} standard deviations)."
        )
    seeds = shared[shared["method_a"] == shared["method_b"]].dropna(subset=["ratio"]) if len(shared) else shared
    if len(seeds):
        each = ", ".join(f"{row.method_a} {numbers.times(row.ratio)}" for row in seeds.itertuples())
        said.append(f"Two seeds of one method: {each}.")
    return said
