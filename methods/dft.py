"""Dynamic fine-tuning: each token's loss counts as much as the model believes in the token (Wu et al. 2025,
arXiv:2508.05629).

    loss = Σ_t sg(p_t)^power · nll_t / labelled tokens          p_t the probability of the label, sg without a gradient

The published power is 1. With `adaptive` the exponent is power·Σ_v p_v², the probability of drawing the same token
twice, as in DEFT (arXiv:2602.11424): its loss −(p^α − 1)/(α + 1e-6), α = sg(Σ_v p_v²), has the gradient of
p^α·α/(α + 1e-6)·nll; the last factor, which guards against a division by zero, is left out. The loss is divided by all
labelled tokens of the step, whatever their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.part import Part, register, setting


@register(
    title="DFT",
    paper="https://arxiv.org/abs/2508.05629",
    line="Weigh each token's loss with the probability that the model gives the token.",
    phase="weights",
)
@dataclass(frozen=True, kw_only=True)
class DFT(Part):
    shares = ("methods.tools.token_statistics",)
    neutral = {"power": 0.0}

    power: float = setting(1.0, within="[0, inf)", help="exponent of the probability; 0 weighs all tokens alike")
    adaptive: bool = setting(False, help="the exponent is power·Σp² of each token's own distribution (DEFT)")

    def token_weights(self, *, run, state, batch, statistics):
        if not self.power:
            return None
        exponent = self.power
        if self.adaptive:
            exponent = exponent * torch.softmax(statistics.logits, dim=-1).square_().sum(-1)
        return (-exponent * statistics.nll).exp()
