"""What a model lost: its scores on the retention tasks against the bare base model's.

Forgetting is base minus tuned, averaged over the retention tasks on which the base is above chance. A task at chance
cannot show loss, so it would only dilute the mean: it is named, and left out. Above chance means that the lower end of
Wilson's interval for the base's score, one-sided at 95 %, lies above chance:

    (p + z²/2n − z·sqrt(p(1−p)/n + z²/4n²)) / (1 + z²/n) > chance,     z = 1.6449, n scored rows

(Wilson 1927, Probable inference, the law of succession, and statistical inference, JASA 22).
"""

import math
from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError

Z = 1.6448536269514722  # Φ(z) = 0.95

Tasks = Mapping[str, Mapping[str, Any]]  # the "tasks" of a scores.json, or some of them


def lower_bound(proportion: float, n: int) -> float:
    """Lower end of the one-sided 95 % Wilson interval of a proportion seen in n rows."""
    centre = proportion + Z * Z / (2 * n)
    spread = Z * math.sqrt(proportion * (1 - proportion) / n + Z * Z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + Z * Z / n))


def above_chance(score: Mapping[str, Any]) -> bool:
    """Whether a task's entry in scores.json lies above chance with a 95 % lower bound."""
    return lower_bound(score["value"], score["n"]) > score["chance"]


def forgetting(base: Tasks, tuned: Tasks) -> dict[str, Any]:
    """{"forgetting", "by_task", "at_chance"} of `tuned`, entries of the retention tasks (others are not counted).

    by_task: base minus tuned of each task that counts; forgetting: their mean, None where no task counts; at_chance:
    the retention tasks left out. Raises UserError where a task's two scores are not of the same rows and metric.
    """
    by_task: dict[str, float] = {}
    at_chance: list[str] = []
    for name, score in tuned.items():
        if score["role"] != "retention":
            continue
        if name not in base:
            raise UserError(f"task {name} has no score of the base model: score the base again")
        for key in ("metric", "n", "chance", "version"):
            if base[name].get(key) != score.get(key):
                raise UserError(
                    f"task {name}: {key} is {base[name].get(key)!r} for the base and {score.get(key)!r} for the tuned "
                    "model: score both again"
                )
        if above_chance(base[name]):
            by_task[name] = base[name]["value"] - score["value"]
        else:
            at_chance.append(name)
    mean = math.fsum(by_task.values()) / len(by_task) if by_task else None
    return {"forgetting": mean, "by_task": by_task, "at_chance": at_chance}
