"""FAPM (Huang et al. 2025): keep the part of the update that is large, but not large beside the base's own weights.

    S = |Δ| − mean|W₀| · |Δ|/|W₀|        Δ = W − W₀; the mean is over the tensor

Of each tensor the share `fraction` of its entries with the largest S keep their tuned value; all others are the
base's. Both bit for bit. An entry with |W₀| below the tensor's mean has a negative S, the more so the further it moved.

Where W₀ = 0, S is −∞, whatever Δ is: such an entry is kept last. The published code divides 0 by 0 there and, with
Δ = 0, keeps the entry first, as a sort puts NaN; it also takes the difference and its score in bfloat16, where many
scores are equal. Like that code the part prunes every tensor, also embeddings and norms, and keeps exactly ⌊fraction·n⌋
entries; of equal scores the first are kept. (A norm whose base weights are all equal has the score 0 everywhere.)
"""

from dataclasses import dataclass

import torch

from methods.part import Part, register, setting
from methods.tools.task_vector import largest


@register(
    title="FAPM",
    paper="https://arxiv.org/abs/2509.08255",
    line="Keep the entries of the update that are large without being large beside the base's weights.",
    phase="merge",
)
@dataclass(frozen=True, kw_only=True)
class FAPM(Part):
    shares = ("methods.tools.task_vector",)

    neutral = {"fraction": 1.0}

    fraction: float = setting(0.1, within="[0, 1]", help="share of each tensor's entries that keep their tuned value")

    def finish(self, *, run, state, final, measure=None):
        if self.fraction == 1:
            return final
        pruned = {}
        for name, tuned in final.items():
            base = run.base[name].to(tuned)
            pruned[name] = torch.where(largest(score(base, tuned), self.fraction), tuned, base)
        return pruned


def score(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """S of each entry; −∞ where the base's weight is 0."""
    size, moved = base.abs(), (tuned - base).abs()
    return torch.where(size > 0, moved - size.mean() * moved / size, -torch.inf)
