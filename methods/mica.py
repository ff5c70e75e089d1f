"""MiCA: train an update in the minor left singular directions of each weight (2026, arXiv 2604.01694).

    W = U·S·Vᵀ        B = the r left singular vectors of the smallest singular values, fixed    A = 0, trained
    W' = W + s·B·A    s = alpha/rank

The update stays where W puts least, however long A is trained; MiLoRA only starts there. As in peft, whose
`init_lora_weights="mica"` this is, the vectors are the last r of min(out, in), so that for out > in the directions that
W does not reach at all are not among them; and B is orthonormal, whatever s is. Here B is computed in float64 once a
model (methods/tools/split.py), where peft computes it in float32 each time. It is rounded to the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from methods.part import register
from methods.tools.split import Split


@register(
    title="MiCA",
    paper="https://arxiv.org/abs/2604.01694",
    line="Train an update that stays in the minor left singular directions of chosen linear layers.",
    phase="adapt",
    capabilities=frozenset({"adapts", "adapter"}),
)
@dataclass(frozen=True, kw_only=True)
class MiCA(Split):
    trial = {"rank": 2}

    _fixed: ClassVar[str] = "B"
    _scaled: ClassVar[float] = 0.0

    def _components(self, weight, covariance):
        u = torch.linalg.svd(weight, full_matrices=False).U
        return weight.new_zeros(self.rank, weight.shape[1]), u[:, -self.rank :]
