"""gate: check whether finished cells forgot too much; the exit status serves continuous integration.

    python -m experiments gate --max-nll-lost 0.05 --max-forgetting 0.02 'MODEL/DOMAIN/mofo/*'

The status is 0 if every cell passes, 1 if one does not, and 2 for bad input. A cell passes if it lost at most so many
nats per token of general text, if its forgetting (docs/rules.md) is at most the limit, and its gain at least the
minimum; with `confidence`, if the ends of the 95 % confidence intervals over the scored items are. A cell that failed,
is missing, or of which a number with a limit is not known, does not pass.
"""

import math
from collections.abc import Sequence

from analysis import numbers, units
from analysis.load import Loaded, load_cells
from analysis.measures import ACCURACY, GENERAL
from analysis.sections.tables import BANNER
from analysis.statistics.comparison import item_intervals
from analysis.statistics.intervals import Interval
from experiments.study import cells
from methods.errors import UserError

ROUNDING = 1e-9  # a mean of shares is not exact: 17 points may be stored as 0.16999999999999993


def main(
    study,
    *,
    patterns: Sequence[str],
    max_forgetting: float | None = None,
    max_nll_lost: float | None = None,
    min_gain: float | None = None,
    confidence: bool = False,
) -> int:
    """Print one line per cell and the outcome, and return the exit status.

    max_forgetting and min_gain are shares of 1 (0.02 is 2 points), max_nll_lost is in nats per token. Raises UserError
    if one of the `patterns` (see `cells.matching`) matches nothing, or a limit is missing or none.
    """
    for name, limit in (("--max-forgetting", max_forgetting), ("--min-gain", min_gain)):
        if limit is not None and not (math.isfinite(limit) and -1 <= limit <= 1):
            raise UserError(f"{name} {limit}: it must be a share of 1; 0.02 is 2 points")
    if max_nll_lost is not None and not math.isfinite(max_nll_lost):
        raise UserError(f"--max-nll-lost {max_nll_lost}: it must be a number of nats per token, such as 0.05")
    if max_forgetting is None and max_nll_lost is None:
        raise UserError("no limit is given: add --max-forgetting 0.02 (2 points), --max-nll-lost 0.05 (nats), or both")
    chosen = [cell.name for cell in cells.matching(study, patterns)]
    loaded = load_cells(study.paths.results, chosen)
    if loaded.not_a_result:
        print(BANNER)
    limits = {GENERAL.key: max_nll_lost, ACCURACY: max_forgetting, "domain_gain": min_gain}
    verdicts = {cell: verdict(loaded, cell, limits=limits, confidence=confidence) for cell in chosen}
    width = max(map(len, chosen))
    for cell, (text, wrong) in verdicts.items():
        print(f"{'FAIL' if wrong else 'pass'}  {cell:<{width}}  {'; '.join(filter(None, [text, *wrong]))}")
    failed = sum(bool(wrong) for _, wrong in verdicts.values())
    stated = [
        "" if max_nll_lost is None else f"general text lost at most {_nats(max_nll_lost)} nats per token",
        "" if max_forgetting is None else f"forgetting at most {_points(max_forgetting)} points",
        "" if min_gain is None else f"gain at least {_points(min_gain)}",
    ]
    ends = " by the ends of the 95 % confidence intervals" if confidence else ""
    print(f"{len(chosen) - failed} of {len(chosen)} cells pass: {', '.join(filter(None, stated))}{ends}")
    return int(failed > 0)


def verdict(loaded: Loaded, cell: str, *, limits: dict, confidence: bool) -> tuple[str, list[str]]:
    """The measured values of a cell in words, and the reasons why it does not pass; without a reason it passes.

    limits: general_nll_lost, forgetting and domain_gain -> the most, or of the gain the least, that passes, or None
    """
    if cell not in loaded.cells.index:
        (failure,) = loaded.failures[loaded.failures["cell"] == cell].itertuples()
        return "", [f"{failure.kind}{f' in {failure.stage}' if failure.stage else ''}: {failure.reason}"]
    row, measured, wrong = loaded.cells.loc[cell], [], []
    intervals = item_intervals(loaded, loaded.cells.loc[[cell]])
    for key, name, sign in (
        (GENERAL.key, "general text lost", 1),
        (ACCURACY, ACCURACY, 1),
        ("domain_gain", "gain", -1),
    ):
        interval, limit, unit = intervals.get(key), limits[key], _unit(row, key)
        value = row.get(key)
        if key == GENERAL.key and numbers.missing(value) and interval is not None:
            value = interval.value  # results from before it was recorded
        if numbers.missing(value):
            if limit is not None or (key == ACCURACY and limits[GENERAL.key] is None):
                wrong.append(f"no {name}{_why_unknown(row, key)}")
            continue
        bounded = interval is not None and interval.low is not None
        measured.append(f"{name} {_shown(value, unit)}{_interval(row, key, interval, unit)}")
        if limit is None:
            continue
        if key == "domain_gain" and unit != units.SHARE:
            wrong.append(f"{name} is in {unit}, and --min-gain is a share of correct answers")
        elif confidence and not bounded:
            wrong.append(f"{name} has no confidence interval")
        else:
            end = value if not confidence else interval.high if sign == 1 else interval.low
            if sign * (end - limit) > ROUNDING:
                what = f"the {'upper' if sign == 1 else 'lower'} end of its interval is" if confidence else "is"
                stated = _nats(limit) if key == GENERAL.key else _points(limit)
                wrong.append(f"{name}: {what} {'above' if sign == 1 else 'below'} {stated}")
    return ", ".join(measured), wrong


def _unit(row, key: str) -> str:
    return {GENERAL.key: GENERAL.unit, ACCURACY: units.SHARE}.get(key) or units.of_domain(row)


def _why_unknown(row, key: str) -> str:
    if key != ACCURACY:
        return ": it is not known of this cell"
    share = " a proportion" if isinstance(row.get("forgetting_apart"), dict) and row["forgetting_apart"] else ""
    return f": no retention task of {row['domain']} is{share} above chance for the base model"


def _shown(value: float, unit: str) -> str:
    return _change(value, unit) + ("" if unit == units.SHARE else f" {unit}")


def _change(value: float, unit: str) -> str:
    return numbers.nats(value) if unit == GENERAL.unit else units.change(value, unit)


def _interval(row, key: str, interval: Interval | None, unit: str) -> str:
    if interval is not None and interval.low is not None:
        return f" [{_change(interval.low, unit)}, {_change(interval.high, unit)}], n = {interval.n}"
    whole = key == "domain_gain" and not units.per_item(row, row["domain"])
    return f", no interval: {'no draw changes it' if whole else 'items are missing'}"


def _points(share: float) -> str:
    """A limit in points, with all digits that were given."""
    return f"{100 * share:+.10g}".replace("-", numbers.MINUS)


def _nats(value: float) -> str:
    """A limit in nats, with all digits that were given."""
    return f"{value:+.10g}".replace("-", numbers.MINUS)
