"""A group of tasks as one: its value as lm-eval aggregates it, and each row's part in it.

    value = Σ_t w_t·value_t,   w_t = n_t / Σ n  with `weight_by_size`, else 1 / number of tasks

The parts of the rows are scaled by w_t·Σ n / n_t, so that their mean is the value either way.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.measure import RESAMPLES
from evaluation.units import SHARE

Item = dict[str, Any]
Reported = Mapping[str, Any]  # an entry of scores.json


def weights(sizes: Sequence[int], *, by_size: bool) -> list[float]:
    """The weight of each task of a group."""
    return [size / sum(sizes) if by_size else 1 / len(sizes) for size in sizes]


def mean(values: Sequence[float | None], sizes: Sequence[int], *, by_size: bool) -> float | None:
    """The weighted mean of the tasks' values; None where one is unknown."""
    if None in values:
        return None
    return math.fsum(value * weight for value, weight in zip(values, weights(sizes, by_size=by_size), strict=True))


def together(
    tasks: Sequence[tuple[str, Reported, list[Item]]], entry: Mapping[str, Any]
) -> tuple[Reported, list[Item]]:
    """What scores.json says of an entry of tasks.json, and its items, from (name, what it says, items) of its tasks."""
    if "weight_by_size" not in entry:
        ((_, reported, items),) = tasks
        return reported, items
    reports = [reported for _, reported, _ in tasks]
    sizes = [reported["n"] for reported in reports]
    shares = weights(sizes, by_size=entry["weight_by_size"])

    def of(key: str, values: Sequence[Reported] = reports) -> float:
        return math.fsum(one[key] * share for one, share in zip(values, shares, strict=True))

    metrics = [reported["metrics"] for reported in reports]
    units = {reported["unit"] for reported in reports}
    whole: dict[str, Any] = {
        "n": sum(sizes),
        "value": of("value"),
        "compared": of("compared"),
        "unit": SHARE if units == {SHARE} else min(units - {SHARE}),
        "higher_is_better": reports[0]["higher_is_better"],
        "per_item": all(reported["per_item"] for reported in reports),
        "metrics": {key: of(key, metrics) for key in metrics[0] if all(key in one for one in metrics)},
        "subtasks": {name: {"value": reported["value"], "n": reported["n"]} for name, reported, _ in tasks},
    }
    if not whole["per_item"]:
        draws = [reported.get("resampled") or [reported["compared"]] * RESAMPLES for reported in reports]
        whole["resampled"] = [mean(drawn, sizes, by_size=entry["weight_by_size"]) for drawn in zip(*draws, strict=True)]
    items: list[Item] = []
    for (_, _, rows), share in zip(tasks, shares, strict=True):
        factor = share * whole["n"] / len(rows)
        for row in rows:
            score = row["score"] * factor if whole["per_item"] else None
            items.append(row | {"doc_id": len(items), "score": score})
    return whole, items
