"""WiSE-FT (Wortsman et al. 2021): go a share of the way from the base to the tuned weights.

    θ = (1 − α)·θ₀ + α·θ_tuned

for every tensor of the model, with adapters merged. α = 1 keeps the tuned weights and α = 0 the base's, both bit for
bit. The part acts after the training alone, so cells that differ in α share one training.
"""

from dataclasses import dataclass

import torch

from methods.part import Part, register, setting


@register(
    title="WiSE-FT",
    paper="https://arxiv.org/abs/2109.01903",
    line="Interpolate between the base and the tuned weights.",
    phase="interpolate",
)
@dataclass(frozen=True, kw_only=True)
class WiSEFT(Part):
    neutral = {"alpha": 1.0}

    alpha: float = setting(0.5, within="[0, 1]", help="share of the way from the base (0) to the tuned weights (1)")

    def finish(self, *, run, state, final, measure=None):
        if self.alpha in (0.0, 1.0):  # bit for bit; a tensor that is absent stays the base's
            return final if self.alpha else {}
        return {name: torch.lerp(run.base[name].to(tuned.dtype), tuned, self.alpha) for name, tuned in final.items()}
