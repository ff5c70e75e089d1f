"""Which right answers a method lost, which it gained, and whether methods lose the same ones.

An item is lost if the base is right and the tuned model wrong, and gained the other way round. Lost and gained answers
cancel in a score: net = gained − lost, churn = gained + lost. Two cells that lose n_a and n_b of the n items of a task
that the base has right, each by an independent draw, would share n_a·n_b/n of them on average, with the hypergeometric
variance n_a n_b (n − n_a)(n − n_b) / (n² (n − 1)); the tasks are drawn independently and added up.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from analysis import units
from analysis.load import Loaded, retention_tasks
from analysis.statistics.intervals import KEYS

LISTED = 10  # of the most forgotten questions


def flips(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """One row per (cell, scored item) of one comparison: cell, method, seed, task, role, doc_id, doc_hash, choice, and
    as booleans base, tuned (right answers), lost, gained, counts (whether the task counts in forgetting).

    An answer is right if its score is above 1/2; tasks whose metric is not a proportion of right answers are left out.
    Empty if the items of the base or of all cells are missing.
    """
    base, cells = loaded.base_items(model), loaded.of(model, domain)
    if base.empty or loaded.items.empty or cells.empty:
        return pd.DataFrame()
    first = cells.iloc[0]
    scores = first["scores_by_task"]
    roles = {task: about["role"] for task, about in scores.items() if units.of_task(first, task) == units.SHARE}
    # forgetting is the mean of all retention tasks if the base is above chance on none
    counting = retention_tasks(first) or [task for task, role in roles.items() if role == "retention"]
    tuned = loaded.items_of(cells)
    tuned = tuned.loc[tuned["task"].isin(list(roles)), ["cell", *KEYS, "choice", "score"]]
    items = tuned.merge(base[[*KEYS, "score"]], on=KEYS, suffixes=("", "_base"))
    if items.empty:
        return pd.DataFrame()
    before, after = items.pop("score_base") > 0.5, items.pop("score") > 0.5
    return items.assign(
        method=items["cell"].map(cells["method"]),
        seed=items["cell"].map(cells["seed"]),
        role=items["task"].map(roles),
        counts=items["task"].isin(counting),
        base=before,
        tuned=after,
        lost=before & ~after,
        gained=~before & after,
    )


def by_task(items: pd.DataFrame) -> pd.DataFrame:
    """One row per (task, method): role, counts, n items, right (the base's), lost, gained, net, churn.

    The counts of items are means over the seeds.
    """
    same = {"role": ("role", "first"), "counts": ("counts", "first")}
    sums = {"n": ("base", "size"), "right": ("base", "sum"), "lost": ("lost", "sum"), "gained": ("gained", "sum")}
    each = items.groupby(["task", "method", "cell"], sort=False).agg(**same, **sums)
    averages = {key: (key, "mean") for key in sums}
    means = each.groupby(["task", "method"], sort=False, as_index=False).agg(**same, **averages)
    return means.assign(net=means["gained"] - means["lost"], churn=means["gained"] + means["lost"])


def pairs(items: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of cells: how many lost items they share in the tasks that count, and how many by chance.

    a, b, method_a, method_b, lost_a, lost_b, both, union, expected and variance (of `both` under independent draws).
    """
    counted = items[items["counts"] & items["base"]]
    lost = counted.pivot(index=["task", "doc_id", "doc_hash"], columns="cell", values="lost")
    lost = lost[[cell for cell in dict.fromkeys(items["cell"]) if cell in lost]].dropna().astype(bool)
    methods = items.drop_duplicates("cell").set_index("cell")["method"]
    task = lost.index.get_level_values("task")
    n, each = lost.groupby(task).size(), lost.groupby(task).sum()
    rows = []
    for a, b in combinations(lost.columns, 2):
        first, second = each[a], each[b]
        both = int((lost[a] & lost[b]).sum())
        variance = first * second * (n - first) * (n - second) / (n**2 * (n - 1).clip(lower=1))
        row = {"a": a, "b": b, "method_a": methods[a], "method_b": methods[b]}
        row |= {"lost_a": int(first.sum()), "lost_b": int(second.sum()), "both": both}
        row |= {"union": row["lost_a"] + row["lost_b"] - both}
        rows.append(row | {"expected": float((first * second / n).sum()), "variance": float(variance.sum())})
    return pd.DataFrame(rows)


def overlap(pairs: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """`pairs` added up by methods: one row per pair of methods, and per method with itself if it has several seeds.

    jaccard     shared lost items / items that either lost
    by_chance   the same under independent draws, expected / (lost_a + lost_b − expected)
    ratio       shared lost items / expected ones
    deviations  (shared − expected) / standard deviation under independent draws, the root mean over pairs of cells: the
                pairs of one comparison are not independent, so more pairs are not taken as more evidence
    """
    place = {method: k for k, method in enumerate(methods)}
    records = []
    for (a, b), rows in _ordered(pairs, place).groupby(["method_a", "method_b"], sort=False):
        both, expected, spread = rows["both"].sum(), rows["expected"].sum(), np.sqrt(rows["variance"].mean())
        either, total = rows["union"].sum(), (rows["lost_a"] + rows["lost_b"]).sum()
        record = {"method_a": a, "method_b": b, "pairs": len(rows)}
        record["jaccard"] = both / either if either else np.nan
        record["by_chance"] = expected / (total - expected) if total else np.nan
        record["ratio"] = both / expected if expected else np.nan
        record["deviations"] = (both - expected) / len(rows) / spread if spread else np.nan
        records.append(record)
    return pd.DataFrame(records)


def _ordered(pairs: pd.DataFrame, place: dict[str, int]) -> pd.DataFrame:
    """The earlier method of each pair first."""
    if pairs.empty:
        return pd.DataFrame(columns=["method_a", "method_b"])
    swap = pairs["method_a"].map(place) > pairs["method_b"].map(place)
    names = {f"{key}_{one}": f"{key}_{two}" for key in ("method", "lost") for one, two in ("ab", "ba")}
    return pd.concat([pairs[~swap], pairs[swap].rename(columns=names)], ignore_index=True)


def most_forgotten(items: pd.DataFrame, *, top: int = LISTED) -> pd.DataFrame:
    """The items that most cells lost (at least two, or the only one), of tasks that count: KEYS, lost_by, of, methods.

    Ties are ordered by task and document hash, so that the order of a file does not decide.
    """
    counted = items[items["counts"]]
    lost = counted[counted["lost"]].groupby(KEYS)
    worst = lost.agg(lost_by=("cell", "nunique"), methods=("method", lambda names: list(dict.fromkeys(names))))
    worst = worst.join(counted.groupby(KEYS)["cell"].nunique().rename("of")).reset_index()
    worst = worst[worst["lost_by"] >= min(2, items["cell"].nunique())]
    order = {"by": ["lost_by", "task", "doc_hash"], "ascending": [False, True, True]}
    return worst.sort_values(**order).head(top).reset_index(drop=True)
