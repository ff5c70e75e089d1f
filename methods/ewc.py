"""Elastic weight consolidation (Kirkpatrick et al. 2017), on all weights or on LoRA's effective update (EWC-LoRA).

    penalty = strength/2 · Σ_i F_i (θ_i − θ₀,i)²        gradient strength · F ⊙ (θ − θ₀)

F is the diagonal Fisher of the base model on general text (methods/tools/fisher.py), in units of nats² a document; the
penalty is added in closed form once an optimizer step, after accumulation and before clipping. With LoRA θ − θ₀ is
s·B·A. The page docs/methods/ewc.md says what published baselines do differently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from methods.errors import UserError
from methods.part import Part, Prepared, cut, register, setting
from methods.tools.architecture import base_name
from methods.tools.costs import Memory, Pass
from methods.tools.effective import Full, adapted_names, anchored, base_parameters, effective_weights
from methods.tools.fisher import TOKENS, by_length, diagonal_fisher
from methods.tools.importance import encode, memory_of_penalty, placed
from methods.tools.process_group import Shards

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
        1.0e4, within="[0, inf)", help="λ of λ/2·Σ F(θ−θ₀)², against a loss in nats a labelled token"
    )
    samples: int = setting(
        256, phase="prepare", within="[1, inf)", help="documents of general text the Fisher is the mean over"
    )
    length: int = setting(512, phase="prepare", within="[2, inf)", help="tokens a document is cut at")
    estimator: Literal["empirical", "sampled", "signed", "batched"] = setting(
        "empirical",
        phase="prepare",
        help="labels of the text, labels drawn from the model, the text's under a random sign a document, or the published square of "
        "a batch's mean gradient",
    )
    scope: Literal["adapted", "whole-model"] = setting(
        "adapted",
        phase="prepare",
        help="tensors the Fisher is computed and stored on: those that the method changes, or all",
    )
    bits: Literal[8, 32] = setting(
        8, phase="prepare", help="a weight's importance: 8, in logarithmic steps, or 32, a float"
    )
    batch_size: int = setting(
        8, phase="prepare", within="[1, inf)", help="documents a gradient is the mean of, for `batched` alone"
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
            importance=counts.wide * (counts.base if whole else counts.regularised),
            gradient=(counts.compute + counts.wide * counts.half) * largest,
        )

    def prepare(self, *, model, base, general, seed, fit, progress, shards=Shards(), resume=None):
        """The Fisher by base parameter name. Its labels are drawn with one fixed seed: every cell of a model shares it."""
        examples = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        everything = base_parameters(model)
        names = adapted_names(model) if self.scope == "adapted" else list(everything)
        with _bar(progress, len(examples)) as advance:
            fisher = diagonal_fisher(
                model,
                _batches(examples, self.batch_size if self.estimator == "batched" else None),
                self.estimator,
                parameters={name: everything[name] for name in names},
                progress=advance,
                shards=shards,
                resume=resume,
            )
        notes = {
            "estimator": self.estimator,
            "documents": len(examples),
            "entries": sum(f.numel() for f in fisher.values()),
            "scope": self.scope,
            "mean": _mean(fisher),
        }
        if len(examples) < self.samples:
            notes["documents_asked"] = self.samples
        if self.estimator == "batched":
            notes["batch_size"] = self.batch_size
        importance = {
            name: encode(fisher.pop(name), name=name) if self.bits == 8 else fisher.pop(name).cpu()
            for name in list(fisher)
        }
        return Prepared(importance=importance, tokens=sum(len(e["input_ids"]) for e in examples), notes=notes)

    def begin(self, *, run, state, examples, general=()):
        # what the run holds on to: θ₀ of trained tensors; an adapter's anchor is zero and takes no room
        state["anchor"] = anchored(
            run, {name: run.base[base_name(name)] for name in run.weights if base_name(name) in run.base}
        )
        weights = [
            replace(w, anchor=state["anchor"][w.parameter]) if isinstance(w, Full) else w
            for w in effective_weights(run)
        ]
        if missing := [w.name for w in weights if w.name not in state["importance"]]:
            raise UserError(
                f"ewc: the Fisher has nothing on {missing[0]} and {len(missing) - 1} more: "
                "prepare it again, `dvc repro --force --single-item prepare@MODEL-METHOD-SEED`"
            )
        state["terms"] = [(w, placed(run, state["importance"][w.name])) for w in weights]

    def before_clip(self, *, run, state, step):
        if not self.strength:
            return None
        value = torch.zeros((), device=run.device)
        for weight, fisher in state["terms"]:
            value = value + weight.penalise(fisher, scale=self.strength)
        return value * (self.strength / 2)

    def report(self, *, run, state):
        said = {"strength": self.strength, "estimator": self.estimator, "scope": self.scope}
        return said | ({"batch_size": self.batch_size} if self.estimator == "batched" else {})


def _batches(examples: list[dict], size: int | None) -> Iterator[dict]:
    """Right-padded batches of `size` documents in their order; without a size, of as many of like lengths as one pass takes."""
    if size is None:
        groups = by_length([len(e["input_ids"]) for e in examples])
    else:
        groups = [range(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]
    for group in groups:
        rows = [examples[i] for i in group]
        pad = torch.nn.utils.rnn.pad_sequence
        yield {
            "input_ids": pad([e["input_ids"] for e in rows], batch_first=True),
            "labels": pad([e["labels"] for e in rows], batch_first=True, padding_value=-100),
            "attention_mask": pad([torch.ones_like(e["input_ids"]) for e in rows], batch_first=True),
        }


def _mean(fisher: dict[str, torch.Tensor]) -> float:
    """Mean entry, to compare strengths between models; rounded, so that a last bit changes no file."""
    entries = sum(f.numel() for f in fisher.values())
    return float(f"{sum(f.double().sum().item() for f in fisher.values()) / entries:.4g}")


@contextlib.contextmanager
def _bar(progress, total: int) -> Iterator:
    if progress is None:
        yield None
    else:
        with progress(total=total, desc="fisher", unit="doc") as bar:
            yield bar.update
