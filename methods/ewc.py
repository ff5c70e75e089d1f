"""Elastic weight consolidation (Kirkpatrick et al. 2017), on all weights or on LoRA's effective update (EWC-LoRA).

    penalty = strength/2 · Σ_i F_i (θ_i − θ₀,i)²        gradient strength · F ⊙ (θ − θ₀)

F is the diagonal Fisher information of the base model on general text (methods/tools/fisher.py), in nats² per document.
The gradient is added in closed form once an optimizer step, after accumulation and before clipping. With LoRA θ − θ₀ is
s·B·A. docs/methods/ewc.md tells how published baselines differ.

For a sequence of domains, each trained from the model of the one before, there is the online form (Schwarz et al. 2018,
arXiv 1805.06370; EWC-LoRA, arXiv 2602.17559, with γ = 1): one anchor, the model that this training starts from, and

    F = γ·F_earlier + F_new

where F_earlier is what the domain before prepared (`earlier`), which may itself be such a sum.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from methods.errors import UserError
from methods.part import Part, Prepared, cut, register, setting
from methods.tools.costs import Memory, Pass
from methods.tools.effective import adapted_names, base_anchor, base_parameters, effective_weights
from methods.tools.fisher import TOKENS, batched, diagonal_fisher
from methods.tools.importance import Codes, compact, decode, memory_of_penalty, placed, refuse_missing, totals
from methods.tools.process_group import Shards
from methods.tools.stored import load_importance

__all__ = ["EWC", "diagonal_fisher"]


@register(
    title="EWC",
    paper="https://arxiv.org/abs/1612.00796",
    line="Hold each weight to the base as firmly as the Fisher information of general text says.",
    phase="penalty",
    capabilities=frozenset({"importance"}),
)
@dataclass(frozen=True, kw_only=True)
class EWC(Part):
    shares = (
        "methods.tools.effective",
        "methods.tools.fisher",
        "methods.tools.importance",
        "methods.tools.per_example",
        "methods.tools.stored",
    )
    removed = {"density": "importance is stored for every entry; leave it out (the default was 1.0)"}

    neutral = {"strength": 0.0}
    trial = {"strength": 10.0, "samples": 4, "length": 24, "bits": 32}

    strength: float = setting(
        1.0e4, within="[0, inf)", help="λ in λ/2·Σ F(θ−θ₀)²; the loss is in nats per labelled token"
    )
    samples: int = setting(256, phase="prepare", within="[1, inf)", help="documents of general text for the Fisher")
    length: int = setting(512, phase="prepare", within="[2, inf)", help="each document is cut at this many tokens")
    estimator: Literal["empirical", "sampled", "signed", "batched"] = setting(
        "empirical",
        phase="prepare",
        help="labels of the text, labels drawn from the model, labels of the text with a random sign per document, "
        "or the squared mean gradient of a batch as published baselines compute it",
    )
    scope: Literal["adapted", "whole-model"] = setting(
        "adapted", phase="prepare", help="tensors with a Fisher: those that the method changes, or all"
    )
    bits: Literal[8, 32] = setting(8, phase="prepare", help="importance in 8-bit logarithmic codes or as 32-bit floats")
    batch_size: int = setting(8, phase="prepare", within="[1, inf)", help="documents in a batch, only for `batched`")

    earlier: str = setting(
        "",
        phase="prepare",
        path=True,
        help="folder of an earlier preparation, such as work/prepared/MODEL/METHOD/seed0, whose importance is added",
    )
    gamma: float = setting(
        1.0, phase="prepare", within="[0, 1]", help="γ of F = γ·F_earlier + F_new; only for `earlier`"
    )

    @property
    def _earlier(self) -> Path:
        return Path(self.earlier).expanduser() / f"{self.key}.importance.safetensors"

    def look(self, *, shapes):
        if self.earlier and not self._earlier.is_file():
            raise UserError(
                f"ewc.earlier is {self.earlier!r}, where there is no {self._earlier.name}: name the folder of an "
                "earlier preparation of this part, such as work/prepared/MODEL/METHOD/seed0"
            )

    def preparation(self):
        batched = {"rows": self.batch_size} if self.estimator == "batched" else {"tokens": TOKENS}
        return (Pass(documents=self.samples, length=self.length, cut_by="length", gradients=self.scope, **batched),)

    def memory(self, *, counts, phase):
        if phase == "train":
            anchor = counts.share(counts.checkpoint * counts.trained_base)
            return Memory(anchor=anchor, **memory_of_penalty(counts, bits=self.bits))
        whole = self.scope == "whole-model"
        largest = counts.largest_base if whole else counts.largest_regularised
        return Memory(
            importance=counts.wide * (counts.base if whole else counts.regularised) * (2 if self.earlier else 1),
            gradient=(counts.compute + counts.wide * counts.half) * largest,
        )

    def prepare(self, *, model, base, general, seed, fit, progress, shards=Shards(), resume=None, sample=None):
        """The Fisher by base parameter name. It ignores `seed`, so that all cells of a model share it."""
        examples = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        everything = base_parameters(model)
        names = adapted_names(model) if self.scope == "adapted" else list(everything)
        with progress(total=len(examples), desc="fisher", unit="doc") if progress else nullcontext() as bar:
            fisher = diagonal_fisher(
                model,
                batched(examples, self.batch_size if self.estimator == "batched" else None),
                self.estimator,
                parameters={name: everything[name] for name in names},
                progress=None if bar is None else bar.update,
                shards=shards,
                resume=resume,
            )
        if self.earlier:
            self._add_earlier(fisher)
        entries = sum(f.numel() for f in fisher.values())
        mean = sum(totals(f)[0] for f in fisher.values()) / entries
        notes = {
            "estimator": self.estimator,
            "documents": len(examples),
            "entries": entries,
            "scope": self.scope,
            "mean": float(f"{mean:.4g}"),  # rounded, so that the last bit of a sum changes no file
        }
        if len(examples) < self.samples:
            notes["documents_asked"] = self.samples
        if self.estimator == "batched":
            notes["batch_size"] = self.batch_size
        if self.earlier:
            notes["gamma"] = self.gamma
        importance = {name: compact(fisher.pop(name), bits=self.bits, name=name) for name in list(fisher)}
        return Prepared(importance=importance, tokens=sum(len(e["input_ids"]) for e in examples), notes=notes)

    def _add_earlier(self, fisher: dict[str, torch.Tensor]) -> None:
        """Add γ times the importance that was prepared earlier, in place."""
        self.look(shapes={})
        earlier = load_importance(self._earlier)
        if missing := [name for name in fisher if name not in earlier]:
            raise UserError(
                f"ewc.earlier: {self._earlier} has no importance of {missing[0]}, which this method changes: prepare "
                "the earlier one with `scope: whole-model`"
            )
        for name, new in fisher.items():
            old = earlier.pop(name)
            old = decode(old.codes, low=old.low, step=old.step) if isinstance(old, Codes) else old
            if old.shape != new.shape:
                raise UserError(
                    f"ewc.earlier: {name} in {self._earlier} has shape {list(old.shape)}, this model's is "
                    f"{list(new.shape)}: name a preparation of the same architecture"
                )
            new.add_(old.to(new), alpha=self.gamma)

    def begin(self, *, run, state, examples, general=()):
        state["anchor"] = base_anchor(run)
        weights = effective_weights(run, anchor=state["anchor"])
        refuse_missing(state["importance"], [w.name for w in weights], part=self.key)
        state["terms"] = [(w, placed(run, state["importance"][w.name])) for w in weights]

    def before_clip(self, *, run, state, step):
        if not self.strength:
            return None
        value = torch.zeros((), device=run.device)
        for weight, fisher in state["terms"]:
            value = value + weight.penalise(fisher, scale=self.strength)
        return value * (self.strength / 2)

    def report(self, *, run, state):
        facts = {"strength": self.strength, "estimator": self.estimator, "scope": self.scope}
        return facts | ({"batch_size": self.batch_size} if self.estimator == "batched" else {})
