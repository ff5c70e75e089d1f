"""The chance level of a task: what its metric would be if each choice of a row were picked with equal probability."""

import math
from collections.abc import Mapping
from typing import Any

from evaluation.units import SHARE

PICKED_BY_GOLD = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # 1 where the picked choice is a right one
FAR = -1e6  # nats: so unlikely that no length of a choice makes up for it


def chance(task: Any) -> float | None:
    """The mean over rows of the metric's expected value, for a share; None in another unit.

    0 where an answer is written or has to be the likeliest text: guessing letters does not give it.
    """
    if task.measure.unit != SHARE:
        return None
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0
    return math.fsum(_expected(task, doc) for doc in task.eval_docs) / len(task.eval_docs)


def _expected(task: Any, doc: Mapping[str, Any]) -> float:
    choices, metric = task.doc_to_choice(doc), task.measure.metric
    if metric in PICKED_BY_GOLD and not callable(task.config.process_results):
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        right = {choices.index(one) if one in choices else one for one in (gold if isinstance(gold, list) else [gold])}
        return len(right & set(range(len(choices)))) / len(choices)
    values = []
    for pick in range(len(choices)):
        values.append(_value(task, doc, [(-1.0 if one == pick else FAR, False) for one in range(len(choices))]))
    return math.fsum(values) / len(values)


def _value(task: Any, doc: Mapping[str, Any], answers: list[tuple[float, bool]]) -> float:
    """The metric of these answers to the choices; without a question, all choices are equally likely."""
    if "acc_mutual_info" in task._metric_fn_list:
        answers = answers + [(0.0, False)] * len(answers)
    return task.measure.part(task.process_results(doc, answers)[task.measure.metric])
