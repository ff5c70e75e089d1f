"""The comparison: one row per method, with every reported number and its 95 % interval."""

from functools import partial
from itertools import chain

import numpy as np
import pandas as pd

from analysis import parallel, units
from analysis.load import Loaded, retention_tasks, score_tasks
from analysis.measures import GENERAL, NATS, ORDER
from analysis.statistics.contrasts import BASE, Contrasts
from analysis.statistics.intervals import Interval, of_arrays, of_set, of_shares, perplexity_ratio, wilson
from analysis.statistics.nats import DOMAIN, Changes, intervals_in_nats

COSTS = (
    "seconds_prepare",
    "seconds_train",
    "seconds_evaluate",
    "peak_memory_bytes",
    "bytes_importance",
    "bytes_anchor",
    "bytes_weights_delta",
    "bytes_optimizer_state",
    "tokens_prepare",
    "tokens_added",
    "tokens_trained",
)


def comparison(loaded: Loaded) -> pd.DataFrame:
    """One row per (model, domain, method), the bare base first: shares of 1, seconds, bytes.

    `*_low` and `*_high` are 95 % bounds. Over several seeds every number is the mean, `*_min` and `*_max` its range.
    """
    return pd.DataFrame(chain.from_iterable(parallel.each(partial(_rows, loaded), loaded.comparisons)))


def _rows(loaded: Loaded, model: str, domain: str) -> list[dict]:
    cells, contrasts = loaded.of(model, domain), Contrasts(loaded, model=model, domain=domain)
    methods = [_method_row(loaded, own, contrasts) for _, own in cells.groupby("method", sort=False)]
    return [_base_row(cells.iloc[0]), *methods]


def _about(first: pd.Series, *, method: str, seeds: int) -> dict:
    domain, n = first["domain"], first["n"]
    return {
        "model": first["model"],
        "domain": domain,
        "method": method,
        "unit": units.of_domain(first),
        "metric": units.metric_of(first, domain),
        "seeds": seeds,
        "n_domain": n.get(domain, 0),
        "n_retention": sum(n[task] for task in retention_tasks(first)),
    }


def _base_row(first: pd.Series) -> dict:
    return {
        **_about(first, method="base", seeds=0),
        **_bounds("domain_score", _domain_score(first, first["domain_score_base"])),
        "domain_gain": 0.0,
        "domain_bits_per_byte": first.get("domain_bits_per_byte_base"),
        **dict.fromkeys((measure.key for measure in NATS), 0.0),
        "forgetting": 0.0 if retention_tasks(first) else None,
        "general_score": first["general_score_base"],
        "perplexity": first["general_perplexity_base"],
        "perplexity_ratio": 1.0,
    }


def _method_row(loaded: Loaded, cells: pd.DataFrame, contrasts: Contrasts) -> dict:
    first = cells.iloc[0]

    def mean(key: str) -> float | None:
        return mean_if_known(cells[key]) if key in cells else None

    by_items = item_intervals(loaded, cells, contrasts.changes)
    if by_items and len(cells) > 1:
        by_items |= _of_the_model(contrasts, first["method"])
    score = by_items.get("domain_score") or _domain_score(first, mean("domain_score"))
    ratio = mean("general_perplexity") / first["general_perplexity_base"] if mean("general_perplexity") else None
    if len(cells) > 1 and "perplexity_ratio" in by_items:
        ratio = None  # the interval's own centre is the geometric mean
    stored = (mean("bytes_importance"), mean("bytes_anchor"))
    row = {
        **_about(first, method=first["method"], seeds=len(cells)),
        **_bounds("domain_score", score),
        **_bounds("domain_gain", by_items.get("domain_gain"), mean("domain_gain")),
        **_bounds(DOMAIN, by_items.get(DOMAIN), mean(DOMAIN)),
        "domain_bits_per_byte": mean("domain_bits_per_byte"),
        **_score_tasks(cells, by_items),
        **{key: value for m in NATS for key, value in _bounds(m.key, by_items.get(m.key), mean(m.key)).items()},
        "general_bits_per_byte_lost": mean("general_bits_per_byte_lost"),
        **_bounds("forgetting", by_items.get("forgetting"), mean("forgetting")),
        "general_score": mean("general_score"),
        "perplexity": mean("general_perplexity"),
        **_bounds("perplexity_ratio", by_items.get("perplexity_ratio"), ratio),
        **{key: mean(key) for key in COSTS},
        "bytes_stored": None if None in stored else sum(stored),
        **_apart(cells),
        "cost_known": bool(cells["cost_known"].all()) if "cost_known" in cells else True,
        "note": _note(cells),
    }
    if len(cells) > 1:
        for key in ("domain_score", "domain_gain", "forgetting", *(measure.key for measure in NATS)):
            if key in cells:
                row |= {f"{key}_min": cells[key].min(), f"{key}_max": cells[key].max()}
    return row


def _of_the_model(contrasts: Contrasts, method: str) -> dict[str, Interval]:
    """The intervals of a method of several seeds that are those of the tests, with the seeds of the other methods."""
    pair, made = (method, BASE), {}
    for key in ORDER:
        if interval := contrasts.of(key, [pair]).get(pair):
            made[key] = interval
    if GENERAL.key in made:
        made["perplexity_ratio"] = perplexity_ratio(made[GENERAL.key])
    return made


def _score_tasks(cells: pd.DataFrame, by_items: dict[str, Interval]) -> dict:
    """`gain_TASK` of the tasks that score the domain beside its own score, each with its bounds, in its own unit."""
    made = {}
    for task in score_tasks(cells.iloc[0]):
        change = float(np.mean([scores[task]["change"] for scores in cells["scores_by_task"]]))
        made |= _bounds(f"gain_{task}", by_items.get(f"gain_{task}"), change)
        made[f"unit_{task}"] = units.of_task(cells.iloc[0], task)
    return made


def _apart(cells: pd.DataFrame) -> dict:
    """Mean forgetting of retention tasks that are not proportions, each in its own unit; empty without such tasks."""
    column = cells["forgetting_apart"] if "forgetting_apart" in cells else ()
    by_seed = [tasks for tasks in column if isinstance(tasks, dict)]
    if len(by_seed) < len(cells) or not by_seed[0]:
        return {}
    task_units = {task: about["unit"] for task, about in by_seed[0].items()}
    means = {task: float(pd.Series([seed[task]["forgetting"] for seed in by_seed]).mean()) for task in task_units}
    return {f"apart_{task}": mean for task, mean in means.items()} | {"apart": task_units}


def _domain_score(cell: pd.Series, score: float) -> Interval:
    """A domain's score without its items: Wilson's interval for a proportion of its rows, none for anything else."""
    n = cell["n"].get(cell["domain"], 0)
    return wilson(score * n, n) if n and units.of_domain(cell) == units.SHARE else Interval(score, None, None, n)


def item_intervals(loaded: Loaded, cells: pd.DataFrame, changes: Changes | None = None) -> dict[str, Interval]:
    """One method's intervals, crossed with seeds if it has several; empty if items of the base or a run are missing.

    `changes` are those of cells that include `cells`, so that a table of many methods matches the items once.
    """
    first, changes, runs = cells.iloc[0], changes or Changes(loaded, cells), list(cells.index)
    if not set(runs) <= changes.answered:
        return {}
    domain, kept = first["domain"], retention_tasks(first)
    made = intervals_in_nats(changes, runs)
    for task in [domain, *score_tasks(first)]:
        key, own = ("domain_gain" if task == domain else f"gain_{task}"), units.of_task(first, task)
        if units.per_token(first, task) and (change := changes.per_token(task, runs)):
            made[key] = change.interval
        elif not units.per_item(first, task):
            scores = [by_task[task] for by_task in cells["scores_by_task"]]
            values, errors = [score["change"] for score in scores], [score.get("change_error") for score in scores]
            made[key] = of_set(values, errors, n=first["n"][task])
        elif change := changes.scored([task], runs):
            made[key] = of_arrays(change.tasks, step=units.step(own))
    if units.of_domain(first) == units.SHARE and "domain_gain" in made:
        made["domain_score"] = of_shares(changes.scores(domain, runs))
    if change := changes.scored(kept, runs):
        made["forgetting"] = -of_arrays(change.tasks)
    if GENERAL.key in made:
        made["perplexity_ratio"] = perplexity_ratio(made[GENERAL.key])
    return made


def _bounds(key: str, interval: Interval | None, value: float | None = None) -> dict:
    """The recorded value (or else the interval's own centre) with the interval's bounds."""
    if interval is None:
        return {key: value, f"{key}_low": None, f"{key}_high": None}
    return {key: interval.value if value is None else value, f"{key}_low": interval.low, f"{key}_high": interval.high}


def mean_if_known(column: pd.Series) -> float | None:
    """The mean, or None if any run lacks the value: a mean over the runs that have it would compare unlike things."""
    if column.isna().any():
        return None
    mean = float(column.mean())
    return mean if abs(mean) > 1e-12 else 0.0  # gains of seeds that cancel leave -3.7e-17


def _note(cells: pd.DataFrame) -> str:
    """What a reader must know of one method's cells beside their numbers."""
    notes, cell = [], cells.iloc[0]
    if ruled := [one for one in cells.get("stopped", ()) if isinstance(one, dict)]:
        rule = ruled[0]["rule"]
        limits = ", ".join(f"{name} {limit:+g}" for name, limit in rule["stop"].items())
        ends = ", ".join(str(one["stopped_at"] or one["steps_planned"]) for one in ruled)
        kept = (
            f"; weights of step {', '.join(str(one['kept_step']) for one in ruled)}" if rule["keep"] == "best" else ""
        )
        stop = f"stops at {limits}" if limits else "keeps its best step"
        notes.append(f"{stop}: trained for {ends} of {ruled[0]['steps_planned']} steps{kept}")
    if any(_contains(cell.get(key), "estimator", "batched") for key in ("parts", "settings", "parts_report")):
        notes.append("batched Fisher: only for the published baseline")
    if not cell.get("cost_known", True):
        notes.append("made elsewhere: cost unknown")
    return "; ".join(notes)


def _contains(block, key: str, value) -> bool:
    """Whether a nested block holds `key: value` anywhere."""
    if isinstance(block, dict):
        return block.get(key) == value or any(_contains(inner, key, value) for inner in block.values())
    return False
