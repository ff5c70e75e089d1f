"""Importance as the contribution of each weight to the decrease of the loss: a part for a training phase of its own.

    ω_i = −Σ_steps g_i Δθ_i          Ω_i = Σ max(ω_i, 0) / (Δ_i² + ξ)

g is the raw task gradient at the start of a step, Δθ the optimizer's movement in the step, and Δ the whole movement
since the start of the phase. −∫ g·dθ over all weights is the decrease of the loss (Zenke et al. 2017). θ is the
effective weight: a trained tensor, or s·B·A of an adapted layer, whose gradient dL/dθ is dL/dW of the frozen W
beneath the adapter.

For a trained tensor ω is accumulated inside the optimizer's step, which knows Δθ, so no copy of weights or gradients is
needed. Each process has the same rows of ω as of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from methods.part import Part
from methods.tools.adam import AdamW
from methods.tools.effective import Factored, effective_weights, lora_layers


@dataclass(frozen=True, kw_only=True)
class PathIntegral(Part):
    """Accumulates Ω in state["importance"] during a `fit`; call `release` afterwards, also after an error.

    It is the only part of its fit: g is the gradient that the optimizer sees, with clipping undone.

    gradient     "exact": dL/dθ. "displacement": for adapters s·(B·∂A + ∂B·A − lr·∂B·∂A), the movement of the product
                 in plain gradient descent divided by −lr, which the paper's code uses as the gradient
    clamp        set negative ω to 0 at the end, or after every step
    consolidate  add ω to Ω at the end of the phase, or of every epoch (Δ counts from the start of the phase)
    """

    key = "path_integral"
    scratch = ("dense", "gradient")

    gradient: Literal["exact", "displacement"] = "exact"
    clamp: Literal["end", "step"] = "end"
    consolidate: Literal["end", "epoch"] = "end"
    xi: float = 1e-9
    undo: list[Any] = field(default_factory=list, repr=False)

    def begin(self, *, run, state, examples, general=()):
        weights = effective_weights(run)
        factored = [w for w in weights if isinstance(w, Factored)]
        state["displaced"] = weights  # their values are movements since the start
        state["omega"] = {w.name: torch.zeros_like(w.value()) for w in weights}
        state["importance"] = {}
        state["before"] = {name: tensor.clone() for w in factored for name, tensor in w.parts(run.weights).items()}
        # their values are movements in the step
        state["moved"] = [replace(w, anchor=(state["before"][w.a], state["before"][w.b])) for w in factored]
        if self.gradient == "exact":
            layers = dict(lora_layers(run.model))
            state["dense"] = {
                w.name: self._listen(layers[w.layer], dtype=state["omega"][w.name].dtype) for w in factored
            }

    def _listen(self, layer: nn.Module, *, dtype: torch.dtype) -> Tensor:
        """A buffer for dL/dW = Σ (dL/dy)ᵀ·x of the frozen W under an adapter; y = W·x + s·B·A·x."""
        frozen, transposed = layer.base_layer.weight, isinstance(layer.base_layer, Conv1D)
        total = torch.zeros(frozen.shape, dtype=dtype, device=frozen.device)

        def forward(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x = arguments[0].detach().flatten(0, -2)

            def backward(gradient: Tensor) -> None:
                gradient = gradient.flatten(0, -2)
                total.add_(x.T @ gradient if transposed else gradient.T @ x)

            if output.requires_grad:
                output.register_hook(backward)

        self.undo.append(layer.register_forward_hook(forward).remove)
        return total

    def release(self) -> None:
        """Remove the hooks."""
        while self.undo:
            self.undo.pop()()

    def optimizer(self, *, run, learning_rate, betas, eps, weight_decay):
        return AdamW(
            run.weights.values(), lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, moments=run.moments
        )

    def optimizer_ready(self, *, run, state, optimizer):
        state["optimizer"] = optimizer
        names = {id(run.weights[w.parameter]): w.name for w in state["displaced"] if not isinstance(w, Factored)}

        def watch(weight: Tensor, piece: slice, movement: Tensor) -> None:
            gradient, factor = weight.grad.view(-1)[piece], -1.0
            if run.clipped is not None:
                if weight.is_cuda:  # where reading the number would make the host wait
                    gradient = gradient / run.clipped
                else:
                    factor = (factor / run.clipped.double()).item()
            state["omega"][names[id(weight)]].view(-1)[piece].addcmul_(gradient, movement, value=factor)

        if names:
            optimizer.watch = watch

    @torch.no_grad()
    def before_clip(self, *, run, state, step):
        if self.gradient == "displacement":
            gradients = {name: weight.grad for name, weight in run.weights.items()}
            state["gradient"] = {
                name: tensor.clone() for w in state["moved"] for name, tensor in w.parts(gradients).items()
            }

    @torch.no_grad()
    def after_step(self, *, run, state, step, gradient):
        for weight in state["moved"]:
            state["omega"][weight.name].addcmul_(self._gradient(weight, state), weight.value(), value=-1)
            for name, tensor in weight.parts(run.weights).items():
                state["before"][name].copy_(tensor)
        for total in state.get("dense", {}).values():
            total.zero_()
        if self.clamp == "step":
            for omega in state["omega"].values():
                omega.clamp_(min=0)
        if self.consolidate == "epoch" and (step + 1) % run.epoch == 0:
            self.consolidated(state)

    def _gradient(self, weight: Factored, state: dict) -> Tensor:
        shards = weight.run.shards
        if self.gradient == "exact":
            # each process differentiates `world` times its share of the step's loss
            return shards.local(shards.sum(state["dense"][weight.name])) / shards.world
        a, b = (state["before"][name] for name in (weight.a, weight.b))
        ga, gb = (state["gradient"][name] for name in (weight.a, weight.b))
        rate = state["optimizer"].param_groups[0]["lr"]
        return weight.laid((b @ ga).add_(gb @ a).sub_(gb @ ga, alpha=rate).mul_(weight.scaling))

    @torch.no_grad()
    def consolidated(self, state: dict) -> dict[str, Tensor]:
        """Add ω to Ω and start a new ω; returns Ω by base parameter name, this process's rows."""
        for weight in state["displaced"]:
            omega = state["omega"].pop(weight.name)
            omega.clamp_(min=0).div_(weight.value().square_().add_(self.xi))
            if weight.name in state["importance"]:
                omega.add_(state["importance"][weight.name])
            state["importance"][weight.name] = omega
            if self.consolidate == "epoch":
                state["omega"][weight.name] = torch.zeros_like(omega)
        return state["importance"]
