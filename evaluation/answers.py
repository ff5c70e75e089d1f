"""Items of a task whose answers are given: what the model makes of the choices of each row.

    choices         the log-likelihoods of all choices in their order, in nats, `;` between them; from them follow
    log_likelihood  that of the gold answer
    margin          the right answer's log-likelihood minus the best wrong choice's: positive where `acc` counts 1
    brier           Σ_c (p_c − [c is right])², p = softmax of the choices' log-likelihoods: lm-eval's brier_score;
                    items.csv.gz leaves it out
    tokens, bytes   of the gold answer as it is scored, with the delimiter before it

None is of the metric, which may divide by lengths or ask what the model would write.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.task import LocalTask, gold_index
from methods.errors import UserError

DIGITS = "%.7g"  # of a number in items.csv.gz: a float32 has no more
MEANS = ("margin", "brier")
Item = dict[str, Any]


def item(name: str, task: LocalTask, sample: Mapping[str, Any], *, tokens: Mapping[tuple[str, str], int]) -> Item:
    """A row of items.csv.gz of one of lm-eval's samples.

    tokens: of each (context, continuation) that was scored. A written answer has a score alone.
    """
    part, passed = task.measure.part, sample[task.measure.metric]
    row = {"task": name, "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"]}
    row["score"] = None if part is None else part(passed)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices, gold = task.doc_to_choice(sample["doc"]), _gold(task, sample["doc"])
        row |= {"choice": _choice(task.measure.metric, choices, sample["filtered_resps"], gold), "gold": gold}
        values = [float(value) for value, _ in sample["filtered_resps"][: len(choices)]]
        row["choices"] = ";".join(DIGITS % value for value in values)
        if gold is None:
            return row
        row |= _among(values, right=_right(task, sample["doc"], gold), gold=gold)
    elif task.OUTPUT_TYPE == "loglikelihood":
        ((value, greedy),) = sample["filtered_resps"]
        row |= {"choice": 0 if greedy else None, "gold": 0, "log_likelihood": value}
    else:
        return row
    asked = sample["arguments"][row["gold"]]
    return row | {"tokens": tokens[asked], "bytes": len(asked[1].encode())}


def _gold(task: LocalTask, doc: Mapping[str, Any]) -> int | None:
    """The gold choice; None where a row of lm-eval's own has none, which it counts as wrong."""
    try:
        return gold_index(task, doc)
    except UserError:
        if isinstance(task, LocalTask):
            raise
        return None


def summary(items: Sequence[Item]) -> dict[str, float]:
    """{"gold_nll", "margin", "brier"}: means over items, in nats an item; {"tokens", "bytes"}: sums over gold answers.

    What the items do not have, or is not finite (an answer that the model holds for impossible), is left out.
    """
    columns = {key: [row.get(key) for row in items] for key in ("log_likelihood", *MEANS, "tokens", "bytes")}
    known = {key: values for key, values in columns.items() if values and None not in values}
    found = {key: math.fsum(known[key]) / len(items) for key in MEANS if key in known}
    if "log_likelihood" in known:
        found |= {"gold_nll": -math.fsum(known["log_likelihood"]) / len(items)}
    found = {key: value for key, value in found.items() if math.isfinite(value)}
    return found | {key: sum(known[key]) for key in ("tokens", "bytes") if key in known}


def _among(values: Sequence[float], *, right: set[int], gold: int) -> Item:
    """log_likelihood, margin and brier of a row from the log-likelihoods of its choices."""
    found: Item = {"log_likelihood": values[gold]}
    wrong = [value for number, value in enumerate(values) if number not in right]
    if wrong:
        found["margin"] = max(values[number] for number in right) - max(wrong)
    if wrong and len(right) == 1:
        likely = np.exp(np.array(values) - max(values))
        likely /= likely.sum()
        found["brier"] = float(((likely - np.eye(len(values))[gold]) ** 2).sum())
    return found


def _right(task: LocalTask, doc: Mapping[str, Any], gold: int) -> set[int]:
    """The indices of all right choices; some tasks list several."""
    listed = task.doc_to_target(doc) if task.multiple_target else None
    if not isinstance(listed, list):
        return {gold}
    choices = task.doc_to_choice(doc)
    return {one if isinstance(one, int) else choices.index(one) for one in listed}


def _choice(metric: str, choices: list[str], answers: list[tuple[float, bool]], gold: int | None) -> int | None:
    """The choice that a metric counts as the model's, as lm-eval computes it from (nats, greedy) of each choice."""
    if metric == "exact_match":  # what the model would write: none of the choices, as a rule
        greedy = [number for number, (_, likeliest) in enumerate(answers[: len(choices)]) if likeliest]
        return gold if gold in greedy else next(iter(greedy), None)
    values = np.array([value for value, _ in answers])
    scores = values[: len(choices)]
    if metric == "acc_mutual_info":  # those without the question follow
        scores = scores - values[len(choices) :]
    if metric in ("acc_norm", "acc_bytes"):
        scores = scores / [len(choice if metric == "acc_norm" else choice.encode()) for choice in choices]
    return int(np.argmax(scores))
