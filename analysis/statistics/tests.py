"""The tests of a study: each method against the base and against plain fine-tuning, leaders in pairs, compositions.

Differences, intervals and p values are of one model (contrasts.py). Of each measure, over all settings of one (model,
domain), Holm's correction is made in each of these families by itself:

    base          every method against the base
    full          every method against plain fine-tuning
    leaders       every two leaders (`leaders:` of params.yaml)
    compositions  every composition against all single methods, controls included, at the same setting at once
    equal_gain    the same, each pair at the largest gain that both reach with any of their settings (matched.py)

The chosen setting of a method is compared with the chosen ones of the others, any other setting at the same one.

A composition is said to forget less only if it does so against every single method, each at .05: the
intersection-union test (Berger 1982), whose p is the largest of them and needs no correction for their number. Each p
is the two-sided one, or 1 where the composition does not forget less: then, before Holm's correction, the claim stands
if and only if all 95 % intervals lie below 0.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis import parallel
from analysis.families import family
from analysis.load import Loaded
from analysis.measures import FORGETTING, KL, ORDER
from analysis.roles import PLAIN
from analysis.statistics.contrasts import BASE, Contrasts, Pair, redrawn
from analysis.statistics.detectable import detectable, holm
from analysis.statistics.intervals import Interval
from analysis.statistics.matched import equal_gain
from analysis.statistics.resample import Resampled

TESTED = ["measure", "a", "b", "family", "difference", "low", "high", "p", "p_holm", "df"]
COLUMNS = ["model", "domain", *TESTED, "seeds", "items", "detectable", "descriptive", "p_run"]


def all_tests(loaded: Loaded) -> pd.DataFrame:
    """`paired_tests` every comparison."""
    rows = parallel.each(lambda model, domain: paired_tests(loaded, model=model, domain=domain), loaded.comparisons)
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=COLUMNS)


def paired_tests(loaded: Loaded, *, model: str, domain: str) -> pd.DataFrame:
    """Every test of one comparison, one row each.

    measure                 of analysis/measures.py, in nats or in shares of 1; a's − b's, and b may be "base"
    family                  base, full, leaders or compositions
    difference, low, high   with its 95 % interval, not corrected
    p, p_holm, df           two-sided p by t with df degrees of freedom, raw and corrected within measure and family
    seeds, items            the number of seeds that both have, and of items
    detectable              the true difference that 80 of 100 such studies find at the first step of the correction
    descriptive             one seed: the interval covers other items, not other seeds, and there is no p
    p_run                   of one seed, the sign-flip p over its items: it describes this run, not the method

    Of a composition b is the single method from which it is told apart least. A divergence is not tested against the
    base, which has none from itself. Raises UserError if a cell was not scored on the base's rows.
    """
    contrasts, rows, made = Contrasts(loaded, model=model, domain=domain), [], None
    first = contrasts.cells.iloc[0]
    contrasts.changes.refuse_unequal([task for task in first["scores_by_task"] if first["n"].get(task)])
    for key in ORDER:
        for name, pairs in _families(contrasts, loaded).items():
            if name == BASE and key == KL.key:
                continue
            rows += _rows(key, name, found := contrasts.of(key, list(pairs)))
            if one := [pair for pair, interval in found.items() if interval.seeds == 1]:
                p = dict(zip(one, contrasts.of_runs(key, one)))
                rows[-len(found) :] = [row | {"p_run": p.get((row["a"], row["b"]))} for row in rows[-len(found) :]]
        if key in FORGETTING and (composed := loaded.roles.composed(contrasts.methods)):
            rows += _compositions(contrasts, composed, key)
            made = made or redrawn(loaded, model=model, domain=domain)
            rows += _at_equal_gain(contrasts, composed, key, made) if made else []
    numbers = ["difference", "low", "high", "p", "p_holm", "df", "detectable", "p_run"]
    table = pd.DataFrame(rows, columns=COLUMNS).assign(model=model, domain=domain)
    return table.astype(dict.fromkeys(numbers, float) | {"descriptive": bool})


def _families(contrasts: Contrasts, loaded: Loaded) -> dict[str, Iterator[Pair]]:
    """The pairs of each family."""
    at, chosen = contrasts.at_settings(), contrasts.chosen
    plain = {setting: next((m for m in methods if m in contrasts.plain), None) for setting, methods in at.items()}
    best = next((m for m in contrasts.plain if m in chosen), None)
    against = {m: best if m in chosen else plain[s] for s, methods in at.items() for m in methods}
    leading = [loaded.roles.leading(methods) for methods in at.values()]
    together = [(a, b) for leaders in leading for i, a in enumerate(leaders) for b in leaders[i + 1 :]]
    picked = [leader for leaders in leading for leader in leaders if leader in chosen]
    together += [(a, b) for i, a in enumerate(picked) for b in picked[i + 1 :]]
    return {
        BASE: ((m, BASE) for methods in at.values() for m in methods),
        PLAIN: ((m, full) for m, full in against.items() if full and m != full),
        "leaders": iter(dict.fromkeys(together)),
    }


def _rows(key: str, family: str, found: dict[Pair, Interval], p: dict[Pair, float] | None = None) -> list[dict]:
    """The rows of a family, with Holm's correction over those of several seeds; `p` in place of the intervals' own."""
    raw = {pair: (p or {}).get(pair, interval.p) for pair, interval in found.items()}
    tested = [pair for pair, value in raw.items() if value is not None]
    corrected = dict(zip(tested, holm([raw[pair] for pair in tested])))
    errors, df = (np.array([getattr(found[pair], name) for pair in tested]) for name in ("error", "df"))
    could = dict(zip(tested, detectable(errors, df, tests=len(tested)))) if tested else {}
    return [
        {
            "measure": key,
            "a": a,
            "b": b,
            "family": family,
            "difference": interval.value,
            "low": interval.low,
            "high": interval.high,
            "p": raw[a, b],
            "p_holm": corrected.get((a, b)),
            "df": interval.df,
            "seeds": interval.seeds,
            "items": interval.n,
            "detectable": could.get((a, b)),
            "descriptive": interval.seeds < 2,
        }
        for (a, b), interval in found.items()
    ]


def _compositions(contrasts: Contrasts, composed: list[str], key: str) -> list[dict]:
    """One row for each composition: its p is the largest against any single method of several seeds."""
    worst, p = {}, {}
    for methods in contrasts.at_settings().values():
        singles = [method for method in methods if method not in composed]
        for a in filter(composed.__contains__, methods):
            found = contrasts.of(key, [(a, b) for b in singles])
            each = {pair: i.p if i.value < 0 else 1.0 for pair, i in found.items() if i.p is not None}
            if each:
                pair = max(each, key=lambda pair: (each[pair], found[pair].value))
                worst[pair], p[pair] = found[pair], each[pair]
    return _rows(key, "compositions", worst, p)


def _at_equal_gain(contrasts: Contrasts, composed: list[str], key: str, made: Resampled) -> list[dict]:
    """One row for each composition's family, by redrawn seeds and items; the error is that of its interval.

    It is NaN where the other gains more at its first setting than the composition ever does: nothing can be found.
    """
    several = {name for name in made.families if made.seeds_of(name) > 1}
    composed = list(dict.fromkeys(map(family, composed)))
    singles = [name for name in made.families if name in several and name not in composed]
    n, worst, p = contrasts.measured(key), {}, {}
    for a in filter(several.__contains__, composed):
        found = {b: equal for b in singles if (equal := equal_gain(made, a, b, key=key)) and equal.p is not None}
        each = {b: equal.p if equal.less else 1.0 for b, equal in found.items()}
        if each and len(each) == len(singles):  # a claim about every single method needs all of them
            b = max(each, key=lambda b: (each[b], found[b].beyond == b, found[b].difference))
            seeds, bounds = min(map(made.seeds_of, (a, b))), (found[b].difference, found[b].low, found[b].high)
            error = np.nan if found[b].beyond == b else found[b].error
            worst[a, b], p[a, b] = Interval(*bounds, n.n, seeds, "method", error, np.inf), each[b]
    return _rows(key, "equal_gain", worst, p)
