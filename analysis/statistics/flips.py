"""Which right answers a method lost, which it gained, and whether methods lose the same ones.

An item is lost if the base is right and the tuned model wrong, and gained the other way round. Lost and gained answers
cancel in a score: net = gained − lost, churn = gained + lost. Two cells that lose n_a and n_b of the n items of a task
that the base has right, each by an independent draw, would share n_a·n_b/n of them on average, with the hypergeometric
variance n_a n_b (n − n_a)(n − n_b) / (n² (n − 1)); the tasks are drawn independently and added up.

**Corrected for chance.** A model that guesses gets some answers right and loses them when it guesses again, although it
has forgotten nothing. Assume, as any correction for guessing does, that on an item either the model knows the answer
and gives it, or it guesses, each of the c choices with probability 1/c; and that of the items on which base and tuned
model both guess, a share r is guessed anew, independently, while the others keep the base's guess. Of u such items

    r u (1/c)(1 − 1/c)     are lost by guessing, and as many are gained
    u (1 − 1/c)(1 − r/c)   are wrong in both
    r u (1 − 1/c)(1 − 2/c) are wrong in both with another choice than before

and no item of which one of the models knows the answer is wrong in both. So what guessing loses can be counted among
the answers that are wrong in both, without knowing what the models know:

    c > 2   1 / (c − 2) for each with another choice: the same expectation, whatever r is
    c = 2   r / (2 − r) for each, with the cell's r from items of more choices, as Σ A / Σ B: A = c² / ((c − 1)(c − 2))
            for each with another choice has the expectation r u, and B = c / (c − 1) for each that is wrong in both,
            plus A / c, the expectation u. These items are of tasks that count in forgetting, or if they have none, of
            all tasks but the domain, on which a model guesses anew more often

Lost less what guessing would lose is `lost_known`, gained less the same `gained_known`; their difference is the net of
the raw counts. Both can fall below 0 by chance. With r = 1 instead (two independent guesses) what guessing would lose
exceeds what is lost at all many times over: a fine-tuned model keeps most of its base's guesses.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd

from analysis import units
from analysis.load import Loaded, retention_tasks
from analysis.statistics.intervals import KEYS

LISTED = 10  # of the most forgotten questions
EPSILON = 1e-6  # 1 / chance is not exact


def flips(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """One row per (cell, scored item) of one comparison: cell, method, seed, task, role, doc_id, doc_hash, choice, and
    as booleans base, tuned (right answers), lost, gained, counts (whether the task counts in forgetting); and choices,
    the number of choices c, 1 / chance of the task where an item does not list them, and missing without a chance; and
    moved, whether both are wrong with two choices of which both are known, and by_guess, what guessing would lose of
    the item (see above), missing where that is not known.

    An answer is right if its score is above 1/2, in a group above 0, where the score is the item's part in the mean;
    tasks whose metric is not a proportion of right answers are left out.
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
    known = base[[*KEYS, "score", "choice"]].assign(choices=choices(base, scores))
    items = tuned.merge(known, on=KEYS, suffixes=("", "_base"))
    if items.empty:
        return pd.DataFrame()
    bar = items["task"].map({task: 0.0 if scores[task].get("subtasks") else 0.5 for task in roles})
    before, after = items.pop("score_base") > bar, items.pop("score") > bar
    was, now = items.pop("choice_base"), items["choice"]
    items = items.assign(
        method=items["cell"].map(cells["method"]),
        seed=items["cell"].map(cells["seed"]),
        role=items["task"].map(roles),
        counts=items["task"].isin(counting),
        base=before,
        tuned=after,
        lost=before & ~after,
        gained=~before & after,
        moved=~before & ~after & was.notna() & now.notna() & (was != now),
    )
    return items.assign(by_guess=_by_guess(items))


def choices(base: pd.DataFrame, scores: Mapping[str, Mapping]) -> pd.Series:
    """The number of choices of each item: of those it lists, or 1 / chance of its task, infinite without chance."""
    listed = base["choices"].str.count(";") + 1 if "choices" in base else pd.Series(np.nan, index=base.index)
    chance = base["task"].map({task: about.get("chance") for task, about in scores.items()}).astype(float)
    return listed.astype(float).where(listed > 1, 1 / chance.where(chance != 0, np.nan)).where(chance != 0, np.inf)


def _by_guess(items: pd.DataFrame) -> pd.Series:
    """What guessing would lose of each item, in expectation over the items of its task."""
    c, wrong = items["choices"], ~items["base"] & ~items["tuned"]
    many = (c > 2 + EPSILON) & np.isfinite(c)
    anew = (items["moved"] & many) * c**2 / ((c - 1) * (c - 2)).where(many)
    guessed = (wrong & many) * (c / (c - 1)).where(many) + anew / c
    near = items["counts"] if (many & items["counts"]).any() else items["role"] != "domain"
    cells = items["cell"].where(near)
    share = anew.groupby(cells).sum() / guessed.groupby(cells).sum().replace(0, np.nan)
    r = items["cell"].map(share.clip(upper=1.0))
    of_two = (wrong * r / (2 - r)).where((c - 2).abs() <= EPSILON)
    return (items["moved"] / (c - 2).where(many)).where(many, of_two).where(np.isfinite(c) | c.isna(), 0.0)


def by_task(items: pd.DataFrame) -> pd.DataFrame:
    """One row per (task, method): role, counts, n items, right (the base's), lost, gained, by_guess, net, churn,
    lost_known and gained_known, which are lost and gained less by_guess, missing where that is not known.

    The counts of items are means over the seeds.
    """
    same = {"role": ("role", "first"), "counts": ("counts", "first")}
    sums = {"n": ("base", "size"), "right": ("base", "sum"), "lost": ("lost", "sum"), "gained": ("gained", "sum")}
    grouped = items.groupby(["task", "method", "cell"], sort=False)
    each = grouped.agg(**same, **sums).assign(by_guess=grouped["by_guess"].sum(min_count=1))
    each["by_guess"] = each["by_guess"].where(grouped["by_guess"].count() == each["n"])
    averages = {key: (key, "mean") for key in (*sums, "by_guess")}
    means = each.groupby(["task", "method"], sort=False, as_index=False).agg(**same, **averages)
    lost, gained, guessed = means["lost"], means["gained"], means["by_guess"]
    return means.assign(
        net=gained - lost, churn=gained + lost, lost_known=lost - guessed, gained_known=gained - guessed
    )


def total(tasks: pd.DataFrame) -> pd.DataFrame:
    """`by_task` added up by method over the tasks that count in forgetting."""
    counts = ["n", "right", "lost", "gained", "by_guess", "lost_known", "gained_known", "net", "churn"]
    return tasks[tasks["counts"]].groupby("method", sort=False)[counts].sum(min_count=1, skipna=False)


def pairs(items: pd.DataFrame) -> pd.DataFrame:
    """One row per pair of cells: how many lost items they share in the tasks that count, and how many by chance.

    a, b, method_a, method_b, lost_a, lost_b, both, union, expected and variance (of `both` under independent draws).
    """
    counted = items[items["counts"] & items["base"]]
    lost = counted.pivot(index=["task", "doc_id", "doc_hash"], columns="cell", values="lost")
    lost = lost[[cell for cell in dict.fromkeys(items["cell"]) if cell in lost]].dropna().astype(bool)
    methods = items.drop_duplicates("cell").set_index("cell")["method"]
    task = lost.index.get_level_values("task")
    n, each = lost.groupby(task).size().to_numpy(), lost.groupby(task).sum()
    once = {cell: (lost[cell].to_numpy(), each[cell].to_numpy()) for cell in lost}  # pandas is slow in a loop of pairs
    rows = []
    for a, b in combinations(lost.columns, 2):
        (lost_a, first), (lost_b, second) = once[a], once[b]
        both = int((lost_a & lost_b).sum())
        variance = first * second * (n - first) * (n - second) / (n**2 * (n - 1).clip(min=1))
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
