"""Hierarchical importance regularisation (Song et al. 2025, arXiv 2501.13669).

A short training phase on general text finds θ* and Ω (methods/tools/path_integral.py); the domain phase starts from θ* with

    penalty = φ · Σ_l c_l Σ_i Ω_i (θ_i − θ*_i)²          c = L·softmax(‖Ω_l‖ / temperature)

over L groups l, so that the coefficients' mean is 1. On LoRA's effective update s·B·A, as in the paper, or on full
parameters. docs/methods/hierarchical.md lists where the paper and its code differ; params.yaml has a block for each.
"""

from __future__ import annotations

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
from methods.tools.effective import Full, anchored, effective_weights
from methods.tools.importance import encode, memory_of_penalty, placed, totals
from methods.tools.path_integral import PathIntegral
from methods.tools.process_group import Shards


@register(
    title="Hierarchical",
    paper="https://arxiv.org/abs/2501.13669",
    line="Learn on general text which weights matter, by layer and by entry, then hold them while the domain is learned.",
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

    neutral = {"strength": 0.0}
    trial = {"samples": 6, "length": 32, "bits": 32}

    strength: float = setting(1.0e-3, within="[0, inf)", help="φ, against a loss in nats a labelled token")
    temperature: Literal["auto"] | float = setting(
        "auto", within="(0, inf)", help="of the softmax over groups; auto is the norms' standard deviation"
    )
    groups: Literal["modules", "blocks"] = setting(
        "modules", help="a coefficient each module or each transformer block"
    )
    normalise: Literal["mean", "sum"] = setting(
        "mean", help="whether φ is for coefficients of mean 1 or of sum 1, as published"
    )
    keep_strength: bool = setting(True, help="divide by the importance-weighted mean coefficient")
    layer_wise: bool = setting(True, help="false: all coefficients 1 (ablation)")
    element_wise: bool = setting(True, help="false: each tensor's Ω replaced by its mean (ablation)")
    samples: int = setting(256, phase="prepare", within="[1, inf)", help="documents of the general phase")
    length: int = setting(512, phase="prepare", within="[2, inf)", help="tokens a document is cut at")
    epochs: float = setting(1.0, phase="prepare", within="(0, inf)", help="of the general phase")
    learning_rate: float | None = setting(
        None, phase="prepare", within="(0, inf)", help="of the general phase; null takes the method's own"
    )
    xi: float = setting(1.0e-9, phase="prepare", within="(0, inf)", help="ξ of Ω's denominator")
    gradient: Literal["exact", "displacement"] = setting(
        "exact", phase="prepare", help="dL/dθ, or the code's movement of the product"
    )
    clamp: Literal["end", "step"] = setting("end", phase="prepare", help="when ω is kept from being negative")
    consolidate: Literal["end", "epoch"] = setting("end", phase="prepare", help="when ω becomes Ω")
    bits: Literal[8, 32] = setting(
        8, phase="prepare", help="a weight's importance: 8, in logarithmic steps, or 32, a float"
    )
    carry_optimizer: bool = setting(False, phase="prepare", help="begin with Adam's state of the general phase")

    def preparation(self):
        training = {"learning_rate": self.learning_rate, "epochs": self.epochs}
        return (Pass(documents=self.samples, length=self.length, cut_by="length", training=training),)

    def memory(self, *, counts, phase):
        if phase == "prepare":  # ω of every regularised weight and, under an adapter, the sum of dL/dW it comes from
            return Memory(importance=counts.share(counts.wide * (counts.regularised + counts.adapted)))
        anchor = counts.share(counts.checkpoint * counts.trained_base + counts.wide * counts.adapters)
        return Memory(anchor=anchor, **memory_of_penalty(counts, bits=self.bits))

    def prepare(self, *, model, base, general, seed, fit, progress, shards=Shards(), resume=None):
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
        importance = {}
        for weight in state["displaced"]:
            whole = weight.wholly(rows.pop(weight.name))
            importance[weight.name] = encode(whole, name=weight.name) if self.bits == 8 else whole.cpu()
        # θ* is rounded once to the checkpoint's own dtype, so that fine-tuning starts exactly at its anchor and two bytes hold it
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
        if missing := [w.name for w in weights if w.name not in state["importance"]]:
            raise UserError(
                f"hierarchical: no importance of {missing[0]} and {len(missing) - 1} more: "
                "prepare it again, `dvc repro --force --single-item prepare@MODEL-METHOD-SEED`"
            )
        importance = {w.name: state["importance"][w.name] for w in weights}
        names = {
            w.name: (
                group_of(run.model, w.parameter if isinstance(w, Full) else f"{w.layer}.base_layer.weight")
                if self.groups == "blocks"
                else w.name.rpartition(".")[0]
            )
            for w in weights
        }
        groups = list(dict.fromkeys(names.values()))
        squares, mass, sums = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0.0), {}
        for name, values in importance.items():
            sums[name], square = totals(values)  # of the whole tensor, which every process has on the CPU
            squares[names[name]] += square
            mass[names[name]] += sums[name]
        norms = torch.tensor([squares[g] for g in groups], dtype=torch.float64).sqrt()
        found = layer_coefficients(norms, self.temperature) if self.layer_wise else torch.ones_like(norms)
        share = (found / len(groups)).max().item()
        if self.keep_strength:
            found = keep_strength(found, torch.tensor([mass[g] for g in groups], dtype=torch.float64))
        state["coefficients"] = dict(zip(groups, found.tolist(), strict=True))
        state["norms"] = dict(zip(groups, norms.tolist(), strict=True))
        state["largest_share"] = share
        strength = self.strength / (len(groups) if self.normalise == "sum" else 1)
        omega = {
            name: placed(run, values)
            if self.element_wise
            else torch.tensor(sums[name] / values.numel(), dtype=torch.float64, device=run.device)
            for name, values in importance.items()
        }
        state["terms"] = [(w, omega[w.name], strength * state["coefficients"][names[w.name]]) for w in weights]

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
        said = {
            "coefficients": state["coefficients"],
            "norms": state["norms"],
            "largest_share": state["largest_share"],
            "settings": self.settings(),
            "warning": None,
        }
        if self.layer_wise and len(state["coefficients"]) > 1 and state["largest_share"] > 0.5:
            first = max(state["coefficients"], key=state["coefficients"].get)
            said["warning"] = (
                f"{first} takes {state['largest_share']:.0%} of the layer-wise weight: the softmax over norms is nearly "
                f"one-hot; a higher temperature spreads it"
            )
        return said


def layer_coefficients(norms: Sequence[float] | Tensor, temperature: float | Literal["auto"] = "auto") -> Tensor:
    """c = L·softmax(norms/temperature) over L groups, float64, so that their mean is 1.

    "auto" is the norms' standard deviation (of the population: divided by L); where all are equal, every c is 1.
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
    """c / (Σ c_l·m_l / Σ m_l), m_l = ΣΩ of group l: Σ c_l ΣΩ is then what it is with every c at 1."""
    mean = (coefficients * mass).sum() / mass.sum()
    return coefficients / mean if mean > 0 else coefficients
