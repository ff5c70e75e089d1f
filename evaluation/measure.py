"""A task's metric: which direction is better, the unit of a difference, and whether it is a mean over rows.

lm-eval states how a metric is aggregated and which direction is better. The rest is found by a trial: lm-eval's own
functions get invented answers to every row. Where they fail on these they would fail on a model's answers, so the
metric is refused before anything is trained. The unit is

    share       of a mean over rows of numbers in [0, 1], higher is better: a proportion, shown in percentage points
    nats        of a perplexity: two models differ by the logarithm of their ratio
    otherwise   the metric's own name: a plain difference

Every difference has its sign set so that more is better: where lower is better, a rise counts as a loss.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api import metrics
from lm_eval.api.registry import higher_is_better_registry

from evaluation.shipped import lacks_package
from evaluation.units import NATS, SHARE
from methods.errors import UserError, shortened

RESAMPLES = 200  # a standard error from so many is within 10 % in 19 of 20 cases (Efron and Tibshirani 1993, ch. 6)
SEED = 0  # the base and every cell draw the same rows, so that their differences are paired
LARGEST = 700.0  # nats, beyond which a perplexity would be infinite, which JSON cannot hold


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One metric of a task as `metric` and `filter` name it.

    per_item  whether the number is a mean over rows of a number each: then models are compared row by row
    part      a row's number, turned so that more is better, from what lm-eval passes on for the row; None where not
              per_item
    compared  what two models are compared by, of all passed values: turned, and a logarithm for nats
    """

    metric: str
    filter: str
    higher_is_better: bool
    unit: str
    per_item: bool
    part: Callable[[Any], float] | None
    compared: Callable[[Sequence[Any]], float]

    def of(self, value: float, passed: Sequence[Any]) -> dict[str, Any]:
        """What scores.json says of the metric beside its value: `value` is lm-eval's own of the `passed` values."""
        parts = None if self.part is None else [self.part(one) for one in passed]
        unit = self.unit
        if unit == SHARE and not all(0 <= part <= 1 for part in parts):
            unit = self.metric  # a function of the task's own that the trial had not shown to leave [0, 1]
        entry = {"unit": unit, "higher_is_better": self.higher_is_better, "per_item": self.per_item}
        if parts is None:
            return entry | {"compared": self.compared(passed), "resampled": resampled(self.compared, passed)}
        return entry | {"compared": value if unit == SHARE else math.fsum(parts) / len(parts)}


def resampled(number: Callable[[Sequence[Any]], float], passed: Sequence[Any]) -> list[float | None]:
    """`number` of RESAMPLES draws of rows with replacement; None for a draw of which it cannot be computed."""
    drawn = np.random.default_rng(SEED).integers(len(passed), size=(RESAMPLES, len(passed)))
    numbers: list[float | None] = []
    for rows in drawn:
        try:
            value = number([passed[row] for row in rows])
        except (ArithmeticError, ValueError, IndexError):  # all rows of a draw may be of one class
            value = math.nan
        numbers.append(round(value, 9) if math.isfinite(value) else None)
    return numbers


def bounded(aggregation: Mapping[str, Callable]) -> dict[str, Callable]:
    """lm-eval's aggregations, with perplexities that end at the largest number instead of in an error."""
    return {name: _BOUNDED.get(function, function) for name, function in aggregation.items()}


def _perplexity(passed: Sequence[float]) -> float:
    return math.exp(min(-metrics.mean(passed), LARGEST))


def _weighted_perplexity(passed: Sequence[tuple[float, int]]) -> float:
    return math.exp(min(-metrics.weighted_mean(passed), LARGEST))


_BOUNDED = {metrics.perplexity: _perplexity, metrics.weighted_perplexity: _weighted_perplexity}


def measured(task: Any, metric: str, instances: Sequence[Sequence[Any]]) -> Measure:
    """The measure of `metric` (METRIC or METRIC,FILTER) of a task, tried on invented answers to `instances`, by row.

    Raises UserError where lm-eval does not compute the metric of such a task, or not of such rows.
    """
    name, _, chosen = metric.partition(",")
    chosen = chosen or task._filters[0].name
    what = f"task {task.config.task}: metric {name!r}"
    better = task.higher_is_better().get(name)
    known = higher_is_better_registry.get(name) if name in higher_is_better_registry else None
    if better is None:
        raise UserError(
            f"{what} does not say which way is better: write `higher_is_better: true` or false beside it in metric_list"
        )
    if known is not None and known != better:
        raise UserError(
            f"{what} is better {'higher' if better else 'lower'} according to metric_list, and "
            f"{'higher' if known else 'lower'} according to lm-eval: correct higher_is_better in metric_list"
        )
    passed = _tried(task, instances)
    if (name, chosen) not in passed:
        computed = sorted({key for key, _ in passed})
        raise UserError(
            f"{what} is not computed by lm-eval for {task.OUTPUT_TYPE} tasks: it computes "
            f"{', '.join(computed) or 'none'} of this one"
        )
    for (other, _), values in passed.items():
        _aggregates(task, other, values, reported=other == name)
    if len(passed[name, chosen]) < len(instances):
        raise UserError(
            f"{what} is computed of {len(passed[name, chosen])} of {len(instances)} rows: choose rows that it is "
            "computed of"
        )
    aggregate = task.aggregation().get(name, metrics.mean)
    return _measure(aggregate, name=name, filter=chosen, better=better, tried=passed[name, chosen])


def _measure(aggregate: Callable, *, name: str, filter: str, better: bool, tried: Sequence[Any]) -> Measure:
    sign = 1.0 if better else -1.0
    about: dict[str, Any] = {"metric": name, "filter": filter, "higher_is_better": better, "unit": name}
    if aggregate is _perplexity:
        return Measure(**about | {"unit": NATS}, per_item=True, part=float, compared=metrics.mean)
    if aggregate in (metrics.mean, np.mean, metrics.brier_score):
        if aggregate in (metrics.mean, np.mean) and better and all(0 <= float(value) <= 1 for value in tried):
            about["unit"] = SHARE
        return Measure(
            **about,
            per_item=True,
            part=lambda value: sign * float(aggregate([value])),
            compared=lambda values: sign * float(aggregate(values)),
        )
    if aggregate is _weighted_perplexity:
        return Measure(**about | {"unit": NATS}, per_item=False, part=None, compared=metrics.weighted_mean)

    def number(values: Sequence[Any]) -> float:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # of classes that a draw lacks
            return sign * float(aggregate(list(values)))

    return Measure(**about, per_item=False, part=None, compared=number)


def _tried(task: Any, instances: Sequence[Sequence[Any]]) -> dict[tuple[str, str], list[Any]]:
    """(metric, filter) -> what lm-eval passes on for each row of invented answers; every choice is likeliest in one."""
    for number, requests in enumerate(instances):
        for one in requests:
            one.resps = [_answer(task, one, number, len(requests))]
    for ensemble in task._filters:
        try:
            ensemble.apply([one for requests in instances for one in requests])
        except Exception as error:  # of any kind, depending on the filter's settings
            raise UserError(
                f"task {task.config.task}: filter {ensemble.name!r} of filter_list cannot work on answers "
                f"({shortened(error)}): correct its settings"
            ) from error
    passed: dict[tuple[str, str], list[Any]] = {}
    for ensemble in task._filters:
        for number, requests in enumerate(instances, 1):
            try:
                with np.errstate(all="ignore"):
                    answers = [one.filtered_resps[ensemble.name] for one in requests]
                    results = task.process_results(requests[0].doc, answers)
            except UserError:
                raise
            except ImportError as error:
                raise UserError(lacks_package(f"task {task.config.task}", error)) from error
            except Exception as error:  # the task's own Python
                raise UserError(
                    f"task {task.config.task}, {task.place(number)}: scoring an answer to this row fails in lm-eval "
                    f"({shortened(error)}): correct the row, or the task's metrics"
                ) from error
            for key, value in results.items():
                passed.setdefault((key, ensemble.name), []).append(value)
    return passed


def _answer(task: Any, one: Any, number: int, count: int) -> Any:
    """An invented answer to one of the `count` requests of row `number`."""
    if one.request_type == "loglikelihood":
        likeliest = one.idx == number % count if count > 1 else number % 2 == 0
        return (-1.0, True) if likeliest else (-2.0 - one.idx, False)
    if one.request_type == "loglikelihood_rolling":
        return -10.0
    return _right(task, one.doc) if number % 2 == 0 else "none"


def _right(task: Any, doc: Mapping[str, Any]) -> str:
    """The answer that the rows hold."""
    target = task.doc_to_target(doc)
    if task.config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(doc)[target]
    return str(target[0] if isinstance(target, list) and target else target)


def _aggregates(task: Any, name: str, values: Sequence[Any], *, reported: bool) -> None:
    """Refuse a metric that lm-eval's own aggregation cannot take."""
    aggregate = task.aggregation().get(name, metrics.mean)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            number = float(aggregate(list(values)))
        if name != "bypass":
            return
        why = f"it is {number:g} whatever the model answers"
    except ImportError as error:
        raise UserError(lacks_package(f"task {task.config.task}: metric {name!r}", error)) from error
    except Exception as error:  # of the task's own, or of scikit-learn's
        why = shortened(error)
    what = "choose another one" if reported else "leave it out of the task's metric_list"
    raise UserError(
        f"task {task.config.task}: metric {name!r} cannot be computed of these rows by lm-eval ({why}): {what}"
    )
