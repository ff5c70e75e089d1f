"""Selective token masking (Wu et al. 2025, 2501.14315): do not learn the tokens that surprise the base.

    label of token t → −100 where exp(nll_t) > threshold,   nll_t = −log p₀(t) in nats, p₀ the base's prediction

The base scores every labelled token of the training rows once, before the first step, when the model still is the base
and no second copy is needed. The labels are masked for the whole run. As in the authors' code a masked token does not
count: a step's loss is the mean over the labels that are left. A row without any is still read and counted in
`tokens_trained`, so that the budget of tokens is that of every other method; it has no share in the loss.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.errors import UserError
from methods.part import Part, register, setting
from methods.tools.costs import Added


@register(
    title="Selective token masking",
    paper="https://arxiv.org/abs/2501.14315",
    line="Learn only the tokens that the base itself finds likely.",
    phase="data",
)
@dataclass(frozen=True, kw_only=True)
class STM(Part):
    scratch = ("labels",)
    neutral = {"threshold": 0.0}
    trial = {"threshold": 500.0}
    excludes = {"self_sft": "self_sft draws its rows anew in each epoch, and the base has scored those of the data"}

    threshold: float = setting(
        2.5, within="[0, inf)", help="perplexity under the base above which a token is not learned; 0: all are learned"
    )

    def added(self):
        return Added(begin=1.0 if self.threshold else 0.0)

    def begin(self, *, run, state, examples, general=()):
        if not self.threshold:
            return
        scores = run.score(examples)  # the model is the base: nothing has moved
        every = torch.cat(scores)
        limit = -math.log(self.threshold)
        if not (every >= limit).any():
            raise UserError(
                f"stm.threshold is {self.threshold:g}, and no token of the training rows has so low a perplexity under "
                f"the base: nothing is left to learn. The lowest is {math.exp(-every.max()):.3g}, the median "
                f"{math.exp(-every.median()):.3g}: set a threshold above these"
            )
        state["labels"] = [_masked(row["labels"], own < limit) for row, own in zip(examples, scores, strict=True)]
        left = [int((labels[1:] != -100).sum()) for labels in state["labels"]]
        state["masked"], state["empty"] = 1 - sum(left) / len(every), left.count(0)

    def examples(self, *, run, state, rows, step):
        if not self.threshold:
            return rows
        return [row | {"labels": state["labels"][row["index"]]} if "index" in row else row for row in rows]

    def report(self, *, run, state):
        return {"share_of_labels_masked": state.get("masked", 0.0), "rows_without_labels": state.get("empty", 0)}


def _masked(labels: Tensor, surprising: Tensor) -> Tensor:
    """Labels with −100 where `surprising`, which is of the labelled tokens that another token precedes."""
    places = 1 + (labels[1:] != -100).nonzero()[:, 0]
    return labels.index_fill(0, places[surprising], -100)
