"""The weights that a penalty sees: θ itself, or the dense matrix that LoRA's factors stand for.

For a trained base tensor the effective change is θ − θ₀; for a linear layer with LoRA it is s·B·A (rank r: A is r × in,
B is out × r, s = alpha/r, or alpha/√r with rsLoRA). A gradient D = dL/dθ of the effective tensor becomes the gradient
D of the tensor itself, or ∂A = s·Bᵀ·D and ∂B = s·D·Aᵀ of the factors. A model that stores W as in × out (Conv1D)
takes (s·B·A)ᵀ and Dᵀ instead. So a penalty that is written for effective weights works for both.

Where several processes share the model, each has its own rows of every effective weight: for s·B·A its rows of B times
the whole of A. ∂A is then summed over processes; ∂B is complete in the process that has its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from methods.errors import UserError
from methods.part import Run
from methods.tools.architecture import base_name
from methods.tools.importance import Codes, penalise


@dataclass(frozen=True, kw_only=True)
class Full:
    """A trained tensor of the base model; this process's rows of it."""

    run: Run
    name: str  # base parameter name
    parameter: str  # name in run.weights and in run.model
    anchor: Tensor  # the same rows of the tensor that change is measured from, by default θ₀

    def value(self) -> Tensor:
        """θ − anchor in the trained tensor's dtype, on its device; a new tensor."""
        weight = self.run.weights[self.parameter].detach()
        return weight - self.anchor.to(weight.device, weight.dtype)

    def pull(self, direction: Tensor, *, scale: float = 1.0) -> None:
        """Add scale·direction to the gradient."""
        _add(self.run.weights[self.parameter], direction, scale)

    def penalise(self, importance: Tensor | Codes, *, scale: float) -> Tensor:
        """Add scale·Ω⊙(θ − anchor) to the gradient; returns ΣΩ(θ − anchor)², 0-dim; makes no temporary of the size."""
        weight = self.run.weights[self.parameter]
        return penalise(
            weight=weight.detach(), anchor=self.anchor, importance=importance, gradient=weight.grad, scale=scale
        )

    def wholly(self, local: Tensor) -> Tensor:
        """The whole tensor from the rows of all processes, which must all call this."""
        return self.run.shards.whole(local, self.run.shapes[self.parameter])


@dataclass(frozen=True, kw_only=True)
class Factored:
    """A linear layer's base weight with LoRA's factors beside it; this process's rows of it."""

    run: Run
    name: str  # base parameter name of the adapted weight
    layer: str  # path of the adapted layer in run.model
    a: str  # names of the factors in run.weights
    b: str
    scaling: float
    transposed: bool  # the base tensor is in × out (GPT-2's Conv1D): its rows need the whole of both factors
    # the factors (as from `parts`) that change is measured from; None: the base, where s·B·A = 0
    anchor: tuple[Tensor, Tensor] | None

    def value(self) -> Tensor:
        """s·B·A − anchor's s·B·A in the base tensor's layout; a new tensor. Exactly zero at the anchor."""
        value = self.product(*self.parts(self.run.weights).values())
        return value if self.anchor is None else value.sub_(self.product(*self.anchor).to(value.device))

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors of this process's rows, from weights or gradients: all of A, and rows of B or all of it."""
        a, b = (tensors[name].detach() for name in (self.a, self.b))
        whole = self.run.shards.whole
        return {
            self.a: whole(a, self.run.shapes[self.a]),
            self.b: whole(b, self.run.shapes[self.b]) if self.transposed else b,
        }

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.laid((b @ a).mul_(self.scaling))

    def laid(self, product: Tensor) -> Tensor:
        """A product of `parts` (out × in) as this process's rows of the base tensor."""
        return self.run.shards.local(product.T.contiguous()) if self.transposed else product

    def pull(self, direction: Tensor, *, scale: float = 1.0) -> None:
        """Add scale·∂A and scale·∂B for dL/dθ = direction."""
        a, b = self.run.weights[self.a], self.run.weights[self.b]
        direction = direction.to(a.dtype)
        if self.transposed:
            direction = self.run.shards.local(self.wholly(direction).T)
        _add(a, self.run.shards.local(self.run.shards.sum(b.detach().T @ direction)), scale * self.scaling)
        _add(b, direction @ self.run.whole(self.a).T, scale * self.scaling)

    def penalise(self, importance: Tensor | Codes, *, scale: float) -> Tensor:
        """Add the gradient of scale/2·ΣΩ⊙value² to the factors'; returns ΣΩ⊙value², 0-dim."""
        moved = self.value()
        force = torch.zeros_like(moved)
        value = penalise(weight=moved, anchor=None, importance=importance, gradient=force, scale=1.0)
        self.pull(force, scale=scale)
        return value

    def wholly(self, local: Tensor) -> Tensor:
        """The whole matrix from the rows of all processes, which must all call this."""
        shape = self.run.shapes[self.b][0], self.run.shapes[self.a][1]
        return self.run.shards.whole(local, torch.Size(shape[::-1] if self.transposed else shape))


Effective = Full | Factored


def effective_weights(run: Run, *, anchor: Mapping[str, Tensor] | None = None) -> list[Effective]:
    """One entry for every adapted layer and then for every trained base tensor, in the model's order.

    anchor   what change is measured from, by names of run.weights: rows of trained base tensors and of B, all of A
             (`anchored`). Adapters that it does not name are measured from zero (`base_anchor`). By default all is
             measured from the base: θ₀, and zero for an adapter. It is not copied.

    Raises UserError for DoRA, modules_to_save and adapters on embeddings, whose effective update is not s·B·A.
    """
    weights: list[Effective] = []
    factors = set()
    for path, module in lora_layers(run.model):
        (adapter,) = module.lora_A
        a, b = f"{path}.lora_A.{adapter}.weight", f"{path}.lora_B.{adapter}.weight"
        factors |= {a, b}
        weights.append(
            Factored(
                run=run,
                name=base_name(f"{path}.base_layer.weight"),
                layer=path,
                a=a,
                b=b,
                scaling=module.scaling[adapter],
                transposed=isinstance(module.base_layer, Conv1D),
                anchor=(anchor[a], anchor[b]) if anchor and a in anchor else None,
            )
        )
    for parameter in run.weights:
        if parameter not in factors:
            name = base_name(parameter)
            if name not in run.base:
                raise UserError(
                    f"the trained tensor {parameter} has no counterpart in the base model: "
                    "modules_to_save and prompt tensors cannot be compared with the base"
                )
            start = run.shards.local(run.base[name]) if anchor is None else anchor[parameter]
            weights.append(Full(run=run, name=name, parameter=parameter, anchor=start))
    return weights


def penalised(weights: Sequence[Effective]) -> int:
    """The number of entries of effective weights, of all processes' rows together."""
    return sum(weight.run.base[weight.name].numel() for weight in weights)


def anchored(run: Run, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An anchor for `effective_weights` on the run's device, from whole tensors by names of run.weights."""
    whole, rows = factors(run.model)
    whole |= {
        name for name in rows if isinstance(run.model.get_submodule(name.partition(".lora_B.")[0]).base_layer, Conv1D)
    }
    return {
        name: (tensor if name in whole else run.shards.local(tensor)).to(run.device) for name, tensor in tensors.items()
    }


def base_anchor(run: Run) -> dict[str, Tensor]:
    """θ₀ of the trained base tensors on the run's device, in the checkpoint's own dtype; adapters take no memory."""
    return anchored(run, {name: run.base[base_name(name)] for name in run.weights if base_name(name) in run.base})


def factors(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of LoRA's factors among the model's parameters: those of A and those of B."""
    layers = [(path, next(iter(module.lora_A))) for path, module in lora_layers(model)]
    return {f"{path}.lora_A.{adapter}.weight" for path, adapter in layers}, {
        f"{path}.lora_B.{adapter}.weight" for path, adapter in layers
    }


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers with one plain LoRA adapter, by module path in `model`."""
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        adapters = [*module.lora_A, *module.lora_embedding_A]
        plain = len(adapters) == 1 and len(module.lora_A) == 1 and isinstance(module.base_layer, nn.Linear | Conv1D)
        if not plain or module.use_dora[adapters[0]] or module.lora_bias[adapters[0]] or module.lora_variant:
            kind = "DoRA" if any(module.use_dora.values()) else "this adapter"
            raise UserError(
                f"{kind} on {path}: the effective update is not s·B·A; use one plain LoRA adapter on linear layers"
            )
        yield path, module


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's parameters by base name, from an adapted model or a plain one; a tied tensor once."""
    adapters = set.union(*factors(model))
    return {base_name(n): p for n, p in model.named_parameters() if n not in adapters}


def adapted_names(model: nn.Module) -> list[str]:
    """Base names of the tensors a run of `model` changes: trained base tensors, and weights under an adapter."""
    under = [base_name(f"{path}.base_layer.weight") for path, _ in lora_layers(model)]
    return under + [name for name, p in base_parameters(model).items() if p.requires_grad]


def _add(weight: Tensor, direction: Tensor, scale: float) -> None:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.add_(direction.to(weight.dtype), alpha=scale)
