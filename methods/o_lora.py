"""O-LoRA (Wang et al. 2023, arXiv 2310.14152): learn in a subspace orthogonal to that of an earlier adapter.

    penalty = strength · Σ_layers Σ_ij |(A_old·Aᵀ)_ij|        gradient of A: strength · sign(A_old·Aᵀ)ᵀ·A_old,
    A_old, A: rank × in                                       with sign(0) = 0

The loss is in nats per labelled token; the sum over pairs of rows and layers is divided by nothing, as published.
In the paper the earlier adapter has learned the tasks before this one and stays in the model. With one domain there is
none, so one like `lora`'s is first fitted on general text, from a draw of its own; or `path` names one. It is only
avoided: with it in the model the domain phase would not start from the base. The paper's second term is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.errors import UserError
from methods.part import Part, Prepared, Run, cut, generator, register, setting
from methods.tools.costs import Memory, Pass
from methods.tools.earlier_adapter import read_a, redraw
from methods.tools.effective import factored_weights
from methods.tools.process_group import Shards

WHERE = "o_lora.path"
OWN_START = "the adapter's factor A starts from the weight itself, for the earlier adapter as for the new one"


@register(
    title="O-LoRA",
    paper="https://arxiv.org/abs/2310.14152",
    line="Keep LoRA's update orthogonal to what an earlier adapter, or one fitted on general text, reads.",
    phase="penalty",
)
@dataclass(frozen=True, kw_only=True)
class OLoRA(Part):
    shares = (
        "methods.tools.adapter",
        "methods.tools.earlier_adapter",
        "methods.tools.effective",
        "methods.tools.importance",
        "methods.tools.peft_adapter",
    )
    scratch = ("carry", "old")
    neutral = {"strength": 0.0}
    trial = {"samples": 4, "length": 24}
    beside = {"lora": {"rank": 2}}
    excludes = dict.fromkeys(("pissa", "milora", "corda", "lora_null", "mica"), OWN_START)

    strength: float = setting(0.5, within="[0, inf)", help="λ₁ of λ₁·Σ|A_old·Aᵀ|, against nats per labelled token")
    path: str | None = setting(
        None, phase="prepare", path=True, help="folder of the earlier adapter; null: one is fitted on general text"
    )
    samples: int = setting(256, phase="prepare", within="[1, inf)", help="documents of general text it is fitted on")
    length: int = setting(512, phase="prepare", within="[2, inf)", help="each document is cut at this many tokens")
    epochs: float = setting(1.0, phase="prepare", within="(0, inf)", help="epochs over them")
    learning_rate: float | None = setting(None, phase="prepare", within="(0, inf)", help="null: the method's own")

    def look(self, *, shapes):
        if self.path:
            read_a(self.path, where=WHERE, shapes=shapes)

    def preparation(self):
        if self.path:
            return ()
        training = {"learning_rate": self.learning_rate, "epochs": self.epochs}
        return (Pass(documents=self.samples, length=self.length, cut_by="length", training=training),)

    def memory(self, *, counts, phase):
        factors = counts.wide * counts.adapters  # at most: A_old is smaller
        return Memory(state=factors) if phase == "train" else Memory(update=factors)

    def prepare(self, *, model, base, general, seed, fit, progress, shards=Shards(), resume=None, sample=None):
        if self.path:
            old = read_a(self.path, where=WHERE, shapes={name: tensor.shape for name, tensor in base.items()})
            return Prepared(carry=old, notes={"layers": len(old)})
        examples = cut(general, samples=self.samples, length=self.length, part=self if shards.first else None)
        if not examples:
            raise UserError("o_lora: there is no general text to fit an adapter on: set `general.importance`")
        redraw(model, generator(self.key, seed))  # with the seed alone A would start where the new adapter's does
        training = self.preparation()[0].training
        result = fit(model=model, parts=(), examples=examples, seed=seed, **training)
        old = {weight.name: result.run.whole(weight.a).cpu().clone() for weight in factored_weights(result.run)}
        return Prepared(carry=old, tokens=result.tokens, notes={"layers": len(old), "documents": len(examples)})

    def begin(self, *, run, state, examples, general=()):
        if not (adapted := factored_weights(run)):
            raise UserError("o_lora: the method has no adapters: add `lora` to its block")
        carry = state["carry"]
        state["old"] = {w.a: carry[w.name].to(run.device, run.weights[w.a].dtype) for w in adapted if w.name in carry}
        if not state["old"]:
            raise UserError(
                f"o_lora.path: the adapter in {self.path} is of other layers than this method's: of "
                f"{', '.join(list(carry)[:3])}, and here {adapted[0].name} is adapted first"
            )
        state["at_start"] = _overlap(run, state["old"])

    def before_clip(self, *, run, state, step):
        if not self.strength:
            return None
        value = torch.zeros((), device=run.device)
        for name, old in state["old"].items():
            products = old @ run.weights[name].detach().T  # with this process's rows of A
            run.weights[name].grad.add_(products.sign().T @ old, alpha=self.strength)
            value += products.abs().sum()
        return self.strength * value

    def report(self, *, run, state):
        return {"overlap_at_start": state["at_start"], "overlap": _overlap(run, state["old"])}


def _overlap(run: Run, old: dict[str, Tensor]) -> float:
    """The mean |cosine| of a row of A_old and one of A, over all pairs and layers."""
    total, pairs = torch.zeros((), dtype=torch.float64, device=run.device), 0
    for name, other in old.items():
        new, other = (nn.functional.normalize(matrix.detach().double(), dim=1) for matrix in (run.weights[name], other))
        total += (other @ new.T).abs().sum()
        pairs += len(other) * run.shapes[name][0]
    return run.shards.sum(total).item() / pairs
