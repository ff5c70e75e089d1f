"""FLOW (Sanyal et al. 2025, 2502.02797): learn most from the rows that the base already finds easy.

    loss = Σ_i w_i · Σ_t nll_it / number of labelled tokens        w_i = exp( −strength · ℓ_i / τ )

ℓ_i is the base's mean nll per labelled token of row i in nats, τ the median of ℓ over the training rows; the paper has
strength 1. The weights are taken once, before the first step, when the model still is the base, and are fixed for the
run. As in the authors' trainer they are not normalised and the loss is divided by the number of labelled tokens: the
median row weighs 1/e, so that the loss is about a third of plain fine-tuning's. Rows that other parts add weigh 1.
"""

from dataclasses import dataclass
from statistics import median

import torch

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools.costs import Added


@register(
    title="FLOW",
    paper="https://arxiv.org/abs/2502.02797",
    line="Weigh each row by how easy the base finds it.",
    phase="weights",
)
@dataclass(frozen=True, kw_only=True)
class FLOW(Part):
    scratch = ("exponents",)
    neutral = {"strength": 0.0}
    excludes = {"self_sft": "self_sft draws its rows anew in each epoch, and the base has scored those of the data"}

    strength: float = setting(
        1.0, within="[0, inf)", help="s of exp(−s·ℓ/τ): 1 is the paper's, 0 weighs all rows alike"
    )

    def added(self):
        return Added(begin=1.0 if self.strength else 0.0)

    def begin(self, *, run, state, examples, general=()):
        if not self.strength:
            return
        losses = [-float(score.double().mean()) for score in run.score(examples)]  # NaN: a row without a label
        state["temperature"] = median(loss for loss in losses if loss == loss)
        if not state["temperature"]:
            raise UserError(
                "flow: the base predicts most of the training rows with certainty: there is nothing to weigh"
            )
        state["exponents"] = [-self.strength * loss / state["temperature"] for loss in losses]

    def examples(self, *, run, state, rows, step):
        if not self.strength:
            return rows
        # log w, which is 0 where a row has none: rows of other parts weigh 1
        return [
            row | {"flow": torch.full(row["labels"].shape, state["exponents"][row["index"]], dtype=torch.float64)}
            if "index" in row
            else row
            for row in rows
        ]

    def token_weights(self, *, run, state, batch, statistics):
        return batch["flow"][statistics.rows, statistics.columns].exp() if self.strength else None

    def report(self, *, run, state):
        return {"temperature": state.get("temperature")}
