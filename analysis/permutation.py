"""Paired tests between every method and its base, and between every two methods of one (model, domain).

The statistic is the reported number, so that test and table speak of the same thing. Under the null hypothesis an item's difference is as
likely the other way round: signs are flipped by item. An item is its mean over seeds, so p is about these runs on other items; what other
seeds would do is in the interval beside it, and `sentence` says which of the two a finding rests on.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from analysis.intervals import by_run, of_arrays, paired, refuse_unequal
from analysis.load import Loaded
from analysis.tables import retention_tasks

FLIPS = 10_000
SEED = 0  # of the flips: the same for every test, so that one more method changes no other's p
LEVEL = 0.05
FEWEST = 6  # items that must all change the same way before any sign-flip p is below 5 %: 2 / 2^6 = .031
KINDS = ("gain", "forgetting")
COLUMNS = ["kind", "a", "b", "difference", "low", "high", "p", "p_holm", "detectable", "n", "items_differing", "seeds", "scope"]


def sign_flip(tasks: Sequence[np.ndarray], *, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p of the mean over tasks of each task's mean difference, by flipping the signs of items (Fisher's randomisation test).

    tasks: one array (n_t items,) of differences a task, each the item's mean over seeds. p = (1 + #{|T*| >= |T|}) / (1 + flips), which is
    never 0 (Phipson and Smyth 2010). Items of one task and one size of difference are drawn together: the number of their positive signs is
    binomial, which is the same distribution for a small part of the work. With one task and one seed this is McNemar's exact test.
    """
    draw = np.random.default_rng(seed)
    drawn, statistic = np.zeros(flips), 0.0
    for differences in tasks:
        weight = 1 / (len(tasks) * len(differences))
        statistic += weight * float(differences.sum())
        sizes, counts = np.unique(np.round(np.abs(differences[differences != 0]), 12), return_counts=True)
        for size, count in zip(sizes, counts):
            drawn += weight * size * (2.0 * draw.binomial(count, 0.5, size=flips) - count)
    reached = np.abs(drawn) >= abs(statistic) - 1e-9  # equal up to rounding is as extreme
    return float((1 + reached.sum()) / (1 + flips))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of a family of p-values (Holm 1979): max over the smaller ones of (m - rank + 1) p, at most 1."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    raised = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    corrected = np.empty_like(raised)
    corrected[order] = raised
    return corrected


def all_tests(loaded: Loaded) -> pd.DataFrame:
    """`tests_of` every comparison, below each other, `model` and `domain` first."""
    rows = [tests_of(loaded, model=model, domain=domain).assign(model=model, domain=domain) for model, domain in loaded.comparisons]
    return pd.concat(rows, ignore_index=True)[["model", "domain", *COLUMNS]] if rows else pd.DataFrame(columns=["model", "domain", *COLUMNS])


def tests_of(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """Every test of one comparison, a row each (COLUMNS); first against the base, then between methods. Empty where there are no items.

    kind             gain: a's domain score minus b's; forgetting: a's minus b's. Positive: a learned more, a forgot more
    b                "base" or a method; two methods are compared on the seeds both have, or not at all where they share none
    difference, low, high   shares of 1; the bounds from the crossed interval
    detectable       Interval.detectable, but no less than FEWEST items of the largest task: with fewer the test cannot find anything
    p, p_holm        sign-flip p, and corrected over all methods x kinds: one family against the base, one between methods
    n, items_differing   items of the tasks that count, and how many of them differ in their mean over seeds
    seeds, scope     number of seeds, and what low, high and detectable are about: "run" or "method"

    Raises UserError where a cell was not scored on the base's rows of the tasks that count.
    """
    found = _wide(loaded, model=model, domain=domain)
    if found is None:
        return pd.DataFrame(columns=COLUMNS)
    pairs, cells, counted = found
    methods = list(dict.fromkeys(cells["method"]))
    families = ([(a, "base") for a in methods], [(a, b) for i, a in enumerate(methods) for b in methods[i + 1:]])
    rows = []
    for family in families:
        tested = [_row(pairs, cells, kind=kind, a=a, b=b, tasks=tasks) for a, b in family for kind, tasks in counted.items()]
        tested = [row for row in tested if row is not None]
        rows += [row | {"p_holm": float(p)} for row, p in zip(tested, holm([row["p"] for row in tested]))]
    return pd.DataFrame(rows, columns=COLUMNS)


def mcnemar(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """Right answers lost and gained against the base by method, seed and task, with McNemar's exact p: description, uncorrected.

    Columns method, seed, task, role, n, lost, gained, p. Tasks whose items are not scored 0 or 1 are left out. p is two-sided, of `lost`
    in lost + gained at one half (McNemar 1947); 1 where no item changed. Empty where there are no items.
    """
    columns = ["method", "seed", "task", "role", "n", "lost", "gained", "p"]
    found = _wide(loaded, model=model, domain=domain)
    if found is None:
        return pd.DataFrame(columns=columns)
    pairs, cells, _ = found
    rows = []
    for name, cell in cells.iterrows():
        for task, about in cell["scores_by_task"].items():
            own = pairs[pairs["task"] == task]
            before, after = own["base"], own[name]
            if len(own) and before.isin((0, 1)).all() and after.isin((0, 1)).all():
                lost, gained = int((before > after).sum()), int((before < after).sum())
                rows.append((cell["method"], cell["seed"], task, about["role"], len(own), lost, gained, exact(lost, gained)))
    return pd.DataFrame(rows, columns=columns)


def exact(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p of `lost` against `gained` items."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _wide(loaded: Loaded, *, model: str, domain: str):
    """All cells' items beside the base's, the cells, and the tasks that count by kind; None where items are not there."""
    cells = loaded.of(model, domain) if len(loaded.cells) else loaded.cells
    base = loaded.base.get(model, {}).get("items", pd.DataFrame())
    if base.empty or cells.empty or loaded.items.empty:
        return None
    tuned = loaded.items[loaded.items["cell"].isin(cells.index)]
    if tuned["cell"].nunique() < len(cells):
        return None
    first = cells.iloc[0]
    counted = {"gain": [domain], "forgetting": retention_tasks(first)}
    counted = {kind: tasks for kind, tasks in counted.items() if tasks and all(first["n"].get(task) for task in tasks)}
    refuse_unequal(base=base, tuned=tuned, tasks=[task for task in first["scores_by_task"] if first["n"].get(task)])
    return paired(base, tuned), cells, counted


def _row(pairs: pd.DataFrame, cells: pd.DataFrame, *, kind: str, a: str, b: str, tasks: list[str]) -> dict | None:
    shared = sorted(set.intersection(*(set(cells.loc[cells["method"] == method, "seed"]) for method in (a, b) if method != "base")))
    if not shared:
        return None
    sign = 1.0 if kind == "gain" else -1.0
    scores = lambda method, rows: rows["base"].to_numpy(dtype=float) if method == "base" else by_run(rows[_columns(cells, method, shared)])
    own = [pairs[pairs["task"] == task] for task in tasks]
    differences = [sign * (scores(a, rows) - scores(b, rows)) for rows in own]
    means = [by_seed.mean(axis=0) for by_seed in differences]
    found = of_arrays(differences)
    least = FEWEST / (len(tasks) * max(map(len, means)))
    return {
        "kind": kind, "a": a, "b": b, "difference": found.value, "low": found.low, "high": found.high, "p": sign_flip(means),
        "detectable": None if found.detectable is None else max(found.detectable, least), "n": found.n,
        "items_differing": int(sum((np.abs(item) > 1e-12).sum() for item in means)), "seeds": found.seeds, "scope": found.scope,
    }  # fmt: skip


def _columns(cells: pd.DataFrame, method: str, seeds: list[int]) -> list[str]:
    """The cells of a method in the order of `seeds`, so that two methods are compared seed by seed."""
    by_seed = {cell["seed"]: name for name, cell in cells[cells["method"] == method].iterrows()}
    return [by_seed[seed] for seed in seeds]
