"""A group of tasks as one: its value as lm-eval aggregates it, and each row's part in it.

    value = Σ_t w_t·value_t,   w_t = n_t / Σ n  with `weight_by_size`, else 1 / number of tasks

The parts of the rows are scaled by w_t·Σ n / n_t, so that their mean is the value either way.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.measure import RESAMPLES, SHARE

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


def together(tasks: Mapping[str, Reported], *, by_size: bool) -> dict[str, Any]:
    """The entry of a group from those of its tasks, by name: value, metrics and what the measure says of them."""
    entries = list(tasks.values())
    sizes = [entry["n"] for entry in entries]

    def of(key: str, entries: Sequence[Reported] = entries) -> float | None:
        return mean([entry[key] for entry in entries], sizes, by_size=by_size)

    units = {entry["unit"] for entry in entries}
    whole = {
        "n": sum(sizes),
        "value": of("value"),
        "compared": of("compared"),
        "unit": SHARE if units == {SHARE} else next(iter(units - {SHARE})),
        "higher_is_better": entries[0]["higher_is_better"],
        "per_item": all(entry["per_item"] for entry in entries),
        "metrics": {
            key: of(key, [entry["metrics"] for entry in entries])
            for key in entries[0]["metrics"]
            if all(key in entry["metrics"] for entry in entries)
        },
        "subtasks": {name: {"value": entry["value"], "n": entry["n"]} for name, entry in tasks.items()},
    }
    if not whole["per_item"]:
        draws = [entry.get("resampled") or [entry["compared"]] * RESAMPLES for entry in entries]
        whole["resampled"] = [mean(drawn, sizes, by_size=by_size) for drawn in zip(*draws, strict=True)]
    return whole


def parts(items: Sequence[Item], *, weight: float, n: int, first: int, per_item: bool) -> list[Item]:
    """The items of one task of a group of `n` rows, counted on from `first`, each with its part in the value."""
    factor = weight * n / len(items)
    scaled = []
    for number, item in enumerate(items, first):
        score = item["score"] * factor if per_item and item["score"] is not None else None
        scaled.append(item | {"doc_id": number, "score": score})
    return scaled
