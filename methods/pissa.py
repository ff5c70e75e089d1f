"""PiSSA: train the principal components of each weight (Meng et al. 2024, arXiv 2404.02948).

    W = U·S·Vᵀ        A₀ = √(S_r/s)·V_rᵀ    B₀ = U_r·√(S_r/s)        of the r largest singular values
    W' = W + s·(B·A − B₀·A₀)                A and B are trained from A₀ and B₀

It is the control among the adapters that start from a part of the weight: it moves what the base uses most. Published
code trains the residual W − s·B₀·A₀ plus the adapter, and rounds the residual to the base's dtype; here W stays
(methods/tools/split.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.part import register, setting
from methods.tools.split import Split, factors


@register(
    title="PiSSA",
    paper="https://arxiv.org/abs/2404.02948",
    line="Train the principal singular components of chosen linear layers.",
    phase="adapt",
    capabilities=frozenset({"adapts", "adapter"}),
)
@dataclass(frozen=True, kw_only=True)
class PiSSA(Split):
    trial = {"rank": 2}

    niter: int | None = setting(
        None, phase="prepare", within="[0, inf)", help="subspace iterations of a randomised SVD; null: the exact one"
    )

    def _components(self, weight, covariance):
        if self.niter is None:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            return factors(u[:, : self.rank], s[: self.rank], vh[: self.rank])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every seed of a study starts from the same components
            u, s, v = torch.svd_lowrank(weight.cpu(), self.rank, niter=self.niter)
        return factors(u, s, v.T)
