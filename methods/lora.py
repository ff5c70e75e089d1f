"""Low-rank adaptation (Hu et al. 2021): W + s·B·A, where A (rank × in) starts random and B (out × rank) zero.

s = alpha/rank, or alpha/√rank with rsLoRA (Kalajdzievski 2023). peft wraps the layers. The weights that are scored are
merged, W + s·B·A, and rounded to the checkpoint's dtype. The adapter is saved in peft's format; merging it again gives
the same bits (`merged`).

DoRA (Liu et al. 2024, arXiv 2402.09353) also trains the length of each row: W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖ by rows
of W (out × in). m (out) starts as ‖W‖, and the norm below gets no gradient. In a bfloat16 model m₀, the start of m, and
the norm are rounded alike. The magnitude that is merged and saved is therefore m/m₀·‖W‖, with which an adapter that
learned nothing merges to W.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods.part import register, setting
from methods.tools.adapter import Adapter, row_norms
from methods.tools.effective import factored_weights

MAGNITUDE = "lora_magnitude_vector.default.weight"  # peft's name of m


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
    dora: bool = setting(False, phase="prepare", help="train the length of each row of the matrices as well (DoRA)")

    @property
    def excludes(self):
        reason = "with DoRA the effective update is not s·B·A, of which the penalty is; set lora.dora: false"
        return dict.fromkeys(("ewc", "hierarchical", "l1", "l2_sp"), reason) if self.dora else {}

    def adapt(self, model, *, seed, state=None):
        return self._wrapped(model, seed=seed, use_rslora=self.rslora, use_dora=self.dora)

    def optimizer_ready(self, *, run, state, optimizer):
        if self.dora:
            names = [f"{weight.layer}.{MAGNITUDE}" for weight in factored_weights(run)]
            state["magnitudes"] = {name: run.weights[name].detach().clone() for name in names}

    def _update(self, weight, state):
        update = super()._update(weight, state)
        if not self.dora:
            return update
        run, name = weight.run, f"{weight.layer}.{MAGNITUDE}"
        start = run.shards.whole(state["magnitudes"][name], run.shapes[name])
        base = run.base[weight.name]
        learned = (run.whole(name).double() / start.double()).cpu()
        magnitude = learned * row_norms(base.T if weight.transposed else base)
        return update | {"magnitude": magnitude.to(start.dtype)}

    def _saved(self):
        return {"use_rslora": self.rslora} | ({"use_dora": True} if self.dora else {})
