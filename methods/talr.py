"""Token-adaptive loss reweighting (TALR): improbable tokens count less, the more so the surer the model is of the rest
(arXiv:2509.20758).

    loss = Σ_t w_t · nll_t / labelled tokens        w_t = max(p_t^(1/τ), floor), without a gradient
    τ    = median over the step's sequences of their mean nll, in nats a labelled token

τ is computed anew at every step, of all its sequences: packed examples are sequences of their own, those without a
label do not count, and of an even number the median is the mean of the two in the middle. The authors' own code is not
public; floor and denominator are those of another group's implementation (arXiv:2602.16093).

Where one process computes the step as one micro-batch, τ is read where the logits are. Otherwise the step's rows are
first scored without gradients and without dropout, which costs a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from methods.part import Part, register, setting
from methods.tools.costs import Added

SMALLEST = 1e-6  # of τ, which is 0 where every label has the probability 1


@register(
    title="TALR",
    paper="https://arxiv.org/abs/2509.20758",
    line="Weigh each token's loss with a power of its probability that the step's median loss chooses.",
    phase="weights",
)
@dataclass(frozen=True, kw_only=True)
class TALR(Part):
    scratch = ("step",)
    neutral = {"floor": 1.0}

    floor: float = setting(0.01, within="[0, 1]", help="smallest weight of a token; 1 weighs all tokens alike")

    def added(self):
        return Added(pooled=1.0 if self.floor < 1 else 0.0)

    def examples(self, *, run, state, rows, step):
        if self.floor < 1:
            labelled = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
            state["step"] = {"rows": rows, "labelled": labelled, "tau": None}
            if run.passes(rows) > 1:
                state["step"]["tau"] = _scored(run, rows)
        return rows

    def batch_weights(self, *, run, state, batch, nll, rows, columns):
        if self.floor == 1 or not len(nll):
            return None if self.floor == 1 else nll
        step = state["step"]
        if step["tau"] is None and len(nll) != step["labelled"]:  # a part that came later has changed rows or labels
            step["tau"] = _scored(run, step["rows"])
        tau = _median(_means(batch, nll, rows, columns)) if step["tau"] is None else step["tau"]
        return (-nll / tau).exp().clamp_min(self.floor)


def _scored(run, rows) -> float:
    """τ of rows by a pass without gradients."""
    means = [-scores.mean() for scores in run.score(rows) if len(scores)]
    return float(_median(torch.stack(means))) if means else SMALLEST


def _means(batch, nll, rows, columns) -> torch.Tensor:
    """The mean nll of each sequence of a micro-batch that has a label."""
    positions = batch.get("position_ids")  # packed: a sequence begins where its positions do
    sequences = rows if positions is None else (positions == 0).cumsum(1)[rows, columns]
    lengths = torch.unique_consecutive(sequences, return_counts=True)[1]
    return torch.segment_reduce(nll, "mean", lengths=lengths)


def _median(means: torch.Tensor) -> torch.Tensor:
    return means.quantile(0.5).clamp_min(SMALLEST)
