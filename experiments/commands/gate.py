"""gate: check whether finished cells forgot too much; the exit status serves continuous integration.

    python -m experiments gate --max-nll-lost 0.05 --max-forgetting 0.02 'MODEL/DOMAIN/mofo/*'

The status is 0 if every cell passes, 1 if one does not, and 2 for bad input. Every measure of analysis/measures.py may
have a limit: the gain a least, what is forgotten a most. A cell passes if all its numbers are within their limits; with
`confidence`, if the ends of the 95 % confidence intervals over the scored items are. A cell that failed, is missing, or
of which a number with a limit is not known, does not pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from analysis import numbers, units
from analysis.load import Loaded, load_cells
from analysis.measures import ACCURACY, BY_KEY, GAIN, ORDER
from analysis.sections.tables import BANNER
from analysis.statistics.comparison import item_intervals
from analysis.statistics.intervals import Interval
from experiments.study import cells
from methods.errors import UserError

ROUNDING = 1e-9  # a mean of shares is not exact: 17 points may be stored as 0.16999999999999993
NATS_GAINED, GAINED = GAIN


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A measure that may have a limit: its option on the command line, and its name in the outcome."""

    option: str
    name: str


BOUNDS: Mapping[str, Bound] = {  # as in ORDER
    NATS_GAINED: Bound(option="--min-nll-gained", name="gain in nats"),
    GAINED: Bound(option="--min-gain", name="gain"),
    "general_nll_lost": Bound(option="--max-nll-lost", name="general text lost"),
    "general_kl": Bound(option="--max-kl", name="KL"),
    "gold_nll_lost": Bound(option="--max-gold-lost", name="right answers lost"),
    "margin_lost": Bound(option="--max-margin-lost", name="margin lost"),
    ACCURACY: Bound(option="--max-forgetting", name="forgetting"),
}


def main(study, *, patterns: Sequence[str], confidence: bool = False, **given: float | None) -> int:
    """Print one line per cell and the outcome, and return the exit status.

    given   limits by their options' names: max_nll_lost=0.05. Those of accuracy, max_forgetting and min_gain, are
            shares of 1 (0.02 is 2 points), the others are in nats

    Raises UserError if one of the `patterns` (see `cells.matching`) matches nothing, or a limit is missing or none.
    """
    limits = {key: given.get(bound.option[2:].replace("-", "_")) for key, bound in BOUNDS.items()}
    for key, limit in limits.items():
        share = key in (GAINED, ACCURACY)
        if limit is not None and not (math.isfinite(limit) and (not share or -1 <= limit <= 1)):
            wanted = "a share of 1; 0.02 is 2 points" if share else f"a number of {_unit(key)}, such as 0.05"
            raise UserError(f"{BOUNDS[key].option} {limit}: it must be {wanted}")
    if all(limits[key] is None for key in ORDER if key not in GAIN):
        raise UserError(
            "no limit of what may be forgotten is given: add --max-nll-lost 0.05 (nats per token of general text), "
            "--max-forgetting 0.02 (2 points of accuracy), or another one of `--help`"
        )
    chosen = [cell.name for cell in cells.matching(study, patterns)]
    loaded = load_cells(study.paths.results, chosen)
    if loaded.not_a_result:
        print(BANNER)
    verdicts = {cell: verdict(loaded, cell, limits=limits, confidence=confidence) for cell in chosen}
    width = max(map(len, chosen))
    for cell, (text, wrong) in verdicts.items():
        print(f"{'FAIL' if wrong else 'pass'}  {cell:<{width}}  {'; '.join(filter(None, [text, *wrong]))}")
    failed = sum(bool(wrong) for _, wrong in verdicts.values())
    stated = [
        f"{BOUNDS[key].name} at {'least' if key in GAIN else 'most'} {_limit(key, limit)} {_unit(key)}"
        for key, limit in limits.items()
        if limit is not None
    ]
    ends = " by the ends of the 95 % confidence intervals" if confidence else ""
    print(f"{len(chosen) - failed} of {len(chosen)} cells pass: {', '.join(stated)}{ends}")
    return int(failed > 0)


def verdict(
    loaded: Loaded, cell: str, *, limits: Mapping[str, float | None], confidence: bool
) -> tuple[str, list[str]]:
    """The measured gain and what has a limit in words, and the reasons why the cell does not pass; none if it does.

    limits: of each measure the most, or of a gain the least, that passes, or None
    """
    if cell not in loaded.cells.index:
        (failure,) = loaded.failures[loaded.failures["cell"] == cell].itertuples()
        return "", [f"{failure.kind}{f' in {failure.stage}' if failure.stage else ''}: {failure.reason}"]
    row, measured, wrong = loaded.cells.loc[cell], [], []
    intervals = item_intervals(loaded, loaded.cells.loc[[cell]])
    for key in ORDER:
        name, interval, limit, value = BOUNDS[key].name, intervals.get(key), limits[key], row.get(key)
        if limit is None and key != GAINED:
            continue
        if key in BY_KEY and numbers.missing(value) and interval is not None:
            value = interval.value  # results from before it was recorded
        if numbers.missing(value):
            wrong += [] if limit is None else [f"no {name}{_why_unknown(row, key)}"]
            continue
        unit = units.of_domain(row) if key == GAINED else units.SHARE if key == ACCURACY else _unit(key)
        measured.append(f"{name} {_shown(key, value, unit)}{_interval(row, key, interval, unit)}")
        if limit is None:
            continue
        if key == GAINED and unit != units.SHARE:
            wrong.append(f"{name} is in {unit}, and --min-gain is a share of correct answers")
        elif confidence and (interval is None or interval.low is None):
            wrong.append(f"{name} has no confidence interval")
        else:
            sign, side, place = (-1, "lower", "below") if key in GAIN else (1, "upper", "above")
            end = value if not confidence else interval.low if key in GAIN else interval.high
            if sign * (end - limit) > ROUNDING:
                what = f"the {side} end of its interval is" if confidence else "is"
                wrong.append(f"{name}: {what} {place} {_limit(key, limit)}")
    return ", ".join(measured), wrong


def _unit(key: str) -> str:
    """The unit in which a limit is printed."""
    return BY_KEY[key].unit if key in BY_KEY else "nats per token" if key == NATS_GAINED else "points"


def _why_unknown(row, key: str) -> str:
    if key != ACCURACY:
        return ": it is not known of this cell"
    share = " a proportion" if isinstance(row.get("forgetting_apart"), dict) and row["forgetting_apart"] else ""
    return f": no retention task of {row['domain']} is{share} above chance for the base model"


def _shown(key: str, value: float, unit: str) -> str:
    return _change(key, value, unit) + ("" if unit == units.SHARE else f" {unit}")


def _change(key: str, value: float, unit: str) -> str:
    if key in BY_KEY:
        return BY_KEY[key].show(value)
    return numbers.nats(value) if key == NATS_GAINED else units.change(value, unit)


def _interval(row, key: str, interval: Interval | None, unit: str) -> str:
    if interval is not None and interval.low is not None:
        return f" [{_change(key, interval.low, unit)}, {_change(key, interval.high, unit)}], n = {interval.n}"
    whole = key == GAINED and not units.per_item(row, row["domain"])
    return f", no interval: {'no draw changes it' if whole else 'items are missing'}"


def _limit(key: str, value: float) -> str:
    """A limit in nats or points, with all digits that were given."""
    scale = 100 if key in (GAINED, ACCURACY) else 1
    return f"{scale * value:+.10g}".replace("-", numbers.MINUS)
