"""Adapters that start from a part of the weight itself: W' = W + s·(B·A − B₀·A₀), and not from zero.

A₀ (rank × in) and B₀ (out × rank) are chosen components of W, as in PiSSA and its kin, which train W − s·B₀·A₀ plus
s·B·A. That is the same in real numbers. Here W stays as it is, because a residual in bfloat16 would be another, rounded
base; the model computes

    y = W·x + s·B'·A'·x        A' = [A; A − A₀]    B' = [B − B₀, B₀]        B'·A' = B·A − B₀·A₀

so that it is exactly the base before the first step. The adapter that is saved is (B', A'), an ordinary one of rank 2r
(r where one factor is not trained).

`calibrate` computes the components once a model: they depend on no seed and are stored, with s = 1, in float32. Each
pair of singular vectors has the sign that makes the largest entry of A₀'s row positive.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from methods.errors import UserError
from methods.part import Prepared, cut, setting
from methods.tools.adapter import Adapter
from methods.tools.architecture import base_name
from methods.tools.costs import Memory, Pass
from methods.tools.covariance import covariances
from methods.tools.effective import difference, lora_layers, start_of
from methods.tools.process_group import Shards, in_turn

DECOMPOSED = 64  # bytes for each entry of a matrix while it is decomposed: in float64 itself, copies and factors
COUNTED = 8  # bytes for each entry of C

SHARES = (
    "methods.tools.adapter",
    "methods.tools.covariance",
    "methods.tools.effective",
    "methods.tools.importance",
    "methods.tools.split",
)


@dataclass(frozen=True, kw_only=True)
class Split(Adapter):
    """A part with such an adapter; it overrides `_components`."""

    shares = SHARES
    scratch = ("calibration",)
    neutral = "none: it trains two factors in place of each matrix"

    alpha: float | None = setting(
        None, phase="prepare", within="(0, inf)", help="the update's scale is alpha/rank; null: 1, as published"
    )

    _fixed: ClassVar[str] = ""  # the factor that is not trained: "A" or "B"
    _scaled: ClassVar[float] = 0.5  # A₀ and B₀ are divided by s to this power

    @property
    def _alpha(self):
        return float(self.rank) if self.alpha is None else self.alpha

    def _components(self, weight: Tensor, covariance: Tensor | None) -> tuple[Tensor, Tensor]:
        """(A₀, B₀) of W (out × in), with s = 1; C (in × in) of its input where the part reads text. All are float64."""
        raise NotImplementedError

    def preparation(self):
        return (Pass(documents=0, length=1, bare=True, gradients="none"),)

    def memory(self, *, counts, phase):
        factors = counts.all - counts.base  # with one that is not trained
        made = counts.wide * factors * (counts.device == "cpu")  # what was calibrated stays in main memory
        if phase == "train":
            return Memory(state=counts.compute * factors + made)
        return Memory(gradient=made + DECOMPOSED * counts.largest_adapted)

    def calibrate(self, *, model, general, seed, progress, shards=Shards(), sample=None):
        layers = self._layers(model)
        made = self._made(layers, {}, progress=progress, shards=shards)
        return Prepared(calibration=made, notes={"layers": len(layers)})

    def _made(self, layers, covariances: dict[str, Tensor], *, progress, shards: Shards) -> dict[str, Tensor]:
        """The components of every layer, by name; `covariances` is used up."""

        def factors_of(name: str) -> dict[str, Tensor]:
            a, b = self._components(matrix(layers[name]).detach().double(), covariances.pop(name, None))
            return {f"{name}.A": a.to(torch.float32), f"{name}.B": b.to(torch.float32)}

        made = in_turn(layers, factors_of, desc=self.key, unit="layer", progress=progress, shards=shards)
        covariances.clear()  # those that other processes have decomposed
        return made

    def adapt(self, model, *, seed, state=None):
        made = (state or {}).get("calibration")  # absent on the meta device
        model = self._wrapped(model, seed=seed)
        for path, layer in lora_layers(model):
            name = base_name(f"{path}.base_layer.weight").removesuffix(".weight")
            if self.rank > min(layer.base_layer.weight.shape):
                shape = list(layer.base_layer.weight.shape)
                raise UserError(
                    f"{self.key}.rank is {self.rank}: {name} is {shape} and has no more components than that"
                )
            (adapter,) = layer.lora_A
            factors = {"A": layer.lora_A[adapter].weight, "B": layer.lora_B[adapter].weight}
            for letter, factor in factors.items():
                if made is not None:
                    factor.data.copy_(made[f"{name}.{letter}"] / layer.scaling[adapter] ** self._scaled)
                layer.register_buffer(f"start_{letter}", factor.detach().clone(), persistent=False)
                factor.requires_grad_(letter != self._fixed)
            layer.start_trained = [letter != self._fixed for letter in factors]
            layer.lora_variant[adapter] = FromStart()
        return model


@dataclass(frozen=True, kw_only=True)
class SplitByText(Split):
    """One whose components depend on what each layer reads in general text (methods/tools/covariance.py)."""

    samples: int = setting(256, phase="prepare", within="[1, inf)", help="documents of general text that are read")
    length: int = setting(512, phase="prepare", within="[1, inf)", help="each document is cut at this many tokens")
    passes: int = setting(
        1, phase="prepare", within="[1, inf)", help="passes over the text: each is for a part of the layers"
    )

    def preparation(self):
        return (Pass(documents=self.samples, length=self.length, cut_by="length", bare=True, gradients="none"),) * (
            self.passes
        )

    def memory(self, *, counts, phase):
        memory = super().memory(counts=counts, phase=phase)
        if phase == "train":
            return memory
        held = COUNTED * (-(-counts.squares // self.passes) + counts.largest_square)
        return replace(memory, state=held, gradient=memory.gradient + DECOMPOSED * counts.largest_square)

    def calibrate(self, *, model, general, seed, progress, shards=Shards(), sample=None):
        documents = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        tokens = sum(len(document["input_ids"]) for document in documents)
        layers = list(self._layers(model).items())
        widest, name = max((matrix(layer).shape[1], name) for name, layer in layers)
        if tokens < widest:
            raise UserError(
                f"{self.key} reads {tokens} tokens, and {name} has {widest} inputs, which so few do not describe: "
                f"raise {self.key}.samples or {self.key}.length, or `general.importance`"
            )
        if self.passes > len(layers):
            raise UserError(f"{self.key}.passes is {self.passes}, and there are {len(layers)} layers: lower it")
        made = {}
        for index in range(self.passes):
            part = dict(layers[len(layers) * index // self.passes : len(layers) * (index + 1) // self.passes])
            total = len(documents[shards.rank :: shards.world])
            with progress(total=total, desc=f"{self.key} text", unit="doc") if progress else nullcontext() as bar:
                found = covariances(model, part, documents, progress=bar and bar.update, shards=shards)
            made |= self._made(part, found, progress=progress, shards=shards)
        notes = {"layers": len(layers), "documents": len(documents)}
        if len(documents) < self.samples:
            notes["documents_asked"] = self.samples
        return Prepared(calibration=made, tokens=tokens * self.passes, notes=notes)


class FromStart:
    """What peft's layer computes with such an adapter: a LoraVariant, which is not imported for the time it takes."""

    @staticmethod
    def forward(module: nn.Module, *, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """W·x + s·B'·A'·x; `result` is W·x."""
        pair = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        a, b = difference(*pair, *start_of(module), trained=module.start_trained)
        return (
            result + F.linear(F.linear(module.lora_dropout[active_adapter](x), a), b) * module.scaling[active_adapter]
        )


def matrix(layer: nn.Module) -> Tensor:
    """A linear layer's weight as out × in."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def factors(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """(A₀, B₀) = (√S·Vᵀ, U·√S), with the largest entry of each row of A₀ positive."""
    root = s.sqrt()
    a, b = root[:, None] * vh, u * root
    sign = torch.where(a.gather(1, a.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0).to(a.dtype)
    return a * sign, b * sign.T
