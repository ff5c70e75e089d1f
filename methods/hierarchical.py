"""Hierarchical importance regularisation (Song et al. 2025, arXiv 2501.13669).

A short training phase on general text gives θ* and Ω (methods/tools/path_integral.py). The domain phase starts from
θ* with

    penalty = φ · Σ_l c_l Σ_i Ω_i (θ_i − θ*_i)²          c = L·softmax(‖Ω_l‖ / temperature)

over L groups l, so that the mean of the coefficients is 1. θ is LoRA's effective update s·B·A, as in the paper, or
the full parameters. docs/methods/hierarchical.md lists where the paper and its code differ; params.yaml has a block
for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.errors import UserError
from methods.part import Part, Prepared, cut, register, setting
from methods.tools.architecture import group_of
from methods.tools.carry import carried, restore_state
from methods.tools.costs import Memory, Pass
from methods.tools.effective import Effective, Full, anchored, effective_weights
from methods.tools.importance import compact, memory_of_penalty, placed, refuse_missing, totals
from methods.tools.path_integral import PathIntegral
from methods.tools.process_group import Shards


@register(
    title="Hierarchical",
    paper="https://arxiv.org/abs/2501.13669",
    line="Learn from general text which layers and entries matter, and hold them while the domain is learned.",
    phase="penalty",
    capabilities=frozenset({"importance", "seeded_preparation"}),
)
@dataclass(frozen=True, kw_only=True)
class Hierarchical(Part):
    shares = (
        "methods.tools.carry",
        "methods.tools.effective",
        "methods.tools.importance",
        "methods.tools.path_integral",
        "methods.tools.stored",
    )
    removed = {
        "preset": "write `like: hierarchical-paper` or `like: hierarchical-official` in the method's block instead; "
        "the root's params.yaml has these two blocks",
        "density": "importance is stored for every entry; leave it out (the default was 1.0)",
    }

    neutral = {"strength": 0.0, "carry_optimizer": False}
    trial = {"samples": 6, "length": 32, "bits": 32}

    strength: float = setting(1.0e-3, within="[0, inf)", help="φ; the loss is in nats per labelled token")
    temperature: Literal["auto"] | float = setting(
        "auto", within="(0, inf)", help="of the softmax over groups; auto is the standard deviation of the norms"
    )
    groups: Literal["modules", "blocks"] = setting(
        "modules", help="one coefficient for each module or for each transformer block"
    )
    normalise: Literal["mean", "sum"] = setting(
        "mean", help="whether φ belongs to coefficients of mean 1 or, as published, of sum 1"
    )
    keep_strength: bool = setting(True, help="divide the coefficients by their importance-weighted mean")
    layer_wise: bool = setting(True, help="false: all coefficients are 1 (ablation)")
    element_wise: bool = setting(True, help="false: each tensor's Ω is replaced by its mean (ablation)")
    samples: int = setting(256, phase="prepare", within="[1, inf)", help="documents of the general phase")
    length: int = setting(512, phase="prepare", within="[2, inf)", help="each document is cut at this many tokens")
    epochs: float = setting(1.0, phase="prepare", within="(0, inf)", help="epochs of the general phase")
    learning_rate: float | None = setting(
        None, phase="prepare", within="(0, inf)", help="of the general phase; null: the method's own"
    )
    xi: float = setting(1.0e-9, phase="prepare", within="(0, inf)", help="ξ in the denominator of Ω")
    gradient: Literal["exact", "displacement"] = setting(
        "exact", phase="prepare", help="dL/dθ, or what the paper's code takes for it: the movement of the product B·A"
    )
    clamp: Literal["end", "step"] = setting("end", phase="prepare", help="when negative ω are set to 0")
    consolidate: Literal["end", "epoch"] = setting("end", phase="prepare", help="when ω is added to Ω")
    bits: Literal[8, 32] = setting(8, phase="prepare", help="importance in 8-bit logarithmic codes or as 32-bit floats")
    carry_optimizer: bool = setting(False, phase="prepare", help="start with Adam's state from the general phase")

    def preparation(self):
        training = {"learning_rate": self.learning_rate, "epochs": self.epochs}
        return (Pass(documents=self.samples, length=self.length, cut_by="length", training=training),)

    def memory(self, *, counts, phase):
        start = counts.checkpoint * counts.trained_base + counts.wide * counts.adapters
        if phase == "prepare":  # ω of every regularised weight and, under an adapter, the sum of dL/dW it comes from
            importance = counts.share(counts.wide * (counts.regularised + counts.adapted))
            made = start + 2 * counts.wide * counts.trained * self.carry_optimizer  # copies in main memory
            return Memory(importance=importance, update=made if counts.device == "cpu" else 0)
        return Memory(anchor=counts.share(start), **memory_of_penalty(counts, bits=self.bits))

    def prepare(self, *, model, base, general, seed, fit, progress, shards=Shards(), resume=None, sample=None):
        examples = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        if not examples:
            raise UserError("hierarchical: no general text to learn importance from")
        integral = PathIntegral(gradient=self.gradient, clamp=self.clamp, consolidate=self.consolidate, xi=self.xi)
        (general_phase,) = self.preparation()
        try:
            result = fit(model=model, parts=(integral,), examples=examples, seed=seed, **general_phase.training)
            run, state = result.run, result.states[integral.key]
            rows = integral.consolidated(state)
        finally:
            integral.release()
        importance = {
            w.name: compact(w.wholly(rows.pop(w.name)), bits=self.bits, name=w.name) for w in state["displaced"]
        }
        # θ* is rounded once to the checkpoint's own dtype: training starts exactly at the anchor, which takes two bytes
        start = {
            name: run.whole(name).to(base[name].dtype if name in base else run.weights[name].dtype).cpu().clone()
            for name in run.weights
        }
        carry = carried(run, result.optimizer) if self.carry_optimizer else None
        notes = {
            "documents": len(examples),
            "tokens": result.tokens,
            "entries": sum(t.numel() for t in importance.values()),
        }
        if len(examples) < self.samples:
            notes["documents_asked"] = self.samples
        return Prepared(importance=importance, start=start, carry=carry, tokens=result.tokens, notes=notes)

    def begin(self, *, run, state, examples, general=()):
        state["anchor"] = anchored(run, state["start"])
        weights = effective_weights(run, anchor=state["anchor"])
        refuse_missing(state["importance"], [w.name for w in weights], part=self.key)
        group = {w.name: self._group(run, w) for w in weights}
        norms, mass, sums = dict.fromkeys(group.values(), 0.0), dict.fromkeys(group.values(), 0.0), {}
        for name in group:  # of whole tensors, which every process has on the CPU
            sums[name], squares = totals(state["importance"][name])
            mass[group[name]] += sums[name]
            norms[group[name]] += squares
        norms = {name: math.sqrt(squares) for name, squares in norms.items()}
        c = layer_coefficients(list(norms.values()), self.temperature)
        if not self.layer_wise:
            c = torch.ones_like(c)
        state["largest_share"] = (c / len(norms)).max().item()
        if self.keep_strength:
            c = keep_strength(c, torch.tensor(list(mass.values()), dtype=torch.float64))
        state["coefficients"], state["norms"] = dict(zip(norms, c.tolist(), strict=True)), norms
        strength = self.strength / (len(norms) if self.normalise == "sum" else 1)
        state["terms"] = []
        for w in weights:
            omega = state["importance"][w.name]
            if self.element_wise:
                omega = placed(run, omega)
            else:
                omega = torch.tensor(sums[w.name] / omega.numel(), dtype=torch.float64, device=run.device)
            state["terms"].append((w, omega, strength * state["coefficients"][group[w.name]]))

    def _group(self, run, weight: Effective) -> str:
        """The name of the group that a weight's coefficient is of."""
        if self.groups == "modules":
            return weight.name.rpartition(".")[0]
        return group_of(
            run.model, weight.parameter if isinstance(weight, Full) else f"{weight.layer}.base_layer.weight"
        )

    def optimizer_ready(self, *, run, state, optimizer):
        carry = state.pop("carry", None)
        if self.carry_optimizer and carry:
            restore_state(run, optimizer, carry)

    def before_clip(self, *, run, state, step):
        if not self.strength:
            return None
        value = torch.zeros((), device=run.device)
        for weight, omega, strength in state["terms"]:
            value = value + strength * weight.penalise(omega, scale=2 * strength)
        return value

    def report(self, *, run, state):
        warning = None
        if self.layer_wise and len(state["coefficients"]) > 1 and state["largest_share"] > 0.5:
            first = max(state["coefficients"], key=state["coefficients"].get)
            warning = (
                f"{first} takes {state['largest_share']:.0%} of the layer-wise weight: the softmax over norms is "
                "nearly one-hot; a higher temperature spreads it"
            )
        facts = {name: state[name] for name in ("coefficients", "norms", "largest_share")}
        return facts | {"settings": self.settings(), "warning": warning}


def layer_coefficients(norms: Sequence[float] | Tensor, temperature: float | Literal["auto"] = "auto") -> Tensor:
    """c = L·softmax(norms/temperature) over L groups, float64, so that their mean is 1.

    "auto" is the standard deviation of the norms (divided by L, not L − 1); where all are equal, every c is 1.
    Raises UserError for a temperature that is not above 0.
    """
    norms = torch.as_tensor(norms, dtype=torch.float64)
    if temperature == "auto":
        spread = norms.std(correction=0)
        if spread == 0:
            return torch.ones_like(norms)
        temperature = spread
    elif isinstance(temperature, str) or not temperature > 0:
        raise UserError(f"temperature is {temperature!r}: it must be 'auto' or a number above 0")
    return len(norms) * torch.softmax(norms / temperature, dim=0)


def keep_strength(coefficients: Tensor, mass: Tensor) -> Tensor:
    """c / (Σ c_l·m_l / Σ m_l) with m_l = ΣΩ of group l, so that Σ c_l·m_l is the same as with all c = 1."""
    mean = (coefficients * mass).sum() / mass.sum()
    return coefficients / mean if mean > 0 else coefficients
