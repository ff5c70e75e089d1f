"""CorDA, knowledge-preserved: train what general text uses least (Yang et al. 2024, arXiv 2406.05223).

    C = 1/N · Σ XᵀX over N documents            X (tokens × in): the layer's input, divided by its largest magnitude
    W·C = U·S·Vᵀ      A₀ = √(S_r/s)·V_rᵀ·C⁻¹    B₀ = U_r·√(S_r/s)     of the r smallest singular values
    W' = W + s·(B·A − B₀·A₀)                    A and B are trained from A₀ and B₀

C is damped before it is inverted, with 0.01 of its mean diagonal, doubled until ‖C·C⁻¹ − 1‖ < 0.05 (Frobenius). peft
does this in float32, and divides X by the magnitude of its largest signed value, which can be near zero; here it is
float64, and the largest magnitude. The paper's other mode (IPM: the r largest components with C of the domain's own
text) is left out: what a part prepares never sees the domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from methods.part import register
from methods.tools.split import SplitByText, factors

DAMPING = 0.01  # of the mean diagonal
INVERSE_ERROR = 0.05  # Frobenius norm


@register(
    title="CorDA",
    paper="https://arxiv.org/abs/2406.05223",
    line="Train the components of chosen linear layers that general text uses least.",
    phase="adapt",
    capabilities=frozenset({"adapts", "adapter"}),
)
@dataclass(frozen=True, kw_only=True)
class CorDA(SplitByText):
    trial = {"rank": 2, "samples": 5, "length": 24}

    def _components(self, weight, covariance):
        damped, inverse = inverted(covariance)
        u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
        return factors(u[:, -self.rank :], s[-self.rank :], vh[-self.rank :] @ inverse)


def inverted(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """C with as little damping as makes it invertible, and its inverse."""
    damping = DAMPING * covariance.diagonal().mean()
    one = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    while True:
        damped = covariance + damping * one
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < INVERSE_ERROR:
            return damped, inverse
        damping = 2 * damping
