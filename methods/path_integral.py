"""Importance as what each weight contributed to a fall of the loss: a part for a training phase of its own.

    ω_i = −Σ_steps g_i Δθ_i          Ω_i = Σ max(ω_i, 0) / (Δ_i² + ξ)

g is the raw task gradient at the start of a step, Δθ the optimizer's actual movement in it, Δ the whole movement since
the start of the phase. −∫ g·dθ over all weights is the loss's fall (Zenke et al. 2017). θ is the effective weight: a
trained tensor, or s·B·A of an adapted layer, whose true gradient dL/dθ is dL/dW of the frozen W beneath the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from methods.effective import Factored, effective_weights
from methods.part import Part


@dataclass(frozen=True, kw_only=True)
class PathIntegral(Part):
    """Accumulates Ω in state["importance"] of the fit it takes part in; call `release` afterwards, also after an error.

    gradient     "exact": dL/dθ. "displacement": for adapters s·(B·∂A + ∂B·A − lr·∂B·∂A), the movement of the product
                 under plain gradient descent divided by −lr, which the paper's own code takes for the gradient
    clamp        max(ω, 0) at the end, or after every step
    consolidate  ω becomes Ω at the end of the phase, or of every epoch (Δ counts from the start of the phase)
    """

    key = "path_integral"
    capabilities = frozenset({"needs_gradient"})

    gradient: Literal["exact", "displacement"] = "exact"
    clamp: Literal["end", "step"] = "end"
    consolidate: Literal["end", "epoch"] = "end"
    xi: float = 1e-9
    undo: list[Any] = field(default_factory=list, repr=False)

    def begin(self, *, run, state, examples):
        state["before"] = {name: weight.detach().clone() for name, weight in run.weights.items()}
        state["moved"] = effective_weights(run, anchor=state["before"])  # in the step
        state["displaced"] = effective_weights(run)  # since the start
        state["omega"] = {w.name: torch.zeros_like(w.value()) for w in state["moved"]}
        state["importance"] = {name: torch.zeros_like(omega) for name, omega in state["omega"].items()}
        state["examples"], state["seen"], state["open"] = len(examples), 0, False
        if self.gradient == "exact":
            parameters = dict(run.model.named_parameters())
            state["dense"] = {w.name: self._listen(parameters[w.parameter], state["omega"][w.name].dtype)
                              for w in state["moved"] if isinstance(w, Factored)}  # fmt: skip

    def _listen(self, frozen: torch.nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        """A buffer that sums dL/dW of a frozen weight over micro-batches. W is not among the trained tensors and stays still."""
        total = torch.zeros_like(frozen, dtype=dtype, requires_grad=False)

        def collect(parameter: torch.Tensor) -> None:
            total.add_(parameter.grad)
            parameter.grad = None

        required = frozen.requires_grad
        frozen.requires_grad_(True)
        handle = frozen.register_post_accumulate_grad_hook(collect)
        self.undo.append(lambda: (handle.remove(), frozen.requires_grad_(required)))
        return total

    def release(self) -> None:
        """Take the hooks off and freeze again what was frozen."""
        while self.undo:
            self.undo.pop()()

    def optimizer_ready(self, *, run, state, optimizer):
        state["optimizer"] = optimizer

    def batch(self, *, run, state, batch):
        state["seen"] += len(batch["input_ids"])
        return batch

    @torch.no_grad()
    def after_step(self, *, run, state, step, gradient):
        for weight in state["moved"]:
            omega = state["omega"][weight.name]
            omega.addcmul_(self._gradient(weight, state, gradient), weight.value(), value=-1)
            if self.clamp == "step":
                omega.clamp_(min=0)
        for name, weight in run.weights.items():
            state["before"][name].copy_(weight)
        for total in state.get("dense", {}).values():
            total.zero_()
        state["open"] = True
        if self.consolidate == "epoch" and state["seen"] % state["examples"] == 0:
            self.consolidated(state)

    def _gradient(self, weight, state: dict, gradient: dict[str, torch.Tensor]) -> torch.Tensor:
        if not isinstance(weight, Factored):
            return gradient[weight.parameter]
        if self.gradient == "exact":
            return state["dense"][weight.name]
        a, b, ga, gb = state["before"][weight.a], state["before"][weight.b], gradient[weight.a], gradient[weight.b]
        rate = state["optimizer"].param_groups[0]["lr"]
        return (b @ ga).add_(gb @ a).sub_(gb @ ga, alpha=rate).mul_(weight.scaling)

    @torch.no_grad()
    def consolidated(self, state: dict) -> dict[str, torch.Tensor]:
        """Ω by base parameter name, with the ω of steps not yet consolidated added in and begun anew."""
        if state["open"]:
            for weight in state["displaced"]:
                omega = state["omega"][weight.name]
                state["importance"][weight.name] += omega.clamp(min=0) / weight.value().square_().add_(self.xi)
                omega.zero_()
            state["open"] = False
        return state["importance"]
