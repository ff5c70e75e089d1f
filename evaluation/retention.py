"""What a model gained and lost: its scores compared with the base model's.

Two models differ in a task by what their scores are `compared` by (evaluation/measure.py): turned so that more is
better, shares of 1 as they are, perplexities by their logarithm. Forgetting is base minus tuned, averaged over the
retention tasks whose metric is a proportion of rows and on which the base is above chance. A task at chance cannot show
loss, so it would only dilute the mean: it is named, and left out. A task in another unit has no mean with proportions:
it is listed by itself. Above chance means that the lower end of Wilson's one-sided 95 % interval for the base's score
lies above chance:

    (p + z²/2n − z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n) > chance,     z = 1.6449, n scored rows

(Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22).

Accuracy sees a loss when an answer changes; log-likelihoods see it before. Of the same scores, in nats:

    general text lost     Σ nats / Σ tokens of the tuned model minus the base's, over the general passages
    right answers lost    mean over the items of a task of log p₀(gold) − log p(gold), p₀ the base's
    margin lost           the same of log p(right) − log p(best wrong choice)
    domain gained         Σ nats / Σ tokens of the base minus the tuned model's, over the domain's labelled text or the
                          gold answers to its test rows

Over tasks it is the unweighted mean of those whose accuracy counts.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from evaluation.units import SHARE
from methods.errors import UserError

Z = 1.6448536269514722  # Φ(z) = 0.95
Z_BOTH = 1.959963984540054  # Φ(z) = 0.975
ANSWERS = {"gold_nll": 1.0, "margin": -1.0, "brier": 1.0}  # 1.0: less is better
STILL = 1e-9  # a spread of differences that is rounding alone

Tasks = Mapping[str, Mapping[str, Any]]  # the "tasks" of a scores.json, or some of them


def lower_bound(proportion: float, n: int) -> float:
    """Lower end of the one-sided 95 % Wilson interval of a proportion seen in n rows."""
    centre = proportion + Z * Z / (2 * n)
    spread = Z * math.sqrt(proportion * (1 - proportion) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + Z * Z / n))


def above_chance(score: Mapping[str, Any]) -> bool:
    """Whether a task's score, a proportion of rows, is above chance by its 95 % lower bound; never in another unit."""
    share = unit_of(score) == SHARE and 0 <= score["value"] <= 1
    return share and lower_bound(score["value"], score["n"]) > score["chance"]


def unit_of(score: Mapping[str, Any]) -> str:
    """The unit of a difference of two scores of a task (evaluation/measure.py)."""
    return score.get("unit", SHARE)


def change(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """{"change", "unit"} of a task's two entries in scores.json: tuned minus base, with the sign that more is better.

    A metric of the whole set also has "change_error", "change_low" and "change_high": the bootstrap standard error over
    rows, the same draws for both, and its 95 % interval. They are None if too few draws gave a number, or if no draw
    changed it, which does not show that none can.
    """
    units = {unit_of(base), unit_of(tuned)}
    unit = units.pop() if len(units) == 1 else base["metric"].partition(",")[0]
    result: dict[str, Any] = {"change": _compared(tuned) - _compared(base), "unit": unit}
    if "resampled" in tuned:
        both = zip(tuned["resampled"], base["resampled"])
        draws = [after - before for after, before in both if None not in (after, before)]
        result |= dict.fromkeys(("change_error", "change_low", "change_high"))
        if len(draws) > len(tuned["resampled"]) // 2 and (error := statistics.stdev(draws)) > STILL:
            low, high = result["change"] - Z_BOTH * error, result["change"] + Z_BOTH * error
            result |= {"change_error": error, "change_low": low, "change_high": high}
    return result


def forgetting(base: Tasks, tuned: Tasks) -> dict[str, Any]:
    """{"forgetting", "by_task", "at_chance", "apart"} of the retention tasks among `tuned`.

    by_task: base minus tuned of each task that counts; forgetting: their mean, None where no task counts; at_chance:
    the retention tasks left out; apart: those in another unit than shares, each with its "forgetting" in its "unit".
    Raises UserError where a task's two scores are not of the same rows and metric.
    """
    by_task: dict[str, float] = {}
    apart: dict[str, dict[str, Any]] = {}
    at_chance: list[str] = []
    for name, score in tuned.items():
        if score["role"] != "retention":
            continue
        same(name, base, score)
        changed = change(base[name], score)
        if changed["unit"] != SHARE:
            apart[name] = {"forgetting": 0.0 - changed["change"], "unit": changed["unit"]}
        elif above_chance(base[name]):
            by_task[name] = 0.0 - changed["change"]  # which is never -0.0
        else:
            at_chance.append(name)
    mean = math.fsum(by_task.values()) / len(by_task) if by_task else None
    return {"forgetting": mean, "by_task": by_task, "at_chance": at_chance, "apart": apart}


def lost_in_nats(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> dict[str, Any]:
    """What was lost between the contents of two scores.json, in nats; None where it is not known.

    general_nll_lost, general_kl, general_kl_reverse   nats per token of general text, KL(base‖tuned) and its reverse
    general_bits_per_byte_lost                         bits per byte of it
    gold_nll_lost, margin_lost                         nats per item, the mean over the tasks of `by_task`
    gold_nll_lost_by_task, …, brier_lost_by_task       each retention task above chance that has it
    """
    text, before = tuned["general"], base["general"]
    lost: dict[str, Any] = {"general_nll_lost": text["nats_per_token"] - before["nats_per_token"]}
    lost |= {"general_kl": text.get("kl"), "general_kl_reverse": text.get("kl_reverse")}
    lost["general_bits_per_byte_lost"] = text["bits_per_byte"] - before["bits_per_byte"]
    counted = forgetting(base["tasks"], tuned["tasks"])["by_task"]
    for key, sign in ANSWERS.items():
        values = {name: (tuned["tasks"][name].get(key), base["tasks"][name].get(key)) for name in counted}
        by_task = {name: sign * (new - old) for name, (new, old) in values.items() if None not in (new, old)}
        lost[f"{key}_lost_by_task"] = {name: value + 0.0 for name, value in by_task.items()}  # never -0.0
    for key in ("gold_nll", "margin"):
        by_task = lost[f"{key}_lost_by_task"]
        lost[f"{key}_lost"] = math.fsum(by_task.values()) / len(by_task) if by_task else None
    return lost


def nats_per_token(score: Mapping[str, Any]) -> float | None:
    """Σ nats / Σ tokens of a task's labelled text, or of its gold answers; None where answers are written."""
    if score.get("format"):
        return score["value"]
    return score["gold_nll"] * score["n"] / score["tokens"] if {"gold_nll", "tokens"} <= score.keys() else None


def bits_per_byte(score: Mapping[str, Any]) -> float | None:
    """Σ nats / (Σ bytes · ln 2) of the same text."""
    nats = nats_per_token(score)
    return None if nats is None else nats * score["tokens"] / (score["bytes"] * math.log(2))


def same(name: str, base: Tasks, score: Mapping[str, Any]) -> None:
    """Raises UserError where the base has no score of a task, or one of other rows or of another metric."""
    if name not in base:
        raise UserError(f"task {name} has no score of the base model: score the base again")
    for key in ("metric", "n", "chance", "version"):
        if base[name].get(key) != score.get(key):
            raise UserError(
                f"task {name}: {key} is {base[name].get(key)!r} for the base and {score.get(key)!r} for the tuned "
                "model: score both again"
            )


def _compared(score: Mapping[str, Any]) -> float:
    return score.get("compared", score["value"])
