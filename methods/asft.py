"""Anchored supervised fine-tuning: dynamic fine-tuning (part `dft`) held to the base's predictions (arXiv:2509.23753).

    loss = Σ_t [ sg(p_t)^power · nll_t + strength · KL_t ] / labelled tokens

p_t is the probability of the label, sg takes no gradient, and KL_t is in nats, of the positions that predict a label:

    estimator: full     KL(p₀(·|x<t) ‖ p(·|x<t)) over the whole vocabulary, with 0.1 as in the authors' code
    estimator: label    r − log r − 1, r = p₀(y_t)/p(y_t): k3 for the reverse KL, of the label alone, which another code
                        base takes with strengths of 0.005 to 0.03; labels are no draws of the model, so its value is no
                        KL, and strengths do not carry over

The gradient of the second one is that of sg(r − 1)·nll_t, so it is added to the weight of the token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from methods.part import Part, register, setting
from methods.tools.costs import Added, Memory


@register(
    title="ASFT",
    paper="https://arxiv.org/abs/2509.23753",
    line="Weigh each token's loss with its probability, and hold the predictions to the base's.",
    phase="loss",
)
@dataclass(frozen=True, kw_only=True)
class ASFT(Part):
    shares = ("methods.tools.token_statistics",)
    excludes = {"dft": "asft weighs tokens with their probability itself; keep one"}
    neutral = {"power": 0.0, "strength": 0.0}
    trial = {"power": 0.25}  # weighed with a random model's probabilities the loss is less than the rounding of a KL

    power: float = setting(1.0, within="[0, inf)", help="exponent of the probability; 0 weighs all tokens alike")
    strength: float = setting(0.1, within="[0, inf)", help="of the KL to the base, against a loss in nats")
    estimator: Literal["full", "label"] = setting(
        "full", help="forward KL over the vocabulary, or the reverse KL's k3 of the label alone"
    )

    @property
    def _of_labels(self) -> bool:
        return self.strength > 0 and self.estimator == "label"

    def added(self):
        return Added(read=1.0 if self.strength else 0.0)

    def memory(self, *, counts, phase):
        if phase != "train" or not self.strength:
            return Memory()
        return Memory(state=counts.frozen_base, forward=0 if self._of_labels else counts.distributions)

    def examples(self, *, run, state, rows, step):
        if not self._of_labels:
            return rows
        marked = []
        for row, scores in zip(rows, run.score(rows, base=True), strict=True):
            base = torch.zeros(row["labels"].shape)
            base[1:][row["labels"][1:] != -100] = scores
            marked.append(row | {"asft": base})
        return marked

    def token_weights(self, *, run, state, batch, statistics):
        if not self.power and not self._of_labels:
            return None
        weights = (-self.power * statistics.nll).exp()
        if self._of_labels:
            ratio = (batch["asft"][statistics.rows, statistics.columns] + statistics.nll).exp()
            weights += self.strength * (ratio - 1)
        return weights

    def loss(self, *, run, state, batch, hidden):
        if not self.strength or self._of_labels:
            return None
        line, column = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
        reference = run.reference.hidden(batch)
        return self.strength * run.reference.kl(hidden[line, column], reference[line, column])
