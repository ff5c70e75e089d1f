"""Budget (after STABLE, 2510.16089): the largest share of the update that forgets no more than was asked.

    θ = θ₀ + s·(θ_tuned − θ₀)        the largest s in [floor, 1] with cost(s) ≤ nats

cost(s) is measured on the general probe rows, in nats per token: the rise of −log p over the base's, or
KL(base ‖ θ). The weights are measured as they will be kept, rounded to the checkpoint's dtype. s = 1 is tried first,
then `floor`, then the middle of the interval between the largest s found within the budget and the smallest found
above it, `steps` times; so s is exact to (1 − floor)/2^steps. Where the cost does not rise steadily with s there may be
a larger s within the budget, but the one that is kept was itself measured to be within it. If even `floor` costs too
much, the base is kept, or the update at `floor`, and the report says so.

The published code scales both factors of an adapter, lora_A and lora_B, by s, and so the update by s². Here s is the
scale of the update itself, merged before, whatever method made it. It bisects the same way (7 steps, floor 0.1, 0.3
bits of KL), on answers sampled from a task, and rejects the adapter below the floor.
"""

from dataclasses import dataclass
from typing import Literal

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools.task_vector import scaled


@register(
    title="Budget",
    paper="https://arxiv.org/abs/2510.16089",
    line="Keep the largest share of the update whose measured forgetting stays within what was asked.",
    phase="budget",
    capabilities=frozenset({"measures"}),
)
@dataclass(frozen=True, kw_only=True)
class Budget(Part):
    shares = ("methods.tools.task_vector",)

    neutral = {"floor": 1.0, "otherwise": "floor"}
    trial = {"nats": 0.0, "measure": "kl", "floor": 0.5, "otherwise": "floor"}  # s = 0.5, whatever the last bits say

    nats: float = setting(0.05, within="[0, inf)", help="the most that may be lost, per token of general probe text")
    measure: Literal["nll", "kl"] = setting(
        "nll", help="what is lost: the rise of −log p over the base's, or KL(base ‖ tuned)"
    )
    steps: int = setting(7, within="[0, inf)", help="bisections; each halves the error of s and measures once")
    floor: float = setting(0.0, within="[0, 1]", help="the smallest share of the update that is tried")
    otherwise: Literal["base", "floor"] = setting(
        "base", help="what is kept if even the floor costs too much: the base, or the update at the floor"
    )

    def finish(self, *, run, state, final, measure=None):
        if self.floor == 1 and self.otherwise == "floor":
            return final  # there is nothing to choose
        if measure is None:
            raise UserError("budget: weights are measured in a cell of a study: run this method as one")
        before = measure({})["nll"] if self.measure == "nll" else 0.0
        costs: dict[float, float] = {}

        def fits(scale: float) -> bool:
            costs[scale] = measure(scaled(run.base, final, scale))[self.measure] - before
            return costs[scale] <= self.nats

        scale = self._largest(fits)
        state["found"] = {
            "scale": scale,
            "cost": costs.get(scale, 0.0),
            "cost_of_all": costs[1.0],
            "floor_fits": scale > self.floor or costs.get(self.floor, 0.0) <= self.nats,
            "measured": len(costs) + (self.measure == "nll"),
        }
        return scaled(run.base, final, scale) if scale else {}  # a tensor that is absent stays the base's

    def _largest(self, fits) -> float:
        """The scale that is kept; `fits(scale)` measures."""
        if fits(1.0):
            return 1.0
        if self.floor and (self.floor == 1 or not fits(self.floor)):
            return self.floor if self.otherwise == "floor" else 0.0
        low, high = self.floor, 1.0
        for _ in range(self.steps):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def report(self, *, run, state):
        return {"nats": self.nats, "measure": self.measure} | state.get("found", {})
