"""Sharpness-aware minimisation (Foret et al. 2021; against forgetting in fine-tuning: arXiv:2406.04836).

    gradient of the step = ∇L(θ + e)        e = ρ · g / ‖g‖,  g = ∇L(θ)

θ are all trained tensors together, those of all processes, and L is the whole step's loss of labelled tokens, with the
weights and terms that other parts give it; penalties in closed form are added afterwards, at θ. Entries that are frozen
have no part in e either. With `adaptive` (ASAM, arXiv:2102.11600) lengths are measured in the size of
each weight, t = |θ| + η with η = 0.01:

    e = ρ · t² ⊙ g / ‖t ⊙ g‖

ρ = 0.05 over 135 million weights moves each by about 4e-6. Of SmolLM2-135M's weights in bfloat16 3 in 1000 would then
be others, by a whole rounding step, and the rest would stay. Both gradients are therefore computed in float32, whatever
dtype the run computes in, on the same micro-batches with the same dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.part import Part, register, setting
from methods.tools.costs import Added

ETA = 0.01  # so that a weight of 0, such as LoRA's B before the first step, is moved, too


@register(
    title="SAM",
    paper="https://arxiv.org/abs/2010.01412",
    line="Take each step's gradient where the loss is highest nearby, so that flat minima are found.",
    phase="projection",
)
@dataclass(frozen=True, kw_only=True)
class SAM(Part):
    neutral = {"rho": 0.0}

    rho: float = setting(0.05, within="[0, inf)", help="ρ, how far the weights are moved: the length of e")
    adaptive: bool = setting(False, help="measure lengths in the size of each weight (ASAM), with ρ of 0.5 to 2")

    def added(self):
        return Added(trained=1.0 if self.rho else 0.0)  # every token once more

    def second_gradient(self, *, run, state, step):
        offsets = {name: weight.grad for name, weight in run.weights.items()}
        self._scale(run)
        norms = torch.stack(torch._foreach_norm(list(offsets.values())))
        norm = run.shards.sum(norms.square().sum()).sqrt()
        self._scale(run)
        torch._foreach_mul_(list(offsets.values()), self.rho / norm.clamp_min(1e-12))
        return offsets

    def _scale(self, run):
        """Multiply the gradient with the size of each weight."""
        for weight in run.weights.values() if self.adaptive else ():
            weight.grad.mul_(weight.detach().abs() + ETA)
