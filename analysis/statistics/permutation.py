"""Paired tests between every method and its base, and between every two methods of one (model, domain).

The statistic is the reported number, so that test and table agree. Under the null hypothesis an item's difference could
equally well have the other sign, so signs are flipped by item. An item is its mean over seeds: p is about these runs on
other items; what other seeds would change is in the interval beside it.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, gcd, lcm, log2

import numpy as np
import pandas as pd
from scipy.stats import binom, binomtest, norm

from analysis import units
from analysis.load import Loaded, retention_tasks
from analysis.measures import NATS, Measure
from analysis.statistics.intervals import Interval, by_run, of_arrays, paired, refuse_unequal
from analysis.statistics.nats import Change, Changes

FLIPS = 100_000  # drawn if the exact p would take too long; the smallest p still survives a correction for 5,000 tests
SEED = 0  # of the flips: the same for every test, so that one more method does not change the others' p
MOST_SEEDS = 1000  # an item's mean over seeds is a fraction with at most this denominator, or its scores are not 0 or 1
MOST_WORK = 2e8  # additions of an exact p, well under a second
AT_ONCE = 4_000_000  # signs held at a time
LEVEL = 0.05
POWER = 0.8
TESTED = ["kind", "a", "b", "difference", "low", "high", "p", "p_holm", "detectable"]
BySeed = dict[str, dict[int, str]]  # method -> seed -> cell
COLUMNS = [*TESTED, "n", "items_differing", "seeds", "scope", "unit"]


def sign_flip(tasks: Sequence[np.ndarray], *, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p of the mean over tasks of each task's mean difference, by flipping the signs of items.

    tasks: one array (n_t items,) of differences per task, each the item's mean over seeds. p is the share of all
    patterns of signs with |T*| ≥ |T| (Fisher's randomisation test); with one task and one seed it is McNemar's exact
    test. It is exact if all differences are whole multiples of one unit, as for answers scored 0 or 1; else `flips`
    patterns are drawn and p = (1 + #{|T*| ≥ |T|}) / (1 + flips), which is never 0 (Phipson and Smyth 2010). Items of
    one task with the same size of difference are grouped: the number of their positive signs is binomial.
    """
    groups = [group for differences in tasks for group in _groups(differences)]
    whole = _whole(groups)
    if whole is not None:
        return _exact(whole, [(up, down) for _, _, up, down in groups])
    draw = np.random.default_rng(seed)
    drawn, statistic = np.zeros(flips), 0.0
    for size, n, up, down in groups:
        statistic += size / n * (up - down)
        drawn += size / n * (2.0 * draw.binomial(up + down, 0.5, size=flips) - (up + down))
    reached = np.abs(drawn) >= abs(statistic) - 1e-9  # equal up to rounding counts as extreme
    return float((1 + reached.sum()) / (1 + flips))


def sign_flips(tasks: Sequence[np.ndarray], *, flips: int = FLIPS, seed: int = SEED) -> np.ndarray:
    """`sign_flip` of K tests of measured numbers at once, whose sizes all differ, so that every p is drawn.

    tasks: one array (n_t items, K tests) of differences per task. One pattern of signs serves all K tests, so that they
    are as dependent as the differences are. Returns (K,).
    """
    values = np.concatenate([differences / len(differences) for differences in tasks])
    values = (values / np.abs(values).max(axis=0).clip(min=1e-300)).astype(np.float32)
    draw, total = np.random.default_rng(seed), values.sum(axis=0)
    least = np.abs(total) * (1 - 1e-5)  # equal up to rounding counts as extreme
    reached, at_once = np.zeros(values.shape[1]), max(1, AT_ONCE // len(values))
    for start in range(0, flips, at_once):
        bits = draw.integers(0, 256, (min(at_once, flips - start), -(-len(values) // 8)), dtype=np.uint8)
        positive = np.unpackbits(bits, axis=1, count=len(values)).astype(np.float32)
        reached += (np.abs(2 * positive @ values - total) >= least).sum(axis=0)
    return (1 + reached) / (1 + flips)


def could_find(*, items: float, whole: float, fewest: float, tests: int) -> float:
    """The true difference that the test finds in 80 of 100 studies, at the first step of Holm's correction.

    z(1 − .05 / (2 tests)) · items + z(.8) · whole, with the standard errors `items` of items alone, which the test
    uses, and `whole` of everything that another study would draw. At least `fewest`, the share of one item, times the
    number of items that must all change the same way before any p is small enough: 2 / 2^k ≤ .05 / tests.
    """
    difference = norm.ppf(1 - LEVEL / (2 * tests)) * items + norm.ppf(POWER) * whole
    return float(max(difference, fewest * ceil(log2(2 * tests / LEVEL))))


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down correction of p-values (Holm 1979): the running maximum of (m − rank + 1) p, at most 1."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    raised = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    corrected = np.empty_like(raised)
    corrected[order] = raised
    return corrected


def all_tests(loaded: Loaded) -> pd.DataFrame:
    """`tests_of` every comparison, with `model` and `domain` as first columns."""
    columns = ["model", "domain", *COLUMNS]
    rows = [tests_of(loaded, model=m, domain=d).assign(model=m, domain=d) for m, d in loaded.comparisons]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)


def tests_of(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """Every test of one comparison, one row each (COLUMNS), first against the base, then between methods.

    kind             gain: a's domain score − b's; forgetting, or a measure in nats by its key (analysis/measures.py):
                     a's − b's. Positive means that a learned, or forgot, more
    b                "base" or a method; two methods are compared on the seeds that both have, if any
    difference, low, high   in `unit` (shares of 1, or nats), with the bounds of the crossed interval
    detectable       the true difference that the test finds in 80 of 100 studies after the correction (`could_find`)
    p, p_holm        sign-flip p, raw and corrected, against the base and between methods: gain and forgetting together
                     over all methods × kinds, each measure in nats over all methods
    n, items_differing   items of the tasks that count, and how many of them differ in their mean over seeds
    seeds, scope     number of seeds, and what low, high and detectable are about: "run" or "method"

    A gain in a metric of the whole set (analysis/units.py) has no rows to flip and is left out, and so is a cell
    without items. A divergence is tested between methods only: from itself the base's is 0, and every other's is more.
    Raises UserError if a cell was not scored on the base's rows of the tasks that count.
    """
    wide = _wide(loaded, model=model, domain=domain)
    if wide is None:
        return pd.DataFrame(columns=COLUMNS)
    pairs, cells, counted = wide
    methods = list(dict.fromkeys(cells["method"]))
    families = ([(a, "base") for a in methods], [(a, b) for i, a in enumerate(methods) for b in methods[i + 1 :]])
    rows, changes, first = [], Changes(loaded, cells), cells.iloc[0]
    by_seed = {method: dict(zip(own["seed"], own.index)) for method, own in cells.groupby("method")}
    items = {kind: [pairs[pairs["task"] == task] for task in tasks] for kind, tasks in counted.items()}
    unit = {"gain": units.of_domain(first), "forgetting": units.SHARE}
    tokens = changes.tokens_of(domain) if units.per_token(first, domain) else None
    for family in families:
        each = ((a, b, kind) for a, b in family for kind in counted)
        every = (_row(items[k], by_seed, kind=k, a=a, b=b, unit=unit[k], tokens=tokens) for a, b, k in each)
        tested = list(filter(None, every))
        for row, p in zip(tested, holm([row["p"] for row in tested])):
            errors = row.pop("errors")
            rows.append(row | {"p_holm": float(p), "detectable": errors and could_find(**errors, tests=len(tested))})
    for measure in NATS:
        rows += _in_nats(changes, by_seed, measure, families)
    return pd.DataFrame(rows, columns=COLUMNS)


def mcnemar(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """Right answers lost and gained against the base by method, seed and task, with McNemar's exact p, not corrected.

    Columns method, seed, task, role, n, lost, gained, p. Tasks whose items are not scored 0 or 1 are left out. p is
    two-sided, of `lost` in lost + gained at one half (McNemar 1947), and 1 if no item changed.
    """
    columns = ["method", "seed", "task", "role", "n", "lost", "gained", "p"]
    wide = _wide(loaded, model=model, domain=domain)
    if wide is None:
        return pd.DataFrame(columns=columns)
    pairs, cells, _ = wide
    rows = []
    for name, cell in cells.iterrows():
        for task, about in cell["scores_by_task"].items():
            own = pairs[pairs["task"] == task]
            before, after = own["base"], own[name]
            if about.get("subtasks"):  # an item's score is its part in the mean
                before, after = (before > 0) * 1, (after > 0) * 1
            if len(own) and before.isin((0, 1)).all() and after.isin((0, 1)).all():
                lost, gained = int((before > after).sum()), int((before < after).sum())
                counts = (len(own), lost, gained, exact(lost, gained))
                rows.append((cell["method"], cell["seed"], task, about["role"], *counts))
    return pd.DataFrame(rows, columns=columns)


def exact(lost: int, gained: int) -> float:
    """McNemar's exact two-sided p of `lost` against `gained` items."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def _wide(loaded: Loaded, *, model: str, domain: str):
    """Items of cells and base side by side, the cells with items, and the counting tasks by kind; None without."""
    cells, base = loaded.of(model, domain), loaded.base_items(model)
    if base.empty or cells.empty or loaded.items.empty:
        return None
    tuned = loaded.items_of(cells)
    cells = cells[cells.index.isin(tuned["cell"])]
    if cells.empty:
        return None
    first = cells.iloc[0]
    counted = {"gain": [domain] if units.per_item(first, domain) else [], "forgetting": retention_tasks(first)}
    counted = {kind: tasks for kind, tasks in counted.items() if tasks and all(first["n"].get(task) for task in tasks)}
    refuse_unequal(base=base, tuned=tuned, tasks=[task for task in first["scores_by_task"] if first["n"].get(task)])
    return paired(base, tuned), cells, counted


def _row(
    own: list[pd.DataFrame], by_seed: BySeed, *, kind: str, a: str, b: str, unit: str, tokens: np.ndarray | None
) -> dict | None:
    """One test; with `tokens` of the domain's rows the gain is a mean over them, and its interval is a ratio's."""
    shared = _shared(by_seed, a, b)
    if not shared:
        return None
    sign, step = 1.0 if kind == "gain" else -1.0, units.step(unit)

    def scores(method: str, rows: pd.DataFrame) -> np.ndarray:
        if method not in by_seed:
            return rows["base"].to_numpy(dtype=float)
        return by_run(rows[[by_seed[method][seed] for seed in shared]])

    differences = [sign * (scores(a, rows) - scores(b, rows)) for rows in own]
    means = [seeds.mean(axis=0) for seeds in differences]
    if kind == "gain" and tokens is not None:  # a row's part is n · change / Σ tokens
        change = Change(tasks=[differences[0] * tokens.sum() / len(tokens)], tokens=tokens)
        whole, items = change.interval, change.over_seeds().interval
    else:
        whole, items = of_arrays(differences, step=step), of_arrays([mean[None] for mean in means], step=step)
    one = step / (len(means) * max(map(len, means)))
    about = _about(kind, a, b, unit=unit, whole=whole, items=items, fewest=one, means=means)
    return about | {"p": sign_flip(means)}


def _shared(by_seed: BySeed, a: str, b: str) -> list[int]:
    """The seeds of a that b has too, if b is a method: they are compared seed by seed."""
    return sorted(set(by_seed[a]) & set(by_seed.get(b, by_seed[a])))


def _in_nats(changes: Changes, by_seed: BySeed, measure: Measure, families: Sequence) -> list[dict]:
    """The tests of one measure in nats, each family corrected by Holm's method in itself."""
    compared: list[tuple[str, str, Change]] = []
    for a, b in (pair for family in families for pair in family):
        shared = _shared(by_seed, a, b)
        if not shared or (b == "base" and not measure.signed):
            continue
        change = changes.of(measure, [by_seed[a][seed] for seed in shared])
        if change is None:
            return []
        other = changes.of(measure, [by_seed[b][seed] for seed in shared]) if b != "base" else None
        compared.append((a, b, change if other is None else change - other))
    if not compared:
        return []
    means = [[part.mean(axis=0) for part in change.parts] for _, _, change in compared]
    p = sign_flips([np.stack(task, axis=1) for task in zip(*means)])
    with_base = np.array([b == "base" for _, b, _ in compared])
    corrected = np.empty_like(p)
    for family in (with_base, ~with_base):
        corrected[family] = holm(p[family])
    rows = []
    for k, (a, b, change) in enumerate(compared):
        whole, items = change.interval, change.over_seeds().interval
        row = _about(measure.key, a, b, unit=measure.unit, whole=whole, items=items, fewest=0.0, means=means[k])
        errors, tests = row.pop("errors"), int((with_base == with_base[k]).sum())
        found = errors and could_find(**errors, tests=tests)
        rows.append(row | {"p": float(p[k]), "p_holm": float(corrected[k]), "detectable": found})
    return rows


def _about(
    kind: str, a: str, b: str, *, unit: str, whole: Interval, items: Interval, fewest: float, means: list[np.ndarray]
) -> dict:
    """A test's row without its p: `whole` covers what another study would draw, `items` other items alone."""
    return {
        "kind": kind,
        "a": a,
        "b": b,
        "difference": whole.value,
        "low": whole.low,
        "high": whole.high,
        "errors": None if whole.error is None else {"items": items.error, "whole": whole.error, "fewest": fewest},
        "n": whole.n,
        "items_differing": int(sum((np.abs(item) > 1e-12).sum() for item in means)),
        "seeds": whole.seeds,
        "scope": whole.scope,
        "unit": unit,
    }


def _groups(differences: np.ndarray) -> list[tuple[float, int, int, int]]:
    """Items by size of difference: the size, the task's number of items, how many are positive and negative."""
    differences = np.round(differences, 12)
    sizes = np.unique(np.abs(differences[differences != 0]))
    counts = [(int((differences == size).sum()), int((differences == -size).sum())) for size in sizes]
    return [(float(size), len(differences), up, down) for size, (up, down) in zip(sizes, counts)]


def _whole(groups: list[tuple[float, int, int, int]]) -> list[int] | None:
    """Each group's weight of an item in multiples of one unit; None without one, or if exact p takes too long."""
    sizes = [Fraction(size).limit_denominator(MOST_SEEDS) for size, *_ in groups]
    if any(abs(float(fraction) - size) > 1e-9 for fraction, (size, *_) in zip(sizes, groups)):
        return None
    weights = [fraction / n for fraction, (_, n, *_) in zip(sizes, groups)]
    unit = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * unit) for weight in weights]
    whole = [weight // gcd(*whole) for weight in whole]
    counts = [up + down for _, _, up, down in groups]
    return whole if sum(counts) * sum(weight * count for weight, count in zip(whole, counts)) <= MOST_WORK else None


def _exact(weights: list[int], counts: list[tuple[int, int]]) -> float:
    """The share of patterns of signs whose sum is at least as far from 0, by the distribution of the positive sum."""
    chance = np.ones(1)
    for weight, (up, down) in zip(weights, counts):
        wider = np.zeros(len(chance) + weight * (up + down))
        for k, share in enumerate(binom.pmf(np.arange(up + down + 1), up + down, 0.5)):
            wider[k * weight : k * weight + len(chance)] += share * chance
        chance = wider
    statistic = sum(weight * (up - down) for weight, (up, down) in zip(weights, counts))
    return min(1.0, float(chance[np.abs(2 * np.arange(len(chance)) - (len(chance) - 1)) >= abs(statistic)].sum()))
