"""L1 to the base: a pull of every weight towards its pre-trained value whose size does not depend on the distance.

    penalty = strength · Σ_i |θ_i − θ₀,i| / D        gradient strength · sign(θ − θ₀) / D

A baseline of MoFO (arXiv 2407.20999, λ = 1e-6 and no denominator given); D is 1 (`normalise: sum`) or N, the number of
weights that are penalised (`mean`). The loss is in nats a labelled token.

Exactly at θ₀ the gradient is 0, which is one of the subgradients there: a weight that has not moved is not held, and
the first step is that of plain fine-tuning. A weight that the penalty brings back crosses θ₀ and is pushed from the
other side, by steps of the learning rate: it ends near θ₀ and not on it, so the change is small but not sparse.

With LoRA θ − θ₀ is s·B·A, entry by entry of the merged matrix. The gradient is added in closed form once an optimizer
step, after accumulation and before clipping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from methods.part import Part, register, setting
from methods.tools.costs import Memory
from methods.tools.effective import base_anchor, effective_weights, penalised


@register(
    title="L1 to the base",
    paper="https://arxiv.org/abs/2407.20999",
    line="Pull every weight towards the base with a force that does not depend on the distance.",
    phase="penalty",
)
@dataclass(frozen=True, kw_only=True)
class L1(Part):
    shares = ("methods.tools.effective", "methods.tools.importance")
    neutral = {"strength": 0.0}
    trial = {"strength": 0.01}

    strength: float = setting(1.0e-5, within="[0, inf)", help="λ of λ·‖θ−θ₀‖₁; the loss is in nats per labelled token")
    normalise: Literal["sum", "mean"] = setting(
        "sum", help="the penalty is the sum over weights, or their mean: the sum divided by their number"
    )

    def memory(self, *, counts, phase):
        if phase != "train" or not self.strength:
            return Memory()
        # the change of one tensor, and the anchor in its dtype or what its gradient is computed with
        update = 2 * counts.wide * counts.share(counts.largest_regularised)
        return Memory(anchor=counts.share(counts.checkpoint * counts.trained_base), update=update)

    def begin(self, *, run, state, examples, general=()):
        if self.strength:
            state["anchor"] = base_anchor(run)

    def before_clip(self, *, run, state, step):
        if not self.strength:
            return None
        weights = effective_weights(run, anchor=state["anchor"])
        scale = self.strength / (penalised(weights) if self.normalise == "mean" else 1)
        value = torch.zeros((), device=run.device)
        for weight in weights:
            moved = weight.value()
            value = value + torch.linalg.vector_norm(moved, 1)
            weight.pull(moved.sign_(), scale=scale)
        return scale * value

    def report(self, *, run, state):
        return {"penalised": penalised(effective_weights(run))}
