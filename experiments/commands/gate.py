"""gate: check whether finished cells forgot too much; the exit status serves continuous integration.

    python -m experiments gate --max-forgetting 0.02 'MODEL/DOMAIN/mofo/*'

The status is 0 if every cell passes, 1 if one does not, and 2 for bad input. A cell passes if its forgetting
(docs/rules.md) is at most the limit and its gain at least the minimum; with `confidence`, if the ends of the 95 %
confidence intervals over the scored items are. A cell that failed, is missing or cannot show forgetting does not pass.
"""

import math
from collections.abc import Sequence

from analysis import numbers, units
from analysis.load import Loaded, load_cells
from analysis.sections.tables import BANNER
from analysis.statistics.comparison import item_intervals
from experiments.study import cells
from methods.errors import UserError

ROUNDING = 1e-9  # a mean of shares is not exact: 17 points may be stored as 0.16999999999999993


def main(
    study, *, patterns: Sequence[str], max_forgetting: float, min_gain: float | None = None, confidence: bool = False
) -> int:
    """Print one line per cell and the outcome, and return the exit status; limits are shares of 1 (0.02 is 2 points).

    Raises UserError if one of the `patterns` (see `cells.matching`) matches nothing or a limit is not a share.
    """
    for name, limit in (("--max-forgetting", max_forgetting), ("--min-gain", min_gain)):
        if limit is not None and not (math.isfinite(limit) and -1 <= limit <= 1):
            raise UserError(f"{name} {limit}: it must be a share of 1; 0.02 is 2 points")
    chosen = [cell.name for cell in cells.matching(study, patterns)]
    loaded = load_cells(study.paths.results, chosen)
    if loaded.not_a_result:
        print(BANNER)
    verdicts = {
        cell: verdict(loaded, cell, max_forgetting=max_forgetting, min_gain=min_gain, confidence=confidence)
        for cell in chosen
    }
    width = max(map(len, chosen))
    for cell, (text, wrong) in verdicts.items():
        print(f"{'FAIL' if wrong else 'pass'}  {cell:<{width}}  {'; '.join(filter(None, [text, *wrong]))}")
    failed = sum(bool(wrong) for _, wrong in verdicts.values())
    limits = f"forgetting at most {_limit(max_forgetting)} points"
    limits += "" if min_gain is None else f", gain at least {_limit(min_gain)}"
    limits += " by the ends of the 95 % confidence intervals" if confidence else ""
    print(f"{len(chosen) - failed} of {len(chosen)} cells pass: {limits}")
    return int(failed > 0)


def verdict(
    loaded: Loaded, cell: str, *, max_forgetting: float, min_gain: float | None, confidence: bool
) -> tuple[str, list[str]]:
    """The measured values of a cell in words, and the reasons why it does not pass; without a reason it passes."""
    if cell not in loaded.cells.index:
        (failure,) = loaded.failures[loaded.failures["cell"] == cell].itertuples()
        return "", [f"{failure.kind}{f' in {failure.stage}' if failure.stage else ''}: {failure.reason}"]
    row = loaded.cells.loc[cell]
    intervals = item_intervals(loaded, loaded.cells.loc[[cell]])
    measured, wrong = [], []
    for key, limit, sign in (("forgetting", max_forgetting, 1), ("domain_gain", min_gain, -1)):
        name = key.removeprefix("domain_")
        value, interval = row[key], intervals.get(key)
        if numbers.missing(value):
            share = " a proportion" if isinstance(row.get("forgetting_apart"), dict) and row["forgetting_apart"] else ""
            why = f": no retention task of {row['domain']} is{share} above chance for the base model"
            wrong.append(f"no {name}{why if sign == 1 else ''}")
            continue
        unit = units.of_domain(row) if key == "domain_gain" else units.SHARE
        bounded = interval is not None and interval.low is not None
        without = "items are missing" if units.per_item(row, row["domain"]) or sign == 1 else "no draw changes it"
        ends = (
            f" [{units.change(interval.low, unit)}, {units.change(interval.high, unit)}], n = {interval.n}"
            if bounded
            else ""
        )
        shown = units.change(value, unit) + ("" if unit == units.SHARE else f" {unit}")
        measured.append(f"{name} {shown}{ends or f', no interval: {without}'}")
        if limit is None:
            continue
        if unit != units.SHARE:
            wrong.append(f"{name} is in {unit}, and --min-gain is a share of correct answers")
            continue
        if confidence and not bounded:
            wrong.append(f"{name} has no confidence interval")
            continue
        end = value if not confidence else interval.high if sign == 1 else interval.low
        if sign * (end - limit) > ROUNDING:
            what = f"the {'upper' if sign == 1 else 'lower'} end of its interval is" if confidence else "is"
            wrong.append(f"{name}: {what} {'above' if sign == 1 else 'below'} {_limit(limit)}")
    return ", ".join(measured), wrong


def _limit(share: float) -> str:
    """A limit in points, with all digits that were given."""
    return f"{100 * share:+.10g}".replace("-", numbers.MINUS)
