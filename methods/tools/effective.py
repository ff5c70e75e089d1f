"""The weights that a penalty sees: θ itself, or the dense matrix that LoRA's factors stand for.

For a trained base tensor the effective change is θ − θ₀; for a linear layer with LoRA it is s·B·A (rank r: A is r × in,
B is out × r, s = alpha/r, or alpha/√r with rsLoRA). A gradient D = dL/dθ of the effective tensor becomes the gradient
D of the tensor itself, or ∂A = s·Bᵀ·D and ∂B = s·D·Aᵀ of the factors. A model that stores W as in × out (Conv1D)
takes (s·B·A)ᵀ and Dᵀ instead. So a penalty that is written for effective weights works for both. An adapter that
starts from factors whose product is not zero (methods/tools/split.py) stands for s·(B·A − B₀·A₀).

Where several processes share the model, each has its own rows of every effective weight: for s·B·A its rows of B times
the whole of A. ∂A is then summed over processes; ∂B is complete in the process that has its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
    a: str  # names of the factors in run.weights, where one that is not trained is missing
    b: str
    scaling: float
    transposed: bool  # the base tensor is in × out (GPT-2's Conv1D): its rows need the whole of both factors
    # the factors (as from `parts`) that change is measured from; None: the base, where s·B·A or the difference is 0
    anchor: tuple[Tensor, Tensor] | None
    start: tuple[Tensor, Tensor] | None = None  # A₀ and B₀, whole, where their product is not zero

    def value(self) -> Tensor:
        """The weight minus the anchor's, in the base tensor's layout; a new tensor. Exactly zero at the anchor."""
        a, b = self.parts(self.run.weights).values()
        if self.anchor is not None:
            return self.product(a, b).sub_(self.product(*self.anchor).to(a.device))
        return self.product(*self._difference(a, b, self._own(self.a), self._own(self.b)))

    def parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The factors of this process's rows, from weights or gradients: all of A, and rows of B or all of it.

        A factor that is not trained is what it started as; its gradient is zero.
        """
        found = {}
        for name in (self.a, self.b):
            if name not in tensors:
                found[name] = self._own(name) if tensors is self.run.weights else torch.zeros_like(self._own(name))
            elif name == self.b and not self.transposed:
                found[name] = tensors[name].detach()
            else:
                found[name] = self.run.shards.whole(tensors[name].detach(), self.run.shapes[name])
        return found

    def update(self) -> tuple[Tensor, Tensor]:
        """Whole A and B with W' = W + s·B·A, detached; of rank 2r where both differ from a start (`difference`)."""
        a, b = (self.run.whole(name) if name in self.run.weights else self._start(name) for name in (self.a, self.b))
        return self._difference(a, b, self._start(self.a), self._start(self.b))

    def _difference(self, a: Tensor, b: Tensor, a0: Tensor | None, b0: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.start is None:
            return a, b
        return difference(a, b, a0, b0, trained=[name in self.run.weights for name in (self.a, self.b)])

    def _start(self, name: str) -> Tensor | None:
        """A₀ or B₀, whole, in the dtype of trained weights."""
        start = self.start and self.start[name == self.b]
        return start if start is None else start.to(torch.promote_types(start.dtype, torch.float32))

    def _own(self, name: str) -> Tensor | None:
        """A₀ or B₀ as in `parts`."""
        start = self._start(name)
        whole = start is None or name == self.a or self.transposed
        return start if whole else self.run.shards.local(start)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return self.laid((b @ a).mul_(self.scaling))

    def laid(self, product: Tensor) -> Tensor:
        """A product of `parts` (out × in) as this process's rows of the base tensor."""
        return self.run.shards.local(product.T.contiguous()) if self.transposed else product

    def pull(self, direction: Tensor, *, scale: float = 1.0) -> None:
        """Add scale·∂A and scale·∂B for dL/dθ = direction."""
        a, b = self.run.weights.get(self.a), self.run.weights.get(self.b)
        direction = direction.to((b if a is None else a).dtype)
        if self.transposed:
            direction = self.run.shards.local(self.wholly(direction).T)
        if a is not None:
            rows = self.run.shards.local(self._start(self.b)) if b is None else b.detach()
            _add(a, self.run.shards.local(self.run.shards.sum(rows.T @ direction)), scale * self.scaling)
        if b is not None:
            _add(b, direction @ (self._start(self.a) if a is None else self.run.whole(self.a)).T, scale * self.scaling)

    def penalise(self, importance: Tensor | Codes, *, scale: float) -> Tensor:
        """Add the gradient of scale/2·ΣΩ⊙value² to the factors'; returns ΣΩ⊙value², 0-dim."""
        moved = self.value()
        force = torch.zeros_like(moved)
        value = penalise(weight=moved, anchor=None, importance=importance, gradient=force, scale=1.0)
        self.pull(force, scale=scale)
        return value

    def wholly(self, local: Tensor) -> Tensor:
        """The whole matrix from the rows of all processes, which must all call this."""
        shape = self.run.model.get_submodule(self.layer).base_layer.weight.shape
        return self.run.shards.whole(local, shape)


Effective = Full | Factored


def effective_weights(run: Run, *, anchor: Mapping[str, Tensor] | None = None) -> list[Effective]:
    """One entry for every adapted layer and then for every trained base tensor, in the model's order.

    anchor   what change is measured from, by names of run.weights: rows of trained base tensors and of B, all of A
             (`anchored`). Adapters that it does not name are measured from zero (`base_anchor`). By default all is
             measured from the base: θ₀, and zero for an adapter. It is not copied.

    Raises UserError for DoRA, modules_to_save and adapters on embeddings, whose effective update is not s·B·A.
    """
    weights: list[Effective] = [*factored_weights(run, anchor=anchor)]
    adapters = adapter_names(run.model)
    for path, layer in lora_layers(run.model):
        if layer.lora_magnitude_vector:
            raise UserError(
                f"DoRA on {base_name(path)}: the effective update is not s·B·A, of which a penalty on weights is; set "
                "lora.dora: false"
            )
    for parameter in run.weights:
        if parameter not in adapters:
            name = base_name(parameter)
            if name not in run.base:
                raise UserError(
                    f"the trained tensor {parameter} has no counterpart in the base model: "
                    "modules_to_save and prompt tensors cannot be compared with the base"
                )
            start = run.shards.local(run.base[name]) if anchor is None else anchor[parameter]
            weights.append(Full(run=run, name=name, parameter=parameter, anchor=start))
    return weights


def factored_weights(run: Run, *, anchor: Mapping[str, Tensor] | None = None) -> list[Factored]:
    """One entry for every adapted layer, in the model's order; with DoRA of its s·B·A alone."""
    weights = []
    for path, module in lora_layers(run.model):
        (adapter,) = module.lora_A
        a, b = f"{path}.lora_A.{adapter}.weight", f"{path}.lora_B.{adapter}.weight"
        weight = Factored(
            run=run,
            name=base_name(f"{path}.base_layer.weight"),
            layer=path,
            a=a,
            b=b,
            scaling=module.scaling[adapter],
            transposed=isinstance(module.base_layer, Conv1D),
            anchor=None,
            start=start_of(module),
        )
        if anchor and (a in anchor or b in anchor):
            pair = tuple(anchor[name] if name in anchor else weight._own(name) for name in (a, b))
            weight = replace(weight, anchor=pair)
        weights.append(weight)
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


def adapter_names(model: nn.Module) -> set[str]:
    """Names of all adapters' parameters: factors, trained or not, and DoRA's magnitudes."""
    return {
        f"{path}.{name}"
        for path, layer in lora_layers(model)
        for name, _ in layer.named_parameters()
        if not name.startswith("base_layer.")
    }


def lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers with one LoRA adapter, with DoRA's magnitudes or without, by module path in `model`."""
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        adapters = [*module.lora_A, *module.lora_embedding_A]
        plain = len(adapters) == 1 and len(module.lora_A) == 1 and isinstance(module.base_layer, nn.Linear | Conv1D)
        other = module.lora_variant and start_of(module) is None and not module.lora_magnitude_vector
        if not plain or module.lora_bias[adapters[0]] or other:
            raise UserError(
                f"this adapter on {path}: the effective update is not s·B·A; use one LoRA adapter on linear layers"
            )
        yield path, module


def start_of(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """A₀ and B₀ of a layer whose adapter starts from factors with a product that is not zero."""
    return (layer.start_A, layer.start_B) if hasattr(layer, "start_A") else None


def difference(
    a: Tensor, b: Tensor, a0: Tensor, b0: Tensor, *, trained: Sequence[bool] = (True, True)
) -> tuple[Tensor, Tensor]:
    """(A', B') with B'·A' = B·A − B₀·A₀, exactly zero at the start; of rank 2r, or r where one factor is not trained.

        A' = [A; A − A₀]        B' = [B − B₀, B₀]

    What is subtracted is nearly equal, so that the difference is exact where that of the products would be rounded.

    trained   whether A, and whether B, is trained
    """
    if all(trained):
        return torch.cat((a, a - a0)), torch.cat((b - b0, b0), dim=1)
    return (a - a0, b0) if trained[0] else (a0, b - b0)


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's parameters by base name, from an adapted model or a plain one; a tied tensor once."""
    adapters = adapter_names(model)
    return {base_name(n): p for n, p in model.named_parameters() if n not in adapters}


def adapted_names(model: nn.Module) -> list[str]:
    """Base names of the tensors a run of `model` changes: trained base tensors, and weights under an adapter."""
    under = [base_name(f"{path}.base_layer.weight") for path, _ in lora_layers(model)]
    return under + [name for name, p in base_parameters(model).items() if p.requires_grad]


def _add(weight: Tensor, direction: Tensor, scale: float) -> None:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.add_(direction.to(weight.dtype), alpha=scale)
