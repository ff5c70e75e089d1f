"""Entropy-adaptive fine-tuning: each token's loss counts as much as the model is undecided there (arXiv:2601.02151).

    loss = Σ_t sg(H_t)^power / divisor · nll_t / labelled tokens          H_t in nats, sg without a gradient

H_t is the entropy of the `top` largest probabilities, divided by their sum. With the published 20 of them it is at most
ln 20 = 2.996, which the published divisor of 3 brings to about 1. Other code has no divisor (`divisor: 1`): then the
gradient is three times as large, which the steps of Adam hardly show but clipping does. The loss is divided by all
labelled tokens of the step, whatever their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.part import Part, register, setting


@register(
    title="EAFT",
    paper="https://arxiv.org/abs/2601.02151",
    line="Weigh each token's loss with the entropy of the model's prediction there.",
    phase="weights",
)
@dataclass(frozen=True, kw_only=True)
class EAFT(Part):
    shares = ("methods.tools.token_statistics",)
    neutral = {"power": 0.0, "divisor": 1.0}

    top: int | None = setting(20, within="[2, inf)", help="largest probabilities that the entropy is of; null: all")
    power: float = setting(1.0, within="[0, inf)", help="exponent of the entropy")
    divisor: float = setting(3.0, within="(0, inf)", help="what H^power is divided by; published: 3, elsewhere 1")

    def token_weights(self, *, run, state, batch, statistics):
        if not self.power and self.divisor == 1:
            return None
        return statistics.entropy(self.top) ** self.power / self.divisor
