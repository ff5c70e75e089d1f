"""The order in which a model that is settled reads the sources of its mix (experiments/data/settling_rows.py)."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

from methods.errors import UserError

T = TypeVar("T")


def reserved(
    sources: Mapping[str, Sequence[T]], weights: Mapping[str, float], count: int
) -> tuple[list[T], dict[str, list[T]]]:
    """`count` rows of the mix, and of each source those that are left. Raises UserError where a source is too small."""
    drawn = list(islice(_order(weights), count))
    taken = {name: drawn.count(name) for name in sources}
    for name, own in sources.items():
        if len(own) < 2 * taken[name]:
            raise UserError(
                f"settle.mix.{name}: {len(own)} rows are there, and twice the {taken[name]} of the gate are needed: "
                "lower its weight or settle.gate.steps, or give it more rows"
            )
    fresh = interleaved({name: list(own[: taken[name]]) for name, own in sources.items()}, weights, count)
    return fresh, {name: list(own[taken[name] :]) for name, own in sources.items()}


def interleaved(sources: Mapping[str, Sequence[T]], weights: Mapping[str, float], count: int) -> list[T]:
    """`count` rows of the mix, each source's in its own order and again from its first row after the last."""
    at, found = dict.fromkeys(sources, 0), []
    for name in islice(_order(weights), count):
        found.append(sources[name][at[name] % len(sources[name])])
        at[name] += 1
    return found


def _order(weights: Mapping[str, float]) -> Iterator[str]:
    """Names of sources so that each has its share of every beginning: the next is the one most behind its share."""
    total, taken, drawn = sum(weights.values()), dict.fromkeys(weights, 0), 0
    while True:
        drawn += 1
        name = max(weights, key=lambda one: weights[one] / total * drawn - taken[one])
        taken[name] += 1
        yield name
