"""MiLoRA: train the minor components of each weight (Wang et al. 2024, arXiv 2406.09044).

    W = U·S·Vᵀ        A₀ = √(S_r/s)·V_rᵀ    B₀ = U_r·√(S_r/s)        of the r smallest singular values
    W' = W + s·(B·A − B₀·A₀)                A and B are trained from A₀ and B₀

The update begins where the base has least, so that its principal components are left alone; nothing keeps A and B there
while they are trained. Of min(out, in) singular values, the r smallest are the last r of the reduced decomposition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.part import register
from methods.tools.split import Split, factors


@register(
    title="MiLoRA",
    paper="https://arxiv.org/abs/2406.09044",
    line="Train the minor singular components of chosen linear layers.",
    phase="adapt",
    capabilities=frozenset({"adapts", "adapter"}),
)
@dataclass(frozen=True, kw_only=True)
class MiLoRA(Split):
    trial = {"rank": 2}

    def _components(self, weight, covariance):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return factors(u[:, -self.rank :], s[-self.rank :], vh[-self.rank :])
