"""Fisher merging (Matena & Raffel 2021): average base and tuned weights, each entry by how much either needs it.

    θ = (λ·F₀·θ₀ + F₁·θ₁) / (λ·F₀ + F₁)

F₀ is the diagonal Fisher of the base on general text, F₁ that of the tuned model on rows of the domain, both exact for
each example (methods/tools/fisher.py), in nats² per document and per row. Each is divided by its Euclidean norm over
all entries that were tuned, as in the authors' code, so that λ compares the two whatever the lengths of their texts;
`normalise: false` leaves it out. By default labels are drawn from the model: the true Fisher, as in the paper.

F₀ is prepared like EWC's importance. F₁ is computed after training, at the first process, on a model built from the
finished weights, adapters merged. Where F₀ and F₁ are both 0 the tuned weight is kept. `floor` is the least value that
F₁ is taken to have; the authors' code puts 1e-6 there, which is more than most entries of a large model have.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from methods.ewc import EWC
from methods.part import Part, cut, register, setting
from methods.tools.costs import Memory
from methods.tools.fisher import batched, diagonal_fisher
from methods.tools.importance import Codes, decode, refuse_missing, totals
from methods.tools.process_group import Shards
from methods.tools.rebuilt import rebuilt


@register(
    title="Fisher merging",
    paper="https://arxiv.org/abs/2111.09832",
    line="Average base and tuned weights, each entry by its Fisher information on general text and on the domain.",
    phase="merge",
    capabilities=frozenset({"importance"}),
)
@dataclass(frozen=True, kw_only=True)
class FisherMerge(Part):
    shares = ("methods.ewc", *EWC.shares, "methods.tools.rebuilt")
    scratch = ("rows",)
    neutral = {"strength": 0.0}
    trial = {"samples": 4, "length": 24, "rows": 6, "bits": 32}

    strength: float = setting(1.0, within="[0, inf)", help="λ, the weight of F₀ beside F₁")
    rows: int = setting(256, within="[1, inf)", help="training rows of the domain, drawn from the seed, for F₁")
    normalise: bool = setting(True, help="divide each Fisher by its norm")
    floor: float = setting(0.0, within="[0, inf)", help="the least value that an entry of F₁ is taken to have")
    samples: int = setting(256, phase="prepare", within="[1, inf)", help="documents of general text for F₀")
    length: int = setting(512, phase="prepare", within="[2, inf)", help="each document is cut at this many tokens")
    estimator: Literal["sampled", "empirical"] = setting(
        "sampled", phase="prepare", help="labels drawn from the model, or labels of the text"
    )
    bits: Literal[8, 32] = setting(8, phase="prepare", help="F₀ in 8-bit logarithmic codes or as 32-bit floats")

    @property
    def _ewc(self) -> EWC:
        """What prepares F₀."""
        return EWC(samples=self.samples, length=self.length, estimator=self.estimator, bits=self.bits)

    def preparation(self):
        return self._ewc.preparation()

    def memory(self, *, counts, phase):
        """After training, beside what the run holds: a model of float32 weights, and F₁."""
        if phase == "prepare":
            return self._ewc.memory(counts=counts, phase=phase)
        stored = counts.regularised * self.bits // 8 if counts.device == "cpu" else 0  # else it waits in main memory
        return Memory(importance=stored, update=counts.wide * (counts.base + counts.regularised))

    def prepare(self, *, general, shards=Shards(), **arguments):
        documents = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        return replace(self._ewc, samples=max(1, len(documents))).prepare(general=documents, shards=shards, **arguments)

    def begin(self, *, run, state, examples, general=()):
        order = torch.randperm(len(examples), generator=run.generator(self.key)).tolist()
        state["rows"] = [examples[index] for index in order[: self.rows]]

    def finish(self, *, run, state, final, measure=None):
        if not self.strength or not run.shards.first:
            return final
        importance = {name: state["importance"][name] for name in final if name in state["importance"]}
        refuse_missing(importance, final, part=self.key)
        own = self._of_tuned(run, state["rows"], final)
        theirs, ours = (_norm(fisher) if self.normalise else 1.0 for fisher in (importance, own))
        merged, kept = {}, 0.0
        for name, tuned in final.items():
            f0 = self.strength / theirs * _dense(importance[name])
            f1 = (own.pop(name).double() / ours).clamp_(min=self.floor)
            share = torch.where(f0 + f1 > 0, f1 / (f0 + f1), 1.0)
            merged[name] = torch.lerp(run.base[name].to(tuned), tuned, share.to(tuned))
            kept += share.sum().item()
        state["kept"] = kept / max(1, sum(tuned.numel() for tuned in final.values()))
        return merged

    def _of_tuned(self, run, rows, final) -> dict[str, Tensor]:
        """F₁ by base parameter name, on the CPU."""
        dtype = torch.promote_types(next(iter(run.base.values())).dtype, torch.float32)
        model = rebuilt(run.model, {**run.base, **final}, dtype=dtype).to(run.device)
        run.charge(rows=rows)
        with tqdm(total=len(rows), desc="fisher of the tuned weights", unit="row", disable=None) as bar:
            fisher = diagonal_fisher(
                model, batched(rows), self.estimator, seed=run.seed, parameters=list(final), progress=bar.update
            )
        return {name: values.cpu() for name, values in fisher.items()}

    def report(self, *, run, state):
        return {"rows": len(state["rows"])} | ({"share_of_tuned": state["kept"]} if "kept" in state else {})


def _dense(values: Tensor | Codes) -> Tensor:
    if isinstance(values, Codes):
        return decode(values.codes, low=values.low, step=values.step, dtype=torch.float64)
    return values.double()


def _norm(fisher: dict[str, Tensor | Codes]) -> float:
    """√ΣF², or 1 where every F is 0."""
    return math.sqrt(sum(totals(values)[1] for values in fisher.values())) or 1.0
