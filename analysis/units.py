"""The unit in which the scores of a task differ, and how its numbers are written.

Only a proportion of rows (`share`) is in percentage points, has right and wrong answers and a chance; perplexities
differ in nats, other metrics in their own unit (evaluation/measure.py). All differences have the sign with which more
is better. Results that do not name a unit are shares.
"""

import pandas as pd

from analysis import numbers

SHARE, NATS = "share", "nats"
PER_TOKEN = "nats_per_token"  # the metric of held-out text


def of_task(cell: pd.Series, task: str) -> str:
    """The unit of a task of one cell."""
    return cell["scores_by_task"].get(task, {}).get("unit", SHARE)


def of_domain(cell: pd.Series) -> str:
    """The unit of a cell's gain."""
    return of_task(cell, cell["domain"])


def per_item(cell: pd.Series, task: str) -> bool:
    """Whether the task's number is a mean over rows, so that two models can be compared row by row."""
    return cell["scores_by_task"].get(task, {}).get("per_item", True)


def per_token(cell: pd.Series, task: str) -> bool:
    """Whether the task's number is a mean over the tokens of its texts (a domain of format text, pairs or chat)."""
    return metric_of(cell, task) == PER_TOKEN


def metric_of(cell: pd.Series, task: str) -> str:
    return cell["scores_by_task"].get(task, {}).get("metric", "").partition(",")[0]


def step(unit: str) -> float:
    """How far one row's number moves if its answer changes (statistics/crossed.py), 0 without right and wrong."""
    return 1.0 if unit == SHARE else 0.0


def level(value: float | None, unit: str) -> str:
    """A score as text: a share in percent, anything else as it is."""
    if unit == SHARE or numbers.missing(value):
        return numbers.percent(value)
    return _digits(value, ".4g", unit)


def change(value: float | None, unit: str) -> str:
    """A signed difference as text: of shares in points, of anything else as it is."""
    if unit == SHARE or numbers.missing(value):
        return numbers.points(value)
    text = _digits(value, "+.3g", unit)
    return "0" if float(f"{value:.3g}") == 0 else text


def _digits(value: float, digits: str, unit: str) -> str:
    """The value; nats, which are compared from row to row, keep zeros at the end: 1.120 beside 1.151."""
    return f"{value:{digits.replace('.', '#.') if unit == NATS else digits}}".rstrip(".").replace("-", numbers.MINUS)


def named(unit: str) -> str:
    """A unit, or the metric of held-out text, as it is written."""
    return {SHARE: "points", PER_TOKEN: "nats per token"}.get(unit, unit)


def gains(table: pd.DataFrame) -> list[str]:
    """The columns of a comparison with the gain of a task that scores the domain beside its own score."""
    return [c.replace("unit_", "gain_", 1) for c in table if c.startswith("unit_") and table[c].notna().any()]
