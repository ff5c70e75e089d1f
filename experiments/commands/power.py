"""power: how many seeds and items a study needs to tell a difference between a method and plain fine-tuning.

    python -m experiments power --difference 0.03
    python -m experiments power --study track --difference 0.02 --measure forgetting --seeds 3,5,10 --items 500,4000

The table holds the difference that 80 of 100 studies find, after Holm's correction, for numbers of seeds and items.
"""

import math

import pandas as pd

from analysis import units
from analysis.comparable import guarded
from analysis.families import family
from analysis.load import load_cells
from analysis.measures import ACCURACY, BY_KEY, FORGETTING, GENERAL
from analysis.roles import PLAIN
from analysis.statistics.power import USUAL, Spread, needed, spreads
from experiments.study import cells
from methods.errors import UserError
from methods.tools.names import unknown

SEEDS = "2,3,5,8,12,20"
MOST = 10**9  # seeds, items or tests


def main(
    study,
    *,
    difference: float,
    measure: str = GENERAL.key,
    seeds: str = SEEDS,
    items: str = "",
    tests: int | None = None,
) -> None:
    """Print a table for each model and domain, from the study's finished cells or else from the usual spread.

    difference is in nats, or a share of 1 for accuracy. Raises UserError for a value that cannot be meant, and for a
    measure of which neither the study nor USUAL says how much it spreads.
    """
    if measure not in FORGETTING:
        raise unknown("measure", measure, FORGETTING, where="--measure")
    if not (math.isfinite(difference) and difference > 0):
        raise UserError(f"--difference {difference}: it must be above 0, in nats or a share of 1 (0.02 is 2 points)")
    of_seeds, of_items = _counts("--seeds", seeds, least=2), _counts("--items", items, least=2) if items else []
    others = [method for method in study.grid.methods if family(method) != PLAIN]
    tests = max(len(others), 1) if tests is None else tests
    if not 1 <= tests <= MOST:
        raise UserError(f"--tests {tests}: it must be a whole number from 1 to {MOST:,}")
    found = spreads(guarded(load_cells(study.paths.results, [cell.name for cell in cells.grid(study)])), measure)
    if not found and measure not in USUAL:
        raise UserError(
            f"--measure {measure}: no two methods of this study have several seeds yet, and its usual spread is not "
            f"known: run the study, or ask for {' or '.join(USUAL)}"
        )
    named = {f"{'/'.join(pair)}, ": spread for pair, spread in found.items()} or {"": USUAL[measure]}
    for where, spread in named.items():
        own = spread.items or (128 if BY_KEY.get(measure) is GENERAL else 800)
        table = needed(spread, seeds=of_seeds, items=of_items or [own * k // 2 for k in (1, 2, 4, 8, 32)], tests=tests)
        print(f"{where}{text(spread, table, measure=measure, wanted=difference, tests=tests)}")


def text(spread: Spread, table: pd.DataFrame, *, measure: str, wanted: float, tests: int) -> str:
    """A table of `needed` in words: what is assumed, the differences that can be told, and the least that is enough."""
    source = f"the median of {spread.pairs} pairs of methods of this study"
    if not spread.pairs:
        source = "from the study `track` of SmolLM2-135M, because here no two methods have several seeds yet"
    others = f" The spread of the other methods is worth {spread.df:.1f} more seeds." if spread.df >= 0.05 else ""
    lines = [
        f"{measure}, in {_unit(measure)}: the difference between a method and full that 80 of 100 studies tell "
        f"(at 5 %, first of {tests} tests by Holm)",
        f"Assumed: a difference has a standard deviation of {_size(measure, spread.seed)} between seeds and "
        f"{_size(measure, spread.item)} between items ({source}).{others} Methods that lose more spread more: a "
        "harsher setting needs more than this.",
        "",
        " seeds" + "".join(f"{n:>10,}" for n in table) + "  items",
    ]
    for count, row in table.iterrows():
        marked = (f"{_size(measure, value)}{'*' if value <= wanted else ' '}" for value in row)
        lines.append(f"{count:>6}" + "".join(f"{value:>10}" for value in marked))
    enough = [(count, n) for count, row in table.iterrows() for n, value in row.items() if value <= wanted]
    least = min(enough, default=None)
    told = f"a difference of {_size(measure, wanted)} {_unit(measure)}"
    lines += [
        "",
        f"* tells {told}; the fewest seeds that do are {least[0]}, with {least[1]:,} items."
        if least
        else f"Nothing in this table tells {told}: take more seeds (--seeds), or a harsher setting.",
        "",
    ]
    return "\n".join(lines)


def _counts(name: str, written: str, *, least: int) -> list[int]:
    try:
        counts = [int(part) for part in written.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < least or max(counts) > MOST:
        raise UserError(f"{name} {written}: it must be whole numbers from {least} to {MOST:,}, such as 3,5,8")
    return counts


def _unit(measure: str) -> str:
    return units.named(units.SHARE) if measure == ACCURACY else BY_KEY[measure].unit


def _size(measure: str, value: float) -> str:
    return f"{100 * value:.2g}" if measure == ACCURACY else f"{value:.2g}"
