"""ProFit: tokens that the model finds improbable are not learned in this step (arXiv:2601.09195).

    loss = Σ_t [p_t ≥ threshold] · nll_t / labelled tokens          p_t the probability of the label, without a gradient

The probabilities are those of the step itself, so that a token is left out in one step and learned in another. As in
the published code the loss is divided by all labelled tokens, those that are left out included.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.part import Part, register, setting


@register(
    title="ProFit",
    paper="https://arxiv.org/abs/2601.09195",
    line="Leave out of the loss the tokens that the model finds improbable at this step.",
    phase="weights",
)
@dataclass(frozen=True, kw_only=True)
class ProFit(Part):
    shares = ("methods.tools.token_statistics",)
    neutral = {"threshold": 0.0}
    trial = {"threshold": 0.004}  # a tiny random model gives about 1/258 to every token

    threshold: float = setting(0.1, within="[0, 1]", help="smallest probability of a label that is learned")

    def token_weights(self, *, run, state, batch, statistics):
        return statistics.probability >= self.threshold if self.threshold else None
