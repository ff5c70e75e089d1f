"""Low-rank adaptation (Hu et al. 2021): W + s·B·A, where A (rank × in) starts random and B (out × rank) zero.

s = alpha/rank, or alpha/√rank with rsLoRA (Kalajdzievski 2023). peft wraps the layers. The weights that are scored are
merged, W + s·B·A, and rounded to the checkpoint's dtype. The adapter is saved in peft's format; merging it again gives
the same bits (`merged`).
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.part import register, setting
from methods.tools.adapter import Adapter


@register(
    title="LoRA",
    paper="https://arxiv.org/abs/2106.09685",
    line="Train a low-rank update of chosen linear layers and merge it.",
    phase="adapt",
    capabilities=frozenset({"adapts", "adapter"}),
)
@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    shares = ("methods.tools.adapter", "methods.tools.effective", "methods.tools.importance")

    neutral = "none: it trains two factors in place of each matrix"
    trial = {"rank": 2}

    rslora: bool = setting(False, phase="prepare", help="scale alpha/√rank instead")

    def adapt(self, model, *, seed, state=None):
        return self._wrapped(model, seed=seed, use_rslora=self.rslora)

    def _saved(self):
        return {"use_rslora": self.rslora}
