"""L2-SP (Li, Grandvalet & Davoine 2018): pull every weight to its "starting point", the base's value.

    penalty = strength/2 · Σ_i (θ_i − θ₀,i)² / D        gradient strength · (θ − θ₀) / D

D is 1 (`normalise: sum`, the paper's own form) or N, the number of weights that are penalised (`mean`, as FLOW, arXiv
2502.02797, computes its baseline). The two differ by a factor of 10⁸ and more, so a strength without its denominator
says nothing. Published baselines also drop the ½: λ‖θ−θ₀‖² is strength = 2λ here (MoFO, arXiv 2407.20999, gives
λ = 1e-3 and no denominator). The loss is in nats a labelled token.

With LoRA θ − θ₀ is s·B·A, so the penalty is that of the merged weights and not weight decay on the factors. The
gradient is added in closed form once an optimizer step, after accumulation and before clipping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from methods.part import Part, register, setting
from methods.tools.costs import Memory
from methods.tools.effective import base_anchor, effective_weights, penalised
from methods.tools.importance import memory_of_penalty


@register(
    title="L2-SP",
    paper="https://arxiv.org/abs/1802.01483",
    line="Pull every weight back to the base, all with the same strength.",
    phase="penalty",
)
@dataclass(frozen=True, kw_only=True)
class L2SP(Part):
    shares = ("methods.tools.effective", "methods.tools.importance")
    neutral = {"strength": 0.0}
    trial = {"strength": 10.0}

    strength: float = setting(0.1, within="[0, inf)", help="α of α/2·Σ(θ−θ₀)²; the loss is in nats per labelled token")
    normalise: Literal["sum", "mean"] = setting(
        "sum", help="the penalty is the sum over weights, or their mean: the sum divided by their number"
    )

    def memory(self, *, counts, phase):
        if phase != "train" or not self.strength:
            return Memory()
        update = memory_of_penalty(counts, bits=0)["update"]
        return Memory(anchor=counts.share(counts.checkpoint * counts.trained_base), update=update)

    def begin(self, *, run, state, examples, general=()):
        if self.strength:
            state["anchor"] = base_anchor(run)

    def before_clip(self, *, run, state, step):
        if not self.strength:
            return None
        weights = effective_weights(run, anchor=state["anchor"])
        scale = self.strength / (penalised(weights) if self.normalise == "mean" else 1)
        equally = torch.ones((), device=run.device)
        return scale / 2 * sum(weight.penalise(equally, scale=scale) for weight in weights)

    def report(self, *, run, state):
        return {"penalised": penalised(effective_weights(run))}
