"""LoRA-Null: start where general text has nothing (Tang et al. 2025, arXiv 2503.02659).

    C = 1/N · Σ XᵀX over N documents            X (tokens × in): the layer's input, divided by its largest magnitude
    U_null: the last r singular vectors of C, the directions (in × r) in which the inputs are smallest
    W·U_null·U_nullᵀ = U·S·Vᵀ    A₀ = √(S/s)·Vᵀ    B₀ = U·√(S/s)
    W' = W + s·(B·A − B₀·A₀)

B₀·A₀ gives next to nothing on general text, and neither does B·A₀ for any B. Published code has two versions: the first
trains A and B, the second keeps A = A₀ (`freeze_down`), so that the update stays where general text is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.part import register, setting
from methods.tools.split import SplitByText, factors


@register(
    title="LoRA-Null",
    paper="https://arxiv.org/abs/2503.02659",
    line="Train chosen linear layers from the directions in which general text is smallest.",
    phase="adapt",
    capabilities=frozenset({"adapts", "adapter"}),
)
@dataclass(frozen=True, kw_only=True)
class LoRANull(SplitByText):
    trial = {"rank": 2, "samples": 5, "length": 24}

    freeze_down: bool = setting(False, phase="prepare", help="keep A as it starts (the published second version)")

    @property
    def _fixed(self):
        return "A" if self.freeze_down else ""

    def _components(self, weight, covariance):
        null = torch.linalg.eigh(covariance).eigenvectors[:, : self.rank]  # values ascend
        u, s, vh = torch.linalg.svd(weight @ null, full_matrices=False)
        return factors(u, s, vh @ null.T)
